"""What a run came to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from offload_adam.step.step import ShardedAdam


class Read(NamedTuple):
    """What the model found in a parameter after so many steps."""

    step: int
    parameter: int
    values: torch.Tensor


class StateKey(NamedTuple):
    """A stretch of one parameter's plane, from its element `start` on."""

    parameter: int
    plane: str
    start: int


@dataclass
class Outcome:
    """What a run came to.

    weights: for each number of steps taken, every parameter's values (of the reference only).
    reads: what the model read, of a simulated run only.
    state: at the end, of this rank's shard.
    reports: whether each step was skipped, and its clip factor.
    kept: the same with all state updated by the device's own operations, which round otherwise.
    """

    weights: list[list[torch.Tensor]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    state: dict[StateKey, torch.Tensor] = field(default_factory=dict)
    reports: list[tuple[bool, float]] = field(default_factory=list)
    kept: Outcome | None = None

    def with_kept(self, parameters: Collection[int]) -> Outcome:
        """Return the outcome where the state of these parameters is kept on the device."""
        assert self.kept is not None
        weights = [
            [others[i] if i in parameters else own[i] for i in range(len(own))]
            for own, others in zip(self.weights, self.kept.weights, strict=True)
        ]
        state = {
            key: (self.kept if key.parameter in parameters else self).state[key]
            for key in self.state
        }
        return replace(self, weights=weights, state=state)


def state_of(core: ShardedAdam) -> dict[StateKey, torch.Tensor]:
    """Return copies of all state: for each segment its planes, and for each parameter its count."""
    found: dict[StateKey, torch.Tensor] = {}
    for state in core.states:
        planes = {**state.planes.named(own_master=False), "step": state.step_counts}
        for segment in state.layout.segments(state.rank):
            index = int(state.indices[segment.position])
            for name, plane in planes.items():
                place, numel = segment.shard_start, segment.numel
                if name == "step":
                    place, numel = segment.position, 1
                key = StateKey(index, name, 0 if name == "step" else segment.parameter_start)
                found[key] = plane[place : place + numel].clone()
    return found
