"""Build the state of new parameters: plan their buckets, allocate arenas and cut planes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch

from offload_adam.coordinator.node_memory import check_node_memory
from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.fsdp_private import placement_of
from offload_adam.kept.budget import kept_sizes
from offload_adam.layout.budget import (
    NUM_REDUCE_SLOTS,
    NUM_STAGING_SLOTS,
    Category,
    plane_nbytes,
    snapshot_buffer_nbytes,
)
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import StatePlan, StatePolicy, plan_state
from offload_adam.memory.arena import HostArena, Touch, arena_nbytes
from offload_adam.memory.pinning import CudaRuntime, cuda_runtime
from offload_adam.memory.planes import allocate_planes
from offload_adam.options import CODED_FORMATS, OffloadPolicy
from offload_adam.params.bucket import (
    BucketState,
    ShardSegments,
    flatten_parameters,
    rounding_places,
)
from offload_adam.params.selection import NewParameter
from offload_adam.step.kept_steps import KeptSteps
from offload_adam.step.update_pipeline import Worker
from offload_adam.step.update_thread import UpdateThread
from offload_adam.transfer.collectives import Collectives
from offload_adam.transfer.streams import Streams, streams_for
from offload_adam.version import __version__


def is_device(device: torch.device) -> bool:
    """Return whether tensors on this device are outside of host memory."""
    return device.type != "cpu"


def empty_cache(device: torch.device) -> None:
    """Return the unused blocks of torch's allocator on a device to the driver."""
    if device.type == "cuda":
        # torch.cuda.empty_cache() creates a context on the current device, which may be another.
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Backend:
    """Factories for devices, threads and collectives; tests replace them with simulated ones."""

    is_device: Callable[[torch.device], bool] = is_device
    make_runtime: Callable[[torch.device], CudaRuntime | None] = cuda_runtime
    empty_cache: Callable[[torch.device], None] = empty_cache
    make_streams: Callable[[torch.device], Streams] = streams_for
    make_collectives: Callable[[RankGroup], Collectives] = Collectives
    make_workers: Callable[[], tuple[Worker, Worker]] = UpdateThread.pair
    num_reduce_slots: int = NUM_REDUCE_SLOTS
    num_staging_slots: int = NUM_STAGING_SLOTS


@dataclass(frozen=True, slots=True)
class Storage:
    """Where and how an optimizer's state is stored.

    policy: decides the location and the formats of each bucket.
    backend: devices, threads and collectives.
    runtime: page-locks host memory; None to page-lock nothing.
    offload: the user's options for memory.
    payload_nbytes: maximum bytes of `StepInputs.payload`.
    kind, model: describe the optimizer and what is kept of the model: kept state of others is not
        adopted.
    """

    policy: StatePolicy
    backend: Backend = Backend()
    runtime: CudaRuntime | None = None
    offload: OffloadPolicy = OffloadPolicy()
    payload_nbytes: int = 0
    kind: str = ""
    model: str = ""

    def make_buffer(self, arenas: list[HostArena], nbytes: int) -> HostArena:
        """Allocate host memory for copies, page-locked if the policy says so, and append it.

        Args:
            arenas: the list to append to; its owner closes the arenas.
        """
        arena = HostArena(nbytes)
        if self.policy.pins_staging and self.runtime is not None:
            arena.pin_or_warn(
                self.runtime,
                "Copies through this buffer use pageable memory, which is slower. Raise the limit, "
                "or pass pin='none' (memory.pin: none).",
            )
        arenas.append(arena)
        return arena

    def partition_of(self, ranks: RankGroup) -> tuple[int, int]:
        """Return this rank's index among the ranks that shard the state, and their number."""
        return (0, 1) if self.policy.num_shards == 1 else (ranks.rank, ranks.world_size)

    def spec_of(self, item: NewParameter) -> ParameterSpec:
        """Return the sizes of a parameter, from which the layout plans its bucket."""
        return ParameterSpec(
            item.index,
            item.local.numel(),
            item.local.element_size(),
            item.bucket_key,
            amsgrad=item.amsgrad,
            on_device=self.backend.is_device(item.local.device),
            unit=item.unit,
            padded_numel=0 if item.shard is None else item.shard.padded_numel,
            num_shards=0 if item.shard is None else len(item.shard.replicas),
            state_format=item.state_format,
            is_bfloat16=item.parameter.dtype == torch.bfloat16,
        )


class Built(NamedTuple):
    """Result of `build_states`.

    states: one for each bucket.
    arena: the host memory of the states.
    snapshot_buffer: host memory for a checkpoint's copies of the states; empty if not wanted.
    kept: the file that `arena` is in, None if the state does not outlive the process.
    """

    states: list[BucketState]
    arena: HostArena
    snapshot_buffer: HostArena
    kept: KeptSteps | None


def build_states(
    new: Sequence[NewParameter],
    ranks: RankGroup,
    storage: Storage,
    first_bucket: int,
    touch: Touch | None,
    *,
    kept_files: list[KeptSteps],
    buffer_nbytes: int = 0,
) -> Built:
    """Put parameters into buckets, and allocate and fill the buckets' state. Collective.

    Broadcasts the parameters of rank 0 to all ranks, as DistributedDataParallel does, but not those
    that are sharded.

    Args:
        first_bucket: index of the first new bucket.
        touch: see `HostArena`.
        kept_files: receives what the owner of the list closes, also after an error here.
        buffer_nbytes: maximum bytes of the snapshot buffer.

    Raises:
        HostMemoryError: host memory is short, on any rank; the parameters are unchanged.
    """
    plans = plan_state(list(map(storage.spec_of, new)), storage.policy, first_index=first_bucket)
    parts: list[int] = []
    needed: Counter[str] = Counter()
    for plan in plans:
        if plan.location.is_host:
            if plan.keeps_parameters:
                parts.append(plan.bucket.numel * plan.bucket.itemsize)
            of_planes = plane_nbytes(plan)
            parts += of_planes.values()
            needed.update(of_planes)
    by_index = {item.index: item for item in new}
    # A rank does not write state of which another one has a copy.
    written = [
        plan
        for plan in plans
        if _is_counted(by_index[plan.bucket.placements[0].parameter], ranks, storage.policy)
    ]
    buffer_nbytes = snapshot_buffer_nbytes(written, buffer_nbytes)
    if buffer_nbytes > 0:
        needed[Category.SNAPSHOT_BUFFER] = buffer_nbytes
    kept: KeptSteps | None = None
    if storage.policy.keeps:
        identity = _identity_of(plans, new, ranks, storage)
        sizes = kept_sizes(len(new), storage.payload_nbytes, arena_nbytes(parts))
        kept = KeptSteps(ranks, storage.offload, identity, sizes)
        kept_files.append(kept)
        kept.find()  # an older file that cannot be used is deleted before memory is checked
        needed[Category.KEPT_RECORDS] = sizes.overhead_nbytes
        if kept.adopted:  # the file is in memory already
            needed = Counter({Category.SNAPSHOT_BUFFER: buffer_nbytes})
    check_node_memory(ranks, needed, allow_overcommit=storage.offload.allow_overcommit)
    # Map and commit all host memory before the first parameter moves to a bucket: if memory is
    # short, no parameter has changed.
    with raise_on_all_ranks(ranks, "allocating its state"):
        if kept is None:
            arena = HostArena(arena_nbytes(parts), parts=parts, touch=touch)
        else:
            touch = None if kept.adopted else touch  # it writes zeros
            file = kept.open(reserves=touch is None)
            shared = file.mapping, file.arena_start
            arena = HostArena(arena_nbytes(parts), parts=parts, touch=touch, shared=shared)
        snapshot_buffer = HostArena(buffer_nbytes)
    if storage.policy.pins_state and storage.runtime is not None:
        arena.pin_or_warn(
            storage.runtime,
            "State stays pageable and is copied through pinned buffers, which is slower. Raise the "
            "limit, or pass pin='staging' (memory.pin: staging).",
        )
    if arena.pinned_nbytes == 0:  # not asked for, or failed: the plan must not rely on it
        plans = tuple(replace(plan, pinned=False) for plan in plans)
    states = []
    for plan in plans:
        items = [by_index[placed.parameter] for placed in plan.bucket.placements]
        fills = kept is None or not kept.adopted
        states.append(_build(plan, items, arena, ranks, storage, fills=fills))
        if kept is not None and plan.keeps_parameters:
            flat = states[-1].flat
            kept.parameters.append((flat.data_ptr(), flat.nbytes))
    for device in dict.fromkeys(item.local.device for item in new):
        if storage.backend.is_device(device):
            # The parameters were copied into flat buckets. Few later tensors fit their old blocks
            # in torch's cache, so return these blocks to the driver.
            storage.backend.empty_cache(device)
    return Built(states, arena, snapshot_buffer, kept)


def _identity_of(
    plans: Sequence[StatePlan],
    new: Sequence[NewParameter],
    ranks: RankGroup,
    storage: Storage,
) -> dict[str, str]:
    """Return what must be the same for a later process to adopt this rank's state."""
    parameters = [
        (
            item.name,
            list(item.parameter.shape),
            str(item.local.dtype),
            item.group,
            placement_of(item.parameter),
        )
        for item in new
    ]
    layout = [(plan.bucket, plan.location.name, plan.state, plan.gradient) for plan in plans]
    return {
        "version": __version__,
        "optimizer": storage.kind,
        "buffers of the model": _digest(storage.model),
        "rank": f"{ranks.rank} of {ranks.world_size}",
        "parameters (names, shapes, groups)": _digest(parameters),
        "layout (dtypes, state_format, bucket_nbytes, devices)": _digest(layout),
    }


def _digest(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]


def _build(
    plan: StatePlan,
    items: Sequence[NewParameter],
    arena: HostArena,
    ranks: RankGroup,
    storage: Storage,
    *,
    fills: bool,
) -> BucketState:
    """Flatten one bucket's parameters and fill its master weights from them.

    Args:
        fills: False to leave what the arena holds.
    """
    bucket = plan.bucket
    parameters = [item.parameter for item in items]
    memory = None
    if plan.keeps_parameters:
        memory = arena.allocate(bucket.numel, items[0].local.dtype)
    flat = flatten_parameters(bucket, items, memory, copies=fills or memory is None)
    if fills and bucket.numel > 0 and items[0].is_the_same_on_all_ranks:
        ranks.broadcast_data(flat)
    rank, _ = storage.partition_of(ranks)
    if items[0].shard is not None:
        rank = items[0].shard.replicas.index(ranks.global_ranks[ranks.rank])
    low, high = bucket.shard_bounds(rank)
    shard = flat[low:high]
    segments = ShardSegments.of_shard(bucket, rank)
    return BucketState(
        plan=plan,
        rank=rank,
        parameters=parameters,
        names=[item.name for item in items],
        indices=np.array([item.index for item in items], dtype=np.int64),
        groups=np.array([item.group for item in items], dtype=np.int64),
        flat=flat,
        shard=shard,
        planes=allocate_planes(plan, arena, shard, fills=fills),
        step_counts=torch.zeros(len(items), dtype=torch.float32, device="cpu"),
        scales=(
            torch.zeros(len(items), dtype=torch.float64, device="cpu")
            if bucket.state_format in CODED_FORMATS
            else None
        ),
        centralized=np.array([item.centralized for item in items], dtype=np.bool_),
        segments=segments,
        places=rounding_places(items, segments) if bucket.state_format != "fp32" else None,
        counted=_is_counted(items[0], ranks, storage.policy),
        local_shard=items[0].shard,
    )


def _is_counted(item: NewParameter, ranks: RankGroup, policy: StatePolicy) -> bool:
    """Return whether this rank adds the elements of an item's bucket to global sums."""
    if item.shard is not None:
        return item.shard.counted
    return ranks.rank == 0 or not policy.replicated
