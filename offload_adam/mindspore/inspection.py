"""`InspectableAdam`: the read-only properties and getters of `Adam`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from offload_adam.mindspore.groups import AdamGroup
from offload_adam.printable import show
from offload_adam.sharded_optimizer import ShardedOptimizer


class InspectableAdam(ShardedOptimizer):
    """The properties and getters that `mindspore.nn.Adam` documents; `Adam` adds the update.

    Lifecycle: the subclass's constructor sets the attributes.
    """

    use_offload: bool
    _global_step: int
    _order: list[torch.nn.Parameter] | None
    _grouped: bool

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """All parameters, in the order in which `opt(gradients)` expects the gradients.

        If `order_params` was given, this is its order, followed by parameters of groups added
        later. Otherwise it is the order of the groups, reversed with `use_offload`.
        """
        if self._order is not None:
            later = [p for p in self._in_group_order() if id(p) not in set(map(id, self._order))]
            return (*self._order, *later)
        walked = list(self._in_group_order())
        return tuple(reversed(walked) if self.use_offload else walked)

    def _in_group_order(self) -> Iterator[torch.nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @property
    def global_step(self) -> int:
        """Number of updates so far, without skipped steps."""
        return self._global_step

    @property
    def is_group(self) -> bool:
        """Whether parameters were given in groups."""
        return self._grouped

    @property
    def is_group_lr(self) -> bool:
        """Whether any group was given its own learning rate."""
        return any("lr" in group.own for group in self._groups())

    @property
    def is_group_params_ordered(self) -> bool:
        """Whether `order_params` was given."""
        return self._order is not None

    @property
    def dynamic_lr(self) -> bool:
        """Whether a learning rate changes with the step."""
        return any("lr" in group.dynamic for group in self._groups())

    @property
    def dynamic_weight_decay(self) -> bool:
        """Whether a weight decay changes with the step."""
        return any("weight_decay" in group.dynamic for group in self._groups())

    def get_lr(self) -> float | tuple[float, ...]:
        """Return the learning rate of the next step.

        Returns:
            One number; or, if any group was given its own, one number for each of `parameters`.
            After the end of a list of values, the last value.
        """
        return self._current_values("lr", self.is_group_lr)

    def get_weight_decay(self) -> float | tuple[float, ...]:
        """Return the weight decay of the next step, in the form of `get_lr`."""
        grouped = any("weight_decay" in group.own for group in self._groups())
        return self._current_values("weight_decay", grouped)

    def get_lr_parameter(self, param: Any) -> float | list[float]:
        """Return the learning rate of the next step for a parameter, or for each in a list.

        Raises:
            TypeError: `param` is not a parameter or a list of parameters.
            ValueError: a parameter is in no group.
        """
        rates = self._by_parameter("lr")
        if isinstance(param, torch.Tensor):
            return self._rate_of(param, rates)
        if not isinstance(param, (list, tuple)):
            raise TypeError(f"param must be a parameter or a list of them, not {show(param)}")
        for position, item in enumerate(param):
            if not isinstance(item, torch.Tensor):
                raise TypeError(
                    f"param[{position}] must be a parameter, not a {type(item).__name__}"
                )
        return [self._rate_of(item, rates) for item in param]

    @staticmethod
    def _rate_of(parameter: torch.Tensor, rates: Mapping[int, float]) -> float:
        if id(parameter) not in rates:
            raise ValueError(
                "param is not in any group of this optimizer. Pass a parameter that is."
            )
        return rates[id(parameter)]

    def _current_values(self, key: str, by_parameter: bool) -> float | tuple[float, ...]:
        values = self._by_parameter(key)
        if by_parameter:
            return tuple(values[id(parameter)] for parameter in self.parameters)
        return next(iter(values.values()))

    def _by_parameter(self, key: str) -> dict[int, float]:
        with self._lock:
            shown = [(group, group.shown_at(self._global_step)[key]) for group in self._groups()]
        return {id(parameter): value for group, value in shown for parameter in group["params"]}

    @property
    def target(self) -> str:
        """Where updates are computed: "CPU", or "GPU" if state and parameters are on a GPU."""
        on_host = self.use_offload or all(p.device.type == "cpu" for p in self._in_group_order())
        return "CPU" if on_host else "GPU"

    @target.setter
    def target(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"target must be a str, not {show(value)}")
        if value != "CPU":
            raise ValueError(f"target must be 'CPU', not {show(value)}")
        if self.target != "CPU":
            raise ValueError(
                "target cannot be set to 'CPU', because parameters and state are on a GPU. "
                "Construct the optimizer with use_offload=True."
            )

    def _groups(self) -> list[AdamGroup]:
        return self.param_groups  # type: ignore[return-value]
