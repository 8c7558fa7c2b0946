"""One bucket: the flat tensor that its parameters become views of, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.layout.flat import Bucket, Segment
from offload_adam.layout.state_plan import StatePlan
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.memory.planes import StatePlanes, gradient_dtype
from offload_adam.params.elements import in_shape_of, with_own_storage


def flatten_parameters(bucket: Bucket, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Move the parameters of one bucket into one flat tensor, and return it.

    Each parameter is assigned its part through `.data`, so that it stays the same object with its
    own version counter.

    Args:
        parameters: in the order of the bucket's placements; one dtype, one device.

    Returns:
        (bucket.numel,) on the parameters' device, zero in the padding.
    """
    first = parameters[0]
    flat = _allocate(bucket.numel, first.dtype, first.device)
    for placed, parameter in zip(bucket.placements, parameters, strict=True):
        if placed.numel > 0:
            view = in_shape_of(with_own_storage(flat[placed.start : placed.end]), parameter)
            view.copy_(parameter.data)
            parameter.data = view
    return flat


def _allocate(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on the host they are in huge pages, as the state is."""
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    return HostArena(padded_nbytes(numel, dtype), survives_fork=True).take(numel, dtype)


@dataclass(frozen=True, slots=True)
class ShardSegments:
    """The segments of one shard, one by one and as int64 columns with one row for each."""

    each: tuple[Segment, ...]
    positions: npt.NDArray[np.int64]
    parameter_starts: npt.NDArray[np.int64]
    shard_starts: npt.NDArray[np.int64]
    numels: npt.NDArray[np.int64]

    @classmethod
    def of_shard(cls, bucket: Bucket, rank: int) -> ShardSegments:
        """Return the segments of `rank`'s shard."""
        each = bucket.segments(rank)
        columns = np.array(each, dtype=np.int64).reshape(-1, len(Segment._fields)).T
        return cls(each, *(np.ascontiguousarray(column) for column in columns))

    def select(self, chosen: npt.NDArray[np.bool_]) -> list[Segment]:
        """Return the segments of the chosen parameters: (num parameters,) bool."""
        return [self.each[row] for row in np.flatnonzero(chosen[self.positions]).tolist()]


@dataclass(frozen=True, eq=False)
class BucketState:
    """One rank's part of one bucket.

    plan: how it is stored; its `pinned` tells whether the state is page-locked in fact.
    rank: this rank's place among those that the bucket is divided over.
    parameters, names, indices, groups: in the order of the layout's placements; `indices` count
        over all parameters of the optimizer, `groups` over what a step is given hyperparameters of.
    flat: (numel,) all parameters of the bucket, on their device, in their dtype.
    shard: (shard_numel,) this rank's part of `flat`.
    step_counts: (num parameters,) float32 on the host, completed updates, as torch counts them.
    centralized: (num parameters,) whose gradients are centralized.

    Lifecycle: made once; tensors are written in place and never replaced.
    """

    plan: StatePlan
    rank: int
    parameters: Sequence[torch.nn.Parameter]
    names: Sequence[str]
    indices: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    flat: torch.Tensor
    shard: torch.Tensor
    planes: StatePlanes
    step_counts: torch.Tensor
    centralized: npt.NDArray[np.bool_]
    segments: ShardSegments

    @property
    def layout(self) -> Bucket:
        """Where its parameters lie."""
        return self.plan.bucket

    @property
    def own_master(self) -> bool:
        """Whether fp32 parameters are their own master weights."""
        return self.plan.state.master_weight == 0

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype of gradients while they are averaged and copied."""
        return gradient_dtype(self.dtype, self.plan.gradient.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bucket's parameters."""
        return self.flat.dtype

    @property
    def device(self) -> torch.device:
        """Where the bucket's parameters live."""
        return self.flat.device
