"""What an `Adam` can be asked about its parameters, rates and steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from offload_adam.mindspore.groups import AdamGroup
from offload_adam.sharded_optimizer import ShardedOptimizer


class InspectableAdam(ShardedOptimizer):
    """The properties and getters that `mindspore.nn.Adam` documents; `Adam` adds the update.

    Lifecycle: a subclass sets the attributes while it is constructed.
    """

    use_offload: bool
    _global_step: int
    _order: list[torch.nn.Parameter] | None
    _grouped: bool

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """All parameters in walking order: the order in which `opt(gradients)` takes gradients.

        That is the order of `order_params`, else that of the groups, with `use_offload` reversed.
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
        """How many updates have been made; skipped steps are none."""
        return self._global_step

    @property
    def is_group(self) -> bool:
        """Whether parameters were given in groups."""
        return self._grouped

    @property
    def is_group_lr(self) -> bool:
        """Whether a group has a learning rate of its own."""
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
        """Return the learning rate of the coming step, one a parameter where groups have their own.

        Where a vector has run out it is the last one.
        """
        return self._in_force("lr", self.is_group_lr)

    def get_weight_decay(self) -> float | tuple[float, ...]:
        """Return the weight decay of the coming step, one a parameter where groups differ in it."""
        grouped = any("weight_decay" in group.own for group in self._groups())
        return self._in_force("weight_decay", grouped)

    def get_lr_parameter(self, param: Any) -> float | list[float]:
        """Return the learning rate of the coming step for a parameter, or for each of a list.

        Raises:
            TypeError: neither a parameter nor a list of them.
            ValueError: a parameter of no group.
        """
        rates = self._by_parameter("lr")
        if isinstance(param, torch.Tensor):
            return self._rate_of(param, rates)
        if not isinstance(param, (list, tuple)):
            raise TypeError(f"param must be a parameter or a list of them, not {param!r}")
        for position, item in enumerate(param):
            if not isinstance(item, torch.Tensor):
                raise TypeError(f"param has at {position} a {type(item).__name__}, not a parameter")
        return [self._rate_of(item, rates) for item in param]

    @staticmethod
    def _rate_of(parameter: torch.Tensor, rates: Mapping[int, float]) -> float:
        if id(parameter) not in rates:
            raise ValueError("param is in no group of this optimizer")
        return rates[id(parameter)]

    def _in_force(self, key: str, by_parameter: bool) -> float | tuple[float, ...]:
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
        """Where updates are computed: "CPU", or "GPU" for state beside parameters on a GPU."""
        on_host = self.use_offload or all(p.device.type == "cpu" for p in self._in_group_order())
        return "CPU" if on_host else "GPU"

    @target.setter
    def target(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"target must be a str, not {value!r}")
        if value != "CPU":
            raise ValueError(f"target must be 'CPU', not {value!r}")
        if self.target != "CPU":
            raise ValueError(
                "target cannot become 'CPU' for parameters on a GPU: make the optimizer with "
                "use_offload=True"
            )

    def _groups(self) -> list[AdamGroup]:
        return self.param_groups  # type: ignore[return-value]
