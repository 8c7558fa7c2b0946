"""The outcome of a run: what the model read, and the state at the end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from offload_adam.memory.codes import values_of
from offload_adam.step.step import ShardedAdam


class Read(NamedTuple):
    """The values that the model read from a parameter, and the number of steps before the read."""

    step: int
    parameter: int
    values: torch.Tensor


class StateKey(NamedTuple):
    """A range of one parameter's plane that begins at the parameter's element `start`."""

    parameter: int
    plane: str
    start: int


@dataclass
class Outcome:
    """The result of a run.

    weights: for each number of steps, the values of every parameter; of the reference run only.
    reads: the values that the model read; of a simulated run only.
    state: this rank's shard of the state at the end.
    reports: for each step, whether it was skipped, and its clip factor.
    updated_on_device: the result if all state is on the device, where torch's operations update it
        and round differently from the kernels; None if no state is there.
    """

    weights: list[list[torch.Tensor]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    state: dict[StateKey, torch.Tensor] = field(default_factory=dict)
    reports: list[tuple[bool, float]] = field(default_factory=list)
    updated_on_device: Outcome | None = None

    def with_device_state(self, parameters: Collection[int]) -> Outcome:
        """Return the outcome if the state of these parameters is on the device."""
        assert self.updated_on_device is not None
        weights = [
            [others[i] if i in parameters else own[i] for i in range(len(own))]
            for own, others in zip(self.weights, self.updated_on_device.weights, strict=True)
        ]
        state = {
            key: (self.updated_on_device if key.parameter in parameters else self).state[key]
            for key in self.state
        }
        return replace(self, weights=weights, state=state)


def state_of(core: ShardedAdam) -> dict[StateKey, torch.Tensor]:
    """Return copies of all state: for each segment its planes, and for each parameter its count."""
    found: dict[StateKey, torch.Tensor] = {}
    for state in core.states:
        planes = {
            **state.planes.named(own_master=False),
            "master_weight": state.planes.master_weight,  # the high half, too
            "step": state.step_counts,
        }
        for segment in state.layout.segments(state.rank):
            index = int(state.indices[segment.position])
            for name, plane in planes.items():
                place, numel = segment.shard_start, segment.numel
                if name == "step":
                    place, numel = segment.position, 1
                key = StateKey(index, name, 0 if name == "step" else segment.parameter_start)
                found[key] = values_of(plane[place : place + numel]).clone()
    return found
