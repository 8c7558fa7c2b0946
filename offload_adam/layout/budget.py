"""Bytes that a layout's optimizer state takes and moves, computed before it is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from offload_adam.layout.flat import Bucket, align, blocks_of
from offload_adam.layout.state_plan import StatePlan

BLOCK_SUM_NBYTES = 8  # float64
NUM_STAGING_SLOTS = 2
"""Host slots for updated parameters: the kernel writes one while the other is copied."""

NUM_FOLD_BUFFERS = 2
"""Host buffers for gradients that are cast or added: a copy fills one while the host reads one."""

NUM_REDUCE_SLOTS = 3
"""Slots on a device for gradients: one is packed, one averaged, and one is copied to the host."""

NUM_SLOTS_IN_FLIGHT = 2
"""Slots of a pool that are in use at once: one is packed while another is averaged.

This is exact if a device accumulates the averages. If the host does, more slots may be in use: how
many depends on the speed of the host and of the other ranks.
"""

NUM_FOLDS_IN_FLIGHT = 3
"""With one rank: buckets that the host may still have to cast or add. With more, backward waits."""

SMALL_NBYTES = 256 * 1024
"""Size of a gradient up to which it is packed with its neighbours before the D2H copy.

The host takes about 10 us to issue a copy, in which a bus of 25 to 50 GB/s copies 256 to 512 KB: it
would wait for the host between smaller copies. To pack 256 KiB, the device's memory reads and
writes them in 0.3 us at 2 TB/s. Larger gradients would gain nothing.
"""

MOST_PACKED_NBYTES = 8 * 1024 * 1024
"""Limit of the slot for packed gradients. If they need more, it is filled and copied several times.

The bus waits for less than 20 us while a kernel fills the slot, and then copies for 160 us or more.
"""

ALIGNMENT_NBYTES = 128
"""Tensors in host memory start at multiples of this, so that no vector load crosses a cache line.

The bytes of a shard are such a multiple for every dtype, because a shard has whole blocks of 128
elements.
"""

CHECKPOINT_BLOCK_NBYTES = 4 * 1024 * 1024
"""Bytes of a checkpoint's file that share one checksum, so that a part can be verified alone."""


class Category:
    """The purpose of memory, in the ledger, the plan and reports.

    For a single plane of state, torch's key is used instead, such as "exp_avg". Plain strings
    instead of an enum, because users see them as keys.
    """

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    GRADIENT_SHARDS = "gradient shards"
    ACCUMULATORS = "accumulated gradients"  # sums of several backwards, taken at the first of them
    STATE = "state"  # all planes in host memory together
    SLOTS = "slots"  # into which gradients are packed, and in which they are averaged
    STAGING = "staging"  # buffers of copies between host and device
    BLOCK_SUMS = "block_sums"
    PREPARED = "prepared"  # centralized and sparse gradients in the kernel's form
    KEPT_RECORDS = "kept records"  # of steps, for a process that completes the last one
    SNAPSHOT_BUFFER = "snapshot buffer"  # copies for a checkpoint in the background
    CHECKPOINT_WRITER = "checkpoint writer"
    GATHERED = "gathered by FSDP2"  # layers, and gradients that it averages
    FROZEN = "frozen parameters"
    ACTIVATIONS = "activations"
    CONTEXT = "CUDA context"


def plane_nbytes(plan: StatePlan) -> dict[str, int]:
    """Return the bytes of each plane of one rank's shard of one bucket, gradients included.

    Each plane has whole blocks, so that planes in one arena stay aligned. Exponents are few.
    """
    state = plan.state
    numel = plan.bucket.shard_numel
    nbytes = {
        "master_weight": numel * state.master_weight,
        "master_remainder": numel * state.master_remainder,
        "exp_avg": numel * state.exp_avg,
        "exp_avg_sq": numel * state.exp_avg_sq,
        "max_exp_avg_sq": numel * state.max_exp_avg_sq,
        "exponents": blocks_of(numel) * state.exponents,
        Category.GRADIENT_SHARDS: numel * plan.gradient.shard_itemsize,
    }
    return {name: size for name, size in nbytes.items() if size}


def packed_nbytes(plan: StatePlan) -> int:
    """Return the bytes of the slot in which small gradients are packed before their D2H copy.

    All buckets of a device share one slot. It is 0 for a bucket without neighbours to pack, and for
    one that is averaged, of which a single piece is copied.
    """
    if not plan.is_offloaded or plan.gradient.averaged:
        return 0
    itemsize = plan.gradient.itemsize
    sizes = [align(placed.numel) * itemsize for placed in plan.bucket.placements]
    small = [size for size in sizes if 0 < size <= SMALL_NBYTES]
    return min(sum(small), MOST_PACKED_NBYTES) if len(small) > 1 else 0


def accumulator_nbytes(plan: StatePlan) -> int:
    """Return the bytes that sums of several backwards take besides one rank's gradient shard."""
    return plan.bucket.shard_numel * plan.accumulator_itemsize


def saved_nbytes(plan: StatePlan) -> int:
    """Return the bytes of one rank's shard of one bucket in a checkpoint.

    They are its parameters and planes of state, including padding.
    """
    return plan.bucket.shard_numel * (plan.bucket.itemsize + plan.state.saved)


def snapshot_buffer_nbytes(plans: Sequence[StatePlan], limit_nbytes: int) -> int:
    """Return the bytes of one rank's snapshot buffer.

    It is the size of copies of these buckets, or the limit rounded down to a multiple of 128.
    """
    nbytes = sum(map(saved_nbytes, plans))
    return min(nbytes, limit_nbytes // ALIGNMENT_NBYTES * ALIGNMENT_NBYTES)


def traffic_nbytes(plan: StatePlan) -> int:
    """Return the bytes that the norm and the update of one rank's shard of a bucket read and write.

    Both read the gradient. The update reads and writes each plane of state. It also reads and
    writes a parameter that is its own master weight, or the high half of it. Any other parameter is
    only written.
    """
    return update_traffic_nbytes(plan) + plan.bucket.shard_numel * _gradient_itemsize(plan)


def update_traffic_nbytes(plan: StatePlan) -> int:
    """Return the bytes that the update alone reads and writes."""
    bucket, state = plan.bucket, plan.state
    own_master = 0 if state.master_weight else bucket.itemsize
    param_out = bucket.itemsize if plan.writes_parameters else 0
    itemsize = _gradient_itemsize(plan) + 2 * own_master + param_out
    return bucket.shard_numel * itemsize + 2 * state.nbytes_of(bucket.shard_numel)


def exchange_traffic_nbytes(plan: StatePlan) -> int:
    """Return the bytes that one rank reads and writes in host memory to average a bucket.

    All gradients are packed into a slot in the dtype of the average, and this rank's shard of the
    result is copied. The collective itself is not counted.
    """
    bucket, itemsize = plan.bucket, plan.gradient.itemsize
    return bucket.numel * (bucket.itemsize + itemsize) + bucket.shard_numel * 2 * itemsize


def _gradient_itemsize(plan: StatePlan) -> int:
    """Return the bytes of an element of the gradient that the update reads."""
    return plan.gradient.shard_itemsize or plan.bucket.itemsize


def block_sums_nbytes(buckets: Sequence[Bucket]) -> int:
    """Return the bytes of the array of block sums that all buckets share."""
    return max((bucket.num_sums for bucket in buckets), default=0) * BLOCK_SUM_NBYTES
