"""The bytes that a run needs on each rank, from the layout that the optimizer itself would use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload_adam.kept.budget import kept_sizes, payload_nbytes
from offload_adam.layout.budget import (
    CHECKPOINT_BLOCK_NBYTES,
    NUM_FOLD_BUFFERS,
    NUM_FOLDS_IN_FLIGHT,
    NUM_REDUCE_SLOTS,
    NUM_SLOTS_IN_FLIGHT,
    NUM_STAGING_SLOTS,
    Category,
    accumulator_nbytes,
    block_sums_nbytes,
    packed_nbytes,
    plane_nbytes,
    snapshot_buffer_nbytes,
)
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.schedule import ring_nbytes
from offload_adam.layout.state_plan import StatePlan
from offload_adam.plan.inputs import Training


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes of one rank by category.

    Activations and the memory of CUDA itself are included if the training has a shape.

    num_buckets: number of all-gathers in a step, and of reductions.
    """

    host: Mapping[str, int]
    device: Mapping[str, int]
    num_buckets: int

    @property
    def host_nbytes(self) -> int:
        """Return the host bytes of one rank."""
        return sum(self.host.values())

    @property
    def device_nbytes(self) -> int:
        """Return the device bytes of one rank."""
        return sum(self.device.values())


def predict(specs: Sequence[ParameterSpec], training: Training) -> Prediction:
    """Return the bytes of a rank, without allocating them.

    State is exact: the optimizer uses the same layout. Gradients, and slots that are allocated from
    a pool, are estimates, because they depend on how fast buckets are reduced and copied.
    """
    plans = training.plan(specs)
    buckets = [plan.bucket for plan in plans]
    host: Counter[str] = Counter()
    device: Counter[str] = Counter()
    side = device if training.on_device else host
    side[Category.PARAMETERS] = sum(bucket.numel * bucket.itemsize for bucket in buckets)
    side[Category.GRADIENTS] = _gradients(plans, training)
    sums_later = training.policy.accumulates_later
    for plan in plans:
        place = host if plan.location.is_host else device
        place.update(plane_nbytes(plan))
        if sums_later:
            place[Category.ACCUMULATORS] += accumulator_nbytes(plan)
    host[Category.BLOCK_SUMS] = block_sums_nbytes([p.bucket for p in plans if p.location.is_host])
    side[Category.SLOTS] = _slots(plans, training)
    host[Category.STAGING] = ring_nbytes(
        [plan for plan in reversed(plans) if plan.stages_parameters],
        lambda plan: plan.bucket.shard_numel * plan.bucket.itemsize,
        num_slots=NUM_STAGING_SLOTS,
    )
    # Gradients that the host casts or adds, or whose shard is not pinned, go through buffers, which
    # fit the largest bucket of their key.
    largest: Counter[str] = Counter()
    for plan in plans:
        if plan.is_offloaded and not plan.copies_directly:
            key, nbytes = plan.bucket.bucket_key, plan.bucket.shard_numel * plan.gradient.itemsize
            largest[key] = max(largest[key], nbytes)
    host[Category.STAGING] += NUM_FOLD_BUFFERS * largest.total()
    host[Category.SNAPSHOT_BUFFER] = snapshot_buffer_nbytes(
        plans, training.offload.snapshot_buffer_nbytes
    )
    if training.policy.keeps:
        host[Category.KEPT_RECORDS] = _kept_records(specs, plans, training)
    if training.on_device and training.saves:
        # Parameters on a device are written through a buffer; host memory is written in place.
        host[Category.CHECKPOINT_WRITER] = CHECKPOINT_BLOCK_NBYTES
    gathering = device if training.uses_device else host
    gathering[Category.GATHERED] += training.gathered_nbytes
    gathering[Category.ACTIVATIONS] += training.activation_nbytes
    gathering[Category.CONTEXT] += training.context_nbytes
    side[Category.FROZEN] += training.frozen_nbytes
    return Prediction(dict(+host), dict(+device), len(plans))


def _kept_records(
    specs: Sequence[ParameterSpec], plans: Sequence[StatePlan], training: Training
) -> int:
    """Return the bytes that the file of kept state has for records and the undo log."""
    in_file = sum(
        sum(plane_nbytes(plan).values())
        + plan.keeps_parameters * plan.bucket.numel * plan.bucket.itemsize
        for plan in plans
    )
    return kept_sizes(len(specs), payload_nbytes(training.buffers_nbytes), in_file).overhead_nbytes


def _gradients(plans: Sequence[StatePlan], training: Training) -> int:
    """Return the bytes of `.grad` at its peak.

    Gradients that are read in place, or averaged by another library, stay until the update. Others
    are freed during backward, bucket by bucket.
    """
    later = training.policy.accumulates_later
    freed = training.policy.streams
    sizes = [plan.bucket.numel * plan.bucket.itemsize for plan in plans]
    have_shards = all(plan.gradient.shard_itemsize > 0 for plan in plans)
    if not (freed and have_shards):
        return sum(sizes)
    # One bucket is being computed. Without packing, `.grad` lives until the host has its copy. In a
    # further backward of a step, one rank does not pack.
    packs = [plan.packs and not (later and not plan.gradient.averaged) for plan in plans]
    waits = any(p.is_offloaded and not packed for p, packed in zip(plans, packs, strict=True))
    num_buckets = NUM_FOLDS_IN_FLIGHT + 2 if waits else 1
    return min(sum(sizes), num_buckets * max(sizes, default=0))


def _slots(plans: Sequence[StatePlan], training: Training) -> int:
    """Return the bytes of the slots in which gradients are packed: rings, a pool, small ones."""
    in_ring = [plan for plan in plans if plan.uses_ring]
    rings = ring_nbytes(in_ring, _slot_nbytes, num_slots=NUM_REDUCE_SLOTS)
    # Gradients that are added to those of an earlier backward never use a ring.
    later = training.policy.accumulates_later
    pooled = [plan for plan in plans if plan.gradient.averaged and (later or not plan.uses_ring)]
    # Buckets that the host casts or accumulates may all have a slot: none waits for a free one.
    num_folded = sum(plan.is_offloaded for plan in pooled)
    in_flight = num_folded + min(len(pooled) - num_folded, NUM_SLOTS_IN_FLIGHT)
    of_pool = in_flight * max(map(_slot_nbytes, pooled), default=0)
    return rings + of_pool + max(map(packed_nbytes, plans), default=0)


def _slot_nbytes(plan: StatePlan) -> int:
    return plan.bucket.numel * plan.gradient.itemsize
