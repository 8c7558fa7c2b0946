"""Build the state of new parameters: layout, device buckets, host planes. One bucket at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch

from offload_adam.coordinator.admission import together
from offload_adam.coordinator.membership import Membership
from offload_adam.coordinator.node_memory import admit_memory
from offload_adam.layout.budget import BucketPlanes, copy_room_nbytes, plane_nbytes
from offload_adam.layout.flat import Bucket, ParameterSpec, plan_buckets
from offload_adam.layout.placing import kept_on_device
from offload_adam.memory.arena import HostArena, Touch, arena_nbytes
from offload_adam.memory.pinning import CudaRuntime
from offload_adam.memory.planes import DeviceMemory, allocate_planes
from offload_adam.options import Pin
from offload_adam.parameters.buckets import adopt
from offload_adam.parameters.gradients import GradientReader
from offload_adam.parameters.selection import NewParameter
from offload_adam.step.bucket_state import BucketState, segment_arrays

LandedDtype = Callable[[torch.dtype, bool], torch.dtype | None]


@dataclass(frozen=True, slots=True)
class Placing:
    """Where state goes and what it holds.

    pin, runtime: what is page-locked, and by what; nothing where there is no runtime.
    landed_dtype: the dtype in which a bucket's gradients land, from its dtype and whether they have
        a place to land in any case; None where they are read in place.
    offload_fraction: of the elements on a device that have their state on the host; the others'
        shards of it stay on the device.
    beside: state lies beside its parameter, whole on every rank, instead of sharded on the host.
    takes_rows: gradients may be sparse.
    checkpoint_room_nbytes: host memory, at most, for copies that a checkpoint in the background
        makes of what is updated before it is written.
    allow_overcommit: take memory that the node does not seem to have.
    force_offload, force_device: treat parameters in host memory as if they were on a device, their
        state on the host or beside them, for tests of those paths.
    """

    bucket_nbytes: int
    landed_dtype: LandedDtype
    pin: Pin = "all"
    runtime: CudaRuntime | None = None
    offload_fraction: float = 1.0
    beside: bool = False
    takes_rows: bool = False
    checkpoint_room_nbytes: int = 0
    allow_overcommit: bool = False
    force_offload: bool = False
    force_device: bool = False

    def share_of(self, membership: Membership) -> tuple[int, int]:
        """Return this rank's place among those that a bucket's state is divided over."""
        return (0, 1) if self.beside else (membership.rank, membership.world_size)


class Built(NamedTuple):
    """What parameters that are taken in get.

    arena: the memory that the states lie in.
    room: for copies of them; it has no bytes where nothing is copied.
    """

    states: list[BucketState]
    arena: HostArena
    room: HostArena


def build_states(
    new: Sequence[NewParameter],
    membership: Membership,
    placing: Placing,
    first_bucket: int,
    touch: Touch | None,
    *,
    room_nbytes: int = 0,
) -> Built:
    """Take parameters in: their buckets' states, and the memory for these.

    Every host byte is mapped first, so that a model that does not fit changes nothing; then
    parameters move one bucket at a time. Rank 0's values become every rank's, as
    DistributedDataParallel does.

    Args:
        touch: see `HostArena`.
        room_nbytes: for copies, at most; no more is taken than these states could fill.
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
    homes = _homes(buckets, members, placing)
    planes = [
        _planes_of(items[0], home, placing) for items, home in zip(members, homes, strict=True)
    ]
    parts: list[int] = []
    needed: Counter[str] = Counter()
    for bucket, plane, home in zip(buckets, planes, homes, strict=True):
        if home.hosted:
            of_planes = plane_nbytes(bucket, plane)
            parts += of_planes.values()
            needed.update(of_planes)
    if placing.beside and membership.rank != 0:
        room_nbytes = 0  # rank 0 writes what all have whole
    room_nbytes = copy_room_nbytes(buckets, planes, room_nbytes)
    if room_nbytes > 0:
        needed["checkpoint room"] = room_nbytes
    admit_memory(membership, needed, allow_overcommit=placing.allow_overcommit)
    arena, room = together(
        membership,
        "allocating its state",
        lambda: (
            HostArena(arena_nbytes(parts), parts=parts, touch=touch),
            HostArena(room_nbytes),
        ),
    )
    if placing.pin == "all" and placing.runtime is not None:
        arena.pin_or_warn(
            placing.runtime,
            "State stays pageable and is copied through pinned buffers, which is slower: lift the "
            "limit, or pass pin='staging' (memory.pin: staging)",
        )
    states = [
        _build(bucket, items, plane, home, arena, membership, placing)
        for bucket, items, plane, home in zip(buckets, members, planes, homes, strict=True)
    ]
    return Built(states, arena, room)


class _Home(Enum):
    """Where the state of one bucket lies, and where its parameters do."""

    HOST = "both on the host"
    OFFLOADED = "parameters on a device, state on the host"
    KEPT = "both on a device, the state sharded"
    BESIDE = "both on a device, the state whole"

    @property
    def hosted(self) -> bool:
        return self in (_Home.HOST, _Home.OFFLOADED)

    @property
    def lands(self) -> bool:
        """Whether gradients have a plane of their own even where nobody averages them."""
        return self in (_Home.OFFLOADED, _Home.KEPT)


def _homes(
    buckets: Sequence[Bucket], members: Sequence[Sequence[NewParameter]], placing: Placing
) -> list[_Home]:
    """Return the home of each bucket."""
    forced = placing.force_device if placing.beside else placing.force_offload
    on_device = {
        bucket.index
        for bucket, items in zip(buckets, members, strict=True)
        if items[0].parameter.device.type != "cpu" or forced
    }
    kept = kept_on_device(buckets, on_device, placing.offload_fraction)
    homes = []
    for bucket in buckets:
        if bucket.index not in on_device:
            homes.append(_Home.HOST)
        elif placing.beside:
            homes.append(_Home.BESIDE)
        else:
            homes.append(_Home.KEPT if bucket.index in kept else _Home.OFFLOADED)
    return homes


def _planes_of(item: NewParameter, home: _Home, placing: Placing) -> BucketPlanes:
    """Return which planes a bucket of such parameters needs."""
    landed = placing.landed_dtype(item.parameter.dtype, home.lands)
    return BucketPlanes(
        own_master=item.parameter.dtype == torch.float32 and home is not _Home.OFFLOADED,
        amsgrad=item.amsgrad,
        landed_itemsize=0 if landed is None else landed.itemsize,
    )


def _build(
    bucket: Bucket,
    items: Sequence[NewParameter],
    planes: BucketPlanes,
    home: _Home,
    arena: HostArena,
    membership: Membership,
    placing: Placing,
) -> BucketState:
    """Adopt one bucket's parameters and fill its master weights from them."""
    parameters = [item.parameter for item in items]
    names = [item.name for item in items]
    flat = adopt(bucket, parameters)
    if bucket.numel > 0:
        membership.broadcast_data(flat)
    rank, _ = placing.share_of(membership)
    low, high = bucket.shard_bounds(rank)
    shard = flat[low:high]
    state_planes = allocate_planes(
        bucket,
        planes,
        arena if home.hosted else DeviceMemory(flat.device),
        own_master=shard if planes.own_master else None,
        landed_dtype=placing.landed_dtype(flat.dtype, home.lands),
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
        step_counts=torch.zeros(len(items), dtype=torch.float32, device="cpu"),
        own_master=planes.own_master,
        offloaded=home is _Home.OFFLOADED,
        hosted=home.hosted,
        pinned=home.hosted and arena.pinned_nbytes > 0,
        centralized=np.array([item.centralized for item in items], dtype=np.bool_),
        segments=segment_arrays(bucket, rank),
        reader=GradientReader(
            names, parameters, takes_rows=placing.takes_rows and not planes.amsgrad
        ),
    )
