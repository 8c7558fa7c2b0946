"""Build the state of new parameters: plan, buckets, planes. One bucket at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.coordinator.node_memory import admit_memory
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.budget import copy_room_nbytes, plane_nbytes
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import StatePlan, StatePolicy, plan_state
from offload_adam.memory.arena import HostArena, Touch, arena_nbytes
from offload_adam.memory.pinning import CudaRuntime
from offload_adam.memory.planes import DeviceMemory, allocate_planes
from offload_adam.parameters.buckets import adopt
from offload_adam.parameters.selection import NewParameter
from offload_adam.step.bucket_state import BucketState, segment_arrays


@dataclass(frozen=True, slots=True)
class Placing:
    """How the state of an optimizer's parameters is made.

    policy: decides where each bucket's state is stored, and in which formats.
    is_device: tells devices from host memory.
    runtime: page-locks host memory; None where nothing is to be.
    checkpoint_room_nbytes: host memory, at most, for copies that a checkpoint in the background
        makes of what is updated before it is written.
    allow_overcommit: take memory that the node does not seem to have.
    """

    policy: StatePolicy
    is_device: Callable[[torch.device], bool]
    runtime: CudaRuntime | None = None
    checkpoint_room_nbytes: int = 0
    allow_overcommit: bool = False

    def share_of(self, ranks: RankGroup) -> tuple[int, int]:
        """Return this rank's place among those that a bucket's state is divided over."""
        return (0, 1) if self.policy.replicated else (ranks.rank, ranks.world_size)

    def spec_of(self, item: NewParameter) -> ParameterSpec:
        """Return a parameter as the layout sees it."""
        return ParameterSpec(
            item.index,
            item.parameter.numel(),
            item.parameter.element_size(),
            item.family,
            amsgrad=item.amsgrad,
            on_device=self.is_device(item.parameter.device),
        )


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
    ranks: RankGroup,
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
    plans = plan_state(list(map(placing.spec_of, new)), placing.policy, first_index=first_bucket)
    parts: list[int] = []
    needed: Counter[str] = Counter()
    for plan in plans:
        if plan.location.is_host:
            of_planes = plane_nbytes(plan)
            parts += of_planes.values()
            needed.update(of_planes)
    if placing.policy.replicated and ranks.rank != 0:
        room_nbytes = 0  # rank 0 writes what all have whole
    room_nbytes = copy_room_nbytes(plans, room_nbytes)
    if room_nbytes > 0:
        needed["checkpoint room"] = room_nbytes
    admit_memory(ranks, needed, allow_overcommit=placing.allow_overcommit)
    with raise_on_all_ranks(ranks, "allocating its state"):
        arena = HostArena(arena_nbytes(parts), parts=parts, touch=touch)
        room = HostArena(room_nbytes)
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
    return Built(states, arena, room)


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
