"""`BucketState`: the flat tensor that a bucket's parameters are views of, and their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.fsdp_private import is_dtensor, replace_local
from offload_adam.kernels import random_keys as at
from offload_adam.layout.flat import BLOCK_NUMEL, Bucket, Segment
from offload_adam.layout.state_plan import StatePlan
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.memory.planes import StatePlanes, gradient_dtype
from offload_adam.options import StateFormat
from offload_adam.params.element_index import element_index
from offload_adam.params.elements import in_shape_of, with_own_storage
from offload_adam.params.groups import bare_name
from offload_adam.params.local_shard import LocalShard
from offload_adam.params.selection import NewParameter


def flatten_parameters(
    bucket: Bucket,
    items: Sequence[NewParameter],
    memory: torch.Tensor | None = None,
    *,
    copies: bool = True,
) -> torch.Tensor:
    """Move the parameters of one bucket into one flat tensor, and return it.

    Each Parameter object stays the same. Its data becomes a view of its part of the flat tensor.
    For a DTensor, the local tensor becomes one, and FSDP2 gathers from there.

    Args:
        items: in the order of the bucket's placements; all of one dtype and device.
        memory: (bucket.numel,) becomes the flat tensor; None to allocate one.
        copies: copy the parameters' values. If False, the parameters get the values of `memory`.

    Returns:
        (bucket.numel,) on the parameters' device, zero in the padding.
    """
    first = items[0].local
    flat = _allocate(bucket.numel, first.dtype, first.device) if memory is None else memory
    for placed, item in zip(bucket.placements, items, strict=True):
        parameter = item.parameter
        if item.shard is not None and item.shard.record is not None:
            part = with_own_storage(flat[placed.start : placed.memory_end])
            item.shard.record.move_to(part, copies=copies)
        elif placed.numel > 0:
            # With its own storage: `torch.save` of one parameter would write the whole bucket.
            view = with_own_storage(in_shape_of(flat[placed.start : placed.end], item.local))
            if copies:
                view.copy_(item.local.detach())
            # Through `.data`: references in the model stay valid, and each parameter keeps its own
            # version counter, which views of one tensor would share.
            if is_dtensor(parameter):
                replace_local(parameter, view)
            else:
                parameter.data = view
    return flat


def _allocate(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. In host memory they are in huge pages, if the kernel grants them."""
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    # Unlike state, parameters must be readable in forked children, such as data loader workers.
    return HostArena(padded_nbytes(numel, dtype), survives_fork=True).allocate(numel, dtype)


@dataclass(frozen=True, slots=True)
class ShardSegments:
    """The segments of one shard, as tuples and as int64 columns of shape (num segments,).

    sum_starts: index of each segment's first block sum, if the sums of all segments are in one
        array.
    """

    each: tuple[Segment, ...]
    positions: npt.NDArray[np.int64]
    parameter_starts: npt.NDArray[np.int64]
    shard_starts: npt.NDArray[np.int64]
    numels: npt.NDArray[np.int64]
    sum_starts: npt.NDArray[np.int64]

    @classmethod
    def of_shard(cls, bucket: Bucket, rank: int) -> ShardSegments:
        """Return the segments of `rank`'s shard."""
        each = bucket.segments(rank)
        rows = np.array(each, dtype=np.int64).reshape(-1, len(Segment._fields))
        columns = [np.ascontiguousarray(column) for column in rows.T]
        blocks = -(-columns[-1] // BLOCK_NUMEL)
        columns.append(np.cumsum(blocks) - blocks)
        return cls(each, *columns)

    def select(self, chosen: npt.NDArray[np.bool_]) -> list[Segment]:
        """Return the segments of chosen parameters.

        Args:
            chosen: (num parameters,) bool.
        """
        return [self.each[row] for row in np.flatnonzero(chosen[self.positions]).tolist()]


def rounding_places(
    items: Sequence[NewParameter], segments: ShardSegments
) -> npt.NDArray[np.int64]:
    """Return `BucketState.places` of parameters with state in low precision.

    Args:
        items: the parameters of one bucket.
        segments: the parts of these parameters in this rank's shard.
    """
    places = np.zeros((len(items), at.NUM_COLUMNS), dtype=np.int64)
    for position, item in enumerate(items):
        # DistributedDataParallel adds a prefix, which must not change the random bits.
        name = bare_name(item.name).removeprefix("module.")
        places[position, at.KEY] = at.name_key(name).astype(np.int64)
        places[position, [at.FIRST, at.RUN, at.PITCH]] = element_index(item.parameter)
    # A parameter has at most one segment in a shard.
    places[segments.positions, at.LOCAL_START] = segments.parameter_starts
    return places


@dataclass(frozen=True, eq=False)
class BucketState:
    """One rank's part of one bucket.

    plan: where and how it is stored. `plan.pinned` is False if pinning was planned but failed.
    rank: this rank's index among the ranks that share the bucket.
    parameters, names: in the order of the layout's placements.
    indices: (num parameters,) int64, index of each parameter in the optimizer.
    groups: (num parameters,) int64, index of each parameter's hyperparameters in
        `StepInputs.hyperparameters`.
    flat: (numel,) all parameters of the bucket, on their device, in their dtype.
    shard: (shard_numel,) view of this rank's part of `flat`.
    planes: master weights, moments and gradient shard, each (shard_numel,).
    step_counts: (num parameters,) float32 on the host, number of updates, as in torch.
    scales: (num parameters,) float64 on the host, see `memory.codes`: 0 before the first update,
        then in [1, 2). None for state without codes.
    centralized: (num parameters,) bool, whether the mean over all dimensions but the first is
        subtracted from a parameter's gradients.
    segments: the parts of parameters in this rank's shard.
    places: (num parameters, NUM_COLUMNS) int64, see `kernels.adam.update`, but without the columns
        that depend on the step: the key is `name_key`, scale and shift are 0. None for fp32 state.
    counted: this rank adds its shard to global sums. False if other ranks have the same elements,
        and one of them adds these.
    local_shard: how FSDP2 or tensor parallelism has sharded the first of the bucket's parameters,
        and in what matters here all of them; None if no parameter of the optimizer is sharded.

    Lifecycle: constructed once. Tensors are modified in place and never replaced.
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
    scales: torch.Tensor | None
    centralized: npt.NDArray[np.bool_]
    segments: ShardSegments
    places: npt.NDArray[np.int64] | None
    counted: bool
    local_shard: LocalShard | None = None

    @property
    def layout(self) -> Bucket:
        """The bucket's size and the placement of its parameters."""
        return self.plan.bucket

    @property
    def own_master(self) -> bool:
        """Whether the parameters are their own master weights, or the high halves of them."""
        return self.plan.state.master_weight == 0

    @property
    def state_format(self) -> StateFormat:
        """The format of the state."""
        return self.layout.state_format

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
        """The device of the bucket's parameters."""
        return self.flat.device
