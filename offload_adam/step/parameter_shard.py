"""One parameter on one rank, as flat ranges of everything that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from offload_adam.step.bucket_state import BucketState
from offload_adam.step.local_state import local_range


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """This rank's range of one parameter, in the order in which its elements lie in memory.

    bucket: the index of the bucket that it is in.
    start, end: elements [start, end) of the parameter.
    weight: (end - start,) view of the parameter itself, in its dtype, on its device.
    planes: (end - start,) float32 views of the state by torch's keys.
    step: 0-d view of its step count.
    """

    parameter: torch.nn.Parameter
    bucket: int
    start: int
    end: int
    weight: torch.Tensor
    planes: Mapping[str, torch.Tensor]
    step: torch.Tensor


def shards_of(state: BucketState) -> Iterator[ParameterShard]:
    """Yield the shards of one bucket's parameters; a range may be empty."""
    low, _ = state.layout.shard_bounds(state.rank)
    for position, parameter in enumerate(state.parameters):
        start, end = local_range(state, position)
        offset = state.layout.placements[position].start + start - low if end > start else 0
        part = slice(offset, offset + end - start)
        planes = state.planes.named(own_master=state.own_master)
        yield ParameterShard(
            parameter,
            state.layout.index,
            start,
            end,
            state.shard[part],
            {key: plane[part] for key, plane in planes.items()},
            state.step_counts[position],
        )
