"""All that one rank holds of one bucket: its layout, its parameters, its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.layout.flat import Bucket
from offload_adam.layout.state_plan import StatePlan
from offload_adam.memory.planes import StatePlanes, gradient_dtype


@dataclass(frozen=True, slots=True)
class SegmentArrays:
    """The segments of one shard as int64 columns, one row a segment (see `layout.flat.Segment`)."""

    positions: npt.NDArray[np.int64]
    parameter_starts: npt.NDArray[np.int64]
    shard_starts: npt.NDArray[np.int64]
    numels: npt.NDArray[np.int64]


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
    segments: SegmentArrays

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


def segment_arrays(bucket: Bucket, rank: int) -> SegmentArrays:
    """Return the segments of `rank`'s shard as columns."""
    segments = bucket.segments(rank)
    columns = np.array(
        [(s.position, s.parameter_start, s.shard_start, s.numel) for s in segments],
        dtype=np.int64,
    ).reshape(-1, 4)
    return SegmentArrays(*(np.ascontiguousarray(column) for column in columns.T))


def carrier(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return a host tensor as the NumPy array in whose dtype the kernels know its format."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype == torch.float16:
        tensor = tensor.view(torch.int16)
    array: npt.NDArray[np.generic] = tensor.detach().numpy()
    return array
