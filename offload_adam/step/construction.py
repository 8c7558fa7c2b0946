"""Build the state of new parameters: layout, device buckets, host planes. One bucket at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from offload_adam.coordinator.admission import together
from offload_adam.coordinator.membership import Membership
from offload_adam.coordinator.node_memory import admit_memory
from offload_adam.layout.budget import BucketPlanes, plane_nbytes
from offload_adam.layout.flat import Bucket, ParameterSpec, plan_buckets
from offload_adam.memory.arena import HostArena, Touch, arena_nbytes
from offload_adam.memory.pinning import CudaRuntime, Pin
from offload_adam.memory.planes import DeviceMemory, allocate_planes
from offload_adam.parameters.buckets import adopt
from offload_adam.parameters.gradients import GradientReader
from offload_adam.parameters.selection import NewParameter
from offload_adam.step.bucket_state import BucketState, segment_arrays
from offload_adam.transfer.collectives import PendingCollective

LandedDtype = Callable[[torch.dtype, bool], torch.dtype | None]


@dataclass(frozen=True, slots=True)
class Placing:
    """Where state goes and what it holds.

    pin, runtime: what is page-locked, and by what; nothing where there is no runtime.
    landed_dtype: the dtype in which a bucket's gradients land, from its dtype and whether it is
        offloaded; None where they are read in place.
    beside: state lies beside its parameter, whole on every rank, instead of sharded on the host.
    takes_rows: gradients may be sparse.
    allow_overcommit: take memory that the node does not seem to have.
    force_offload, force_device: treat parameters in host memory as if they were on a device, their
        state on the host or beside them, for tests of those paths.
    """

    bucket_nbytes: int
    landed_dtype: LandedDtype
    pin: Pin = "all"
    runtime: CudaRuntime | None = None
    beside: bool = False
    takes_rows: bool = False
    allow_overcommit: bool = False
    force_offload: bool = False
    force_device: bool = False

    def share_of(self, membership: Membership) -> tuple[int, int]:
        """Return this rank's place among those that a bucket's state is divided over."""
        return (0, 1) if self.beside else (membership.rank, membership.world_size)


def build_states(
    new: Sequence[NewParameter],
    membership: Membership,
    placing: Placing,
    first_bucket: int,
    touch: Touch | None,
) -> tuple[list[BucketState], HostArena]:
    """Take parameters in, and return their buckets' states and the memory these lie in.

    Every host byte is mapped first, so that a model that does not fit changes nothing; then
    parameters move one bucket at a time. Rank 0's values become every rank's, as
    DistributedDataParallel does.

    Args:
        touch: see `HostArena`.
    """
    buckets = plan_buckets(
        [
            ParameterSpec(n.index, n.parameter.numel(), n.parameter.element_size(), n.family)
            for n in new
        ],
        world_size=placing.share_of(membership)[1],
        bucket_nbytes=placing.bucket_nbytes,
        first_index=first_bucket,
    )
    by_index = {item.index: item for item in new}
    members = [[by_index[placed.parameter] for placed in bucket.placements] for bucket in buckets]
    planes = [_planes_of(items[0], placing) for items in members]
    hosted = [_hosted(items[0], placing) for items in members]
    parts: list[int] = []
    needed: Counter[str] = Counter()
    for bucket, plane, is_hosted in zip(buckets, planes, hosted, strict=True):
        if is_hosted:
            of_planes = plane_nbytes(bucket, plane)
            parts += of_planes.values()
            needed.update(of_planes)
    admit_memory(membership, needed, allow_overcommit=placing.allow_overcommit)
    arena = together(
        membership,
        "allocating its state",
        lambda: HostArena(arena_nbytes(parts), parts=parts, touch=touch),
    )
    if placing.pin == "all" and placing.runtime is not None:
        arena.pin_or_warn(
            placing.runtime,
            "State stays pageable and is copied through pinned buffers, which is slower: lift the "
            "limit, or pass pin='staging' (memory.pin: staging)",
        )
    states = [
        _build(bucket, items, plane, arena, membership, placing)
        for bucket, items, plane in zip(buckets, members, planes, strict=True)
    ]
    return states, arena


def _offloaded(item: NewParameter, placing: Placing) -> bool:
    on_device = item.parameter.device.type != "cpu" or placing.force_offload
    return on_device and not placing.beside


def _hosted(item: NewParameter, placing: Placing) -> bool:
    """Tell whether the state of such a parameter is in host memory."""
    on_device = item.parameter.device.type != "cpu" or placing.force_device
    return not (placing.beside and on_device)


def _planes_of(item: NewParameter, placing: Placing) -> BucketPlanes:
    """Return which planes a bucket of such parameters needs."""
    offloaded = _offloaded(item, placing)
    landed = placing.landed_dtype(item.parameter.dtype, offloaded)
    return BucketPlanes(
        own_master=item.parameter.dtype == torch.float32 and not offloaded,
        amsgrad=item.amsgrad,
        landed_itemsize=0 if landed is None else landed.itemsize,
    )


def _build(
    bucket: Bucket,
    items: Sequence[NewParameter],
    planes: BucketPlanes,
    arena: HostArena,
    membership: Membership,
    placing: Placing,
) -> BucketState:
    """Adopt one bucket's parameters and fill its master weights from them."""
    parameters = [item.parameter for item in items]
    names = [item.name for item in items]
    flat = adopt(bucket, parameters)
    if membership.world_size > 1 and bucket.numel > 0:
        group = membership.data_group(flat.device)
        work = dist.broadcast(flat, membership.global_ranks[0], group=group, async_op=True)
        PendingCollective(work, flat, flat).wait(membership)
    rank, _ = placing.share_of(membership)
    low, high = bucket.shard_bounds(rank)
    shard = flat[low:high]
    offloaded = _offloaded(items[0], placing)
    hosted = _hosted(items[0], placing)
    state_planes = allocate_planes(
        bucket,
        planes,
        arena if hosted else DeviceMemory(flat.device),
        own_master=shard if planes.own_master else None,
        landed_dtype=placing.landed_dtype(flat.dtype, offloaded),
    )
    if not planes.own_master:
        state_planes.master_weight.copy_(shard)
    return BucketState(
        layout=bucket,
        rank=rank,
        parameters=parameters,
        names=names,
        indices=np.array([item.index for item in items], dtype=np.int64),
        groups=np.array([item.group for item in items], dtype=np.int64),
        flat=flat,
        shard=shard,
        planes=state_planes,
        step_counts=torch.zeros(len(items), dtype=torch.float32),
        own_master=planes.own_master,
        offloaded=offloaded,
        hosted=hosted,
        pinned=hosted and arena.pinned_nbytes > 0,
        centralized=np.array([item.centralized for item in items], dtype=np.bool_),
        segments=segment_arrays(bucket, rank),
        reader=GradientReader(
            names, parameters, takes_rows=placing.takes_rows and not planes.amsgrad
        ),
    )
