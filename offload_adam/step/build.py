"""Build what an optimizer's buckets need: the backend, plans, planes, slots and the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.coordinator.node_memory import admit_memory
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.gradient_copy import GradientCopier
from offload_adam.layout.budget import (
    NUM_REDUCE_SLOTS,
    NUM_STAGING_SLOTS,
    plane_nbytes,
    snapshot_buffer_nbytes,
)
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.schedule import Schedule, plan_schedule
from offload_adam.layout.state_plan import StatePlan, StatePolicy, plan_state
from offload_adam.memory.arena import HostArena, Touch, arena_nbytes
from offload_adam.memory.pinning import CudaRuntime, cuda_runtime
from offload_adam.memory.planes import DeviceMemory, allocate_planes
from offload_adam.options import OffloadPolicy
from offload_adam.params.bucket import BucketState, adopt, segment_arrays
from offload_adam.params.selection import NewParameter
from offload_adam.step.executor import Worker
from offload_adam.step.reducer import GradientReduction
from offload_adam.step.update_thread import UpdateThread
from offload_adam.transfer.collectives import Collectives, GroupCollectives
from offload_adam.transfer.slots import Rings
from offload_adam.transfer.streams import Streams, StreamsByDevice, streams_for


def is_device(device: torch.device) -> bool:
    """Tell whether a tensor's device is another memory than the host's."""
    return device.type != "cpu"


@dataclass(frozen=True, slots=True)
class Backend:
    """How, and how many, each of them is made; tests put a simulated machine in its place."""

    is_device: Callable[[torch.device], bool] = is_device
    make_runtime: Callable[[], CudaRuntime | None] = cuda_runtime
    make_streams: Callable[[torch.device], Streams] = streams_for
    make_collectives: Callable[[RankGroup], Collectives] = GroupCollectives
    make_worker: Callable[[], Worker] = UpdateThread
    num_reduce_slots: int = NUM_REDUCE_SLOTS
    num_staging_slots: int = NUM_STAGING_SLOTS


@dataclass(frozen=True, slots=True)
class Placing:
    """How the state of an optimizer's parameters is made.

    policy: decides where each bucket's state is stored, and in which formats.
    is_device: tells devices from host memory.
    runtime: page-locks host memory; None where nothing is to be.
    offload: the user's options for memory.
    """

    policy: StatePolicy
    is_device: Callable[[torch.device], bool]
    runtime: CudaRuntime | None = None
    offload: OffloadPolicy = OffloadPolicy()

    def share_of(self, ranks: RankGroup) -> tuple[int, int]:
        """Return this rank's place among those that a bucket's state is divided over."""
        return (0, 1) if self.policy.replicated else (ranks.rank, ranks.world_size)

    def spec_of(self, item: NewParameter) -> ParameterSpec:
        """Return a parameter as the layout sees it."""
        return ParameterSpec(
            item.index,
            item.parameter.numel(),
            item.parameter.element_size(),
            item.bucket_key,
            amsgrad=item.amsgrad,
            on_device=self.is_device(item.parameter.device),
        )


class Built(NamedTuple):
    """Result of `build_states`: one BucketState per bucket, and the arenas behind them.

    arena: the memory that the states lie in.
    snapshot_buffer: for a checkpoint's copies of them; empty if no copies are allowed.
    """

    states: list[BucketState]
    arena: HostArena
    snapshot_buffer: HostArena


def build_states(
    new: Sequence[NewParameter],
    ranks: RankGroup,
    placing: Placing,
    first_bucket: int,
    touch: Touch | None,
    *,
    buffer_nbytes: int = 0,
) -> Built:
    """Take parameters in: their buckets' states, and the memory for these.

    Every host byte is mapped first, so that a model that does not fit changes nothing; then
    parameters move one bucket at a time. Rank 0's values become every rank's, as
    DistributedDataParallel does.

    Args:
        touch: see `HostArena`.
        buffer_nbytes: most bytes of the snapshot buffer, which is no larger than its content.
    """
    plans = plan_state(list(map(placing.spec_of, new)), placing.policy, first_index=first_bucket)
    parts: list[int] = []
    needed: Counter[str] = Counter()
    for plan in plans:
        if plan.location.is_host:
            of_planes = plane_nbytes(plan)
            parts += of_planes.values()
            needed.update(of_planes)
    if placing.policy.replicated and ranks.rank != 0:
        buffer_nbytes = 0  # rank 0 alone writes replicated state
    buffer_nbytes = snapshot_buffer_nbytes(plans, buffer_nbytes)
    if buffer_nbytes > 0:
        needed["snapshot buffer"] = buffer_nbytes
    admit_memory(ranks, needed, allow_overcommit=placing.offload.allow_overcommit)
    with raise_on_all_ranks(ranks, "allocating its state"):
        arena = HostArena(arena_nbytes(parts), parts=parts, touch=touch)
        snapshot_buffer = HostArena(buffer_nbytes)
    if placing.policy.pins_state and placing.runtime is not None:
        arena.pin_or_warn(
            placing.runtime,
            "State stays pageable and is copied through pinned buffers, which is slower: lift the "
            "limit, or pass pin='staging' (memory.pin: staging)",
        )
    if arena.pinned_nbytes == 0:
        plans = tuple(replace(plan, pinned=False) for plan in plans)
    by_index = {item.index: item for item in new}
    states = []
    for plan in plans:
        items = [by_index[placed.parameter] for placed in plan.bucket.placements]
        states.append(_build(plan, items, arena, ranks, placing))
    return Built(states, arena, snapshot_buffer)


def _build(
    plan: StatePlan,
    items: Sequence[NewParameter],
    arena: HostArena,
    ranks: RankGroup,
    placing: Placing,
) -> BucketState:
    """Adopt one bucket's parameters and fill its master weights from them."""
    bucket = plan.bucket
    parameters = [item.parameter for item in items]
    flat = adopt(bucket, parameters)
    if bucket.numel > 0:
        ranks.broadcast_data(flat)
    rank, _ = placing.share_of(ranks)
    low, high = bucket.shard_bounds(rank)
    shard = flat[low:high]
    memory = arena if plan.location.is_host else DeviceMemory(flat.device)
    return BucketState(
        plan=plan,
        rank=rank,
        parameters=parameters,
        names=[item.name for item in items],
        indices=np.array([item.index for item in items], dtype=np.int64),
        groups=np.array([item.group for item in items], dtype=np.int64),
        flat=flat,
        shard=shard,
        planes=allocate_planes(plan, memory, shard),
        step_counts=torch.zeros(len(items), dtype=torch.float32, device="cpu"),
        centralized=np.array([item.centralized for item in items], dtype=np.bool_),
        segments=segment_arrays(bucket, rank),
    )


class Routing:
    """Plans the schedule of an optimizer's buckets, and makes the slots and buffers for it.

    Owns: streams, rings and the buffers of the copier.
    Lifecycle: `plan` for every set of buckets, while nothing is under way.
    """

    def __init__(
        self,
        ranks: RankGroup,
        reduction: GradientReduction,
        backend: Backend,
        make_buffer: Callable[[int], HostArena],
    ) -> None:
        """Begin without buckets.

        Args:
            make_buffer: gives host memory of so many bytes, page-locked where that was asked for.
        """
        self.streams = StreamsByDevice(backend.make_streams)
        self.copier = GradientCopier(ranks, reduction.slots, make_arena=make_buffer)
        self.rings = Rings(
            make_buffer,
            num_staging=backend.num_staging_slots,
            num_reduction=backend.num_reduce_slots,
        )

    @property
    def host_nbytes(self) -> int:
        """Host bytes of slots and buffers."""
        return self.rings.staging_nbytes + self.copier.nbytes

    @property
    def slot_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots on devices."""
        return self.rings.reduction_nbytes

    def plan(self, states: Sequence[BucketState]) -> Schedule:
        """Return the schedule of all buckets, having allocated slots and buffers for them."""
        for state in states:
            self._reserve(state)
        return plan_schedule(
            [state.plan for state in states],
            num_reduce_slots=self.rings.num_reduction,
            num_staging_slots=self.rings.num_staging,
        )

    def _reserve(self, state: BucketState) -> None:
        bucket, key = state.layout, state.layout.bucket_key
        if state.plan.uses_ring:
            self.rings.fit_reduction(key, state.gradient_dtype, state.device, bucket.numel)
        elif state.plan.is_offloaded and not state.plan.copies_straight:
            self.copier.reserve(state, state.gradient_dtype)
        if state.plan.stages_parameters:
            self.rings.fit_staging(key, state.dtype, bucket.shard_numel)
