"""Tensors that users assign in `optimizer.state`: `StateEdits` finds them, by identity."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import chain
from operator import is_, methodcaller
from typing import Any, SupportsIndex
from weakref import WeakMethod

import torch

from offload_adam.memory.planes import SCALED_KEY
from offload_adam.printable import show
from offload_adam.state.load_plan import OTHER_KEY, check_step_count
from offload_adam.state.state_shard import SCALE_KEY

_values = methodcaller("values")


class StateEntry(dict[str, Any]):
    """A parameter's entry in `optimizer.state`, whose state stays on its device.

    Lightning, and scripts after `load_state_dict`, move all state to the parameters' device, where
    it may not fit:

        entry[key] = entry[key].to(device)

    So the entry copies such a tensor into the optimizer's own at once and does not keep it. Other
    assignments are found by `StateEdits`.

    Args:
        entry: the optimizer's own tensors.
        before_writing: prepares for a write to the tensors, which a background checkpoint may read.
    """

    __slots__ = ("_before_writing",)

    def __init__(
        self, entry: Mapping[str, torch.Tensor], before_writing: WeakMethod[Callable[[], None]]
    ) -> None:
        super().__init__(entry)
        self._before_writing = before_writing

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type, tuple[dict[str, Any]]]:
        """Copy and pickle as an OrderedDict, which `torch.load` accepts with `weights_only`."""
        return OrderedDict, (dict(self),)

    def __missing__(self, key: str) -> Any:
        """Explain which other keys stand for the value.

        Raises:
            KeyError: always.
        """
        raise KeyError(_no_key(key) if OTHER_KEY.get(key) in self else key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self and OTHER_KEY.get(key) in self:
            raise ValueError(_no_key(key))
        own = self.get(key)
        if (
            key != "step"  # its value is checked first, at the next step
            and isinstance(own, torch.Tensor)
            and isinstance(value, torch.Tensor)
            and value.device != own.device
            and value.shape == own.shape
        ):
            prepare = self._before_writing()
            if prepare is not None:
                prepare()
            with torch.no_grad():
                own.copy_(value)
        else:
            super().__setitem__(key, value)


def _no_key(key: str) -> str:
    if key == "exp_avg_sq":
        return (
            f"{key!r} is not in this state, whose second moment is in 8-bit codes. It is the "
            f"product of {SCALED_KEY!r} and {SCALE_KEY!r}."
        )
    return f"{key!r} is not in this state, which has {OTHER_KEY[key]!r} instead."


class StateEdits:
    """Finds tensors that users assigned in `optimizer.state` in place of the optimizer's own.

        optimizer.state[parameter]["exp_avg"] = tensor    # found and copied at the next step

    Cost: in each step one identity comparison per tensor, about 0.3 us per parameter.
    """

    def __init__(self) -> None:
        self._own: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        self._tensors: list[torch.Tensor] = []

    def add(self, parameter: torch.nn.Parameter, entry: Mapping[str, torch.Tensor]) -> None:
        """Remember a parameter's entry as the optimizer's own."""
        self._own[parameter] = dict(entry)
        self._tensors += entry.values()

    def is_untouched(self, state: Mapping[Any, Any]) -> bool:
        """Return whether every entry still holds the optimizer's own tensors, and no others."""
        if len(state) != len(self._own):
            # Hooks may add values under keys of their own, which torch saves.
            state = {parameter: state[parameter] for parameter in self._own if parameter in state}
        # Compared in the order of insertion. If a user has only reordered the entries, `find` runs
        # for nothing.
        found = chain.from_iterable(map(_values, state.values()))
        num_found = sum(map(len, state.values()))
        return num_found == len(self._tensors) and all(map(is_, found, self._tensors))

    def find(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]]
    ) -> Iterator[tuple[torch.nn.Parameter, dict[str, Any]]]:
        """Yield each parameter whose entry has a replaced tensor, and the whole entry.

        Raises:
            KeyError: an entry lacks a key; the error's argument is the key.
            TypeError, ValueError: the value of a key is not a tensor, or not a step count.
        """
        for parameter, own in self._own.items():
            entry = state[parameter]
            found = {key: entry[key] for key in own}
            if all(map(is_, found.values(), own.values())):
                continue
            for key, value in found.items():
                if key == "step":
                    check_step_count("The step in optimizer.state", value)
                elif not isinstance(value, torch.Tensor):
                    raise TypeError(f"{key} in optimizer.state must be a tensor, not {show(value)}")
            yield parameter, found

    def restore(self, state: Mapping[torch.Tensor, MutableMapping[str, Any]]) -> None:
        """Put the optimizer's own tensors back; keep keys that users have added."""
        for parameter, own in self._own.items():
            entry = state[parameter]
            added = {key: value for key, value in entry.items() if key not in own}
            entry.clear()
            entry.update({**own, **added})
