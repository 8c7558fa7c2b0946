"""How many bytes the optimizer state of a layout takes and moves, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from offload_adam.layout.flat import BLOCK_NUMEL, Bucket
from offload_adam.layout.state_plan import FLOAT32_NBYTES, StatePlan

BLOCK_SUM_NBYTES = 8

NUM_STAGING_SLOTS = 2
"""Host slots for updated parameters: the kernel writes one while the other is copied."""

NUM_FOLD_BUFFERS = 2
"""Host buffers for gradients that are cast or added: one is read while a copy fills the other."""

NUM_REDUCE_SLOTS = 3
"""Slots on a device for gradients: one is packed, one averaged, and one is copied to the host."""

NUM_SLOTS_IN_FLIGHT = 2
"""Slots of a pool that are in use at once: one is packed while another is averaged.

No more are where a device adds up what is averaged. Where the host does, a pool grows with its pace
and that of the ranks.
"""

NUM_FOLDS_IN_FLIGHT = 3
"""Buckets that wait in a world of one for the host to cast or add them, before backward waits."""

ALIGNMENT_NBYTES = 128
"""Tensors in host memory start at multiples of this, so that no vector load crosses a cache line.

A shard of any dtype is a multiple of this long, because it has whole blocks of 128 elements.
"""

CHECKPOINT_BLOCK_NBYTES = 4 * 1024 * 1024
"""Bytes of a checkpoint's file that have one checksum: so a part can be verified alone."""


class Category:
    """What memory is for, in the ledger, the plan and reports; a plane of state has torch's key.

    slots: where gradients are packed and averaged. staging: buffers of copies between host and
    device. prepared: a gradient that the kernel reads in another form. snapshot buffer: copies for
    a checkpoint in the background. state: all planes in host memory together. Plain strings,
    because users see them as keys.
    """

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    GRADIENT_SHARDS = "gradient shards"
    STATE = "state"
    SLOTS = "slots"
    STAGING = "staging"
    BLOCK_SUMS = "block_sums"
    PREPARED = "prepared"
    SNAPSHOT_BUFFER = "snapshot buffer"
    CHECKPOINT_WRITER = "checkpoint writer"


def plane_nbytes(plan: StatePlan) -> dict[str, int]:
    """Return the bytes of one rank's shard of one bucket, plane by plane, gradients included.

    Each plane is a whole number of blocks, so that planes cut from one arena stay aligned.
    """
    state = plan.state
    itemsizes = {
        "master_weight": state.master_weight,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "max_exp_avg_sq": state.max_exp_avg_sq,
        Category.GRADIENT_SHARDS: plan.gradient.shard_itemsize,
    }
    return {name: plan.bucket.shard_numel * size for name, size in itemsizes.items() if size}


def saved_nbytes(plan: StatePlan) -> int:
    """Return the bytes of one rank's shard of one bucket that a checkpoint holds.

    These are its parameters and planes of state, with the padding between them.
    """
    return plan.bucket.shard_numel * (plan.bucket.itemsize + plan.state.itemsize)


def snapshot_buffer_nbytes(plans: Sequence[StatePlan], limit_nbytes: int) -> int:
    """Return the bytes of one rank's snapshot buffer.

    This is what copies of these buckets take, or the limit rounded down to a multiple of 128.
    """
    nbytes = sum(map(saved_nbytes, plans))
    return min(nbytes, limit_nbytes // ALIGNMENT_NBYTES * ALIGNMENT_NBYTES)


def traffic_nbytes(plan: StatePlan) -> int:
    """Return the bytes that norm and update of one rank's shard of one bucket read and write.

    The gradient is read by the norm and by the update, which reads and writes each plane of state
    (a parameter that is its own master weight, too) and writes the rounded parameter.
    """
    return update_traffic_nbytes(plan) + plan.bucket.shard_numel * _gradient_itemsize(plan)


def update_traffic_nbytes(plan: StatePlan) -> int:
    """Return the bytes that the update alone reads and writes."""
    bucket, state = plan.bucket, plan.state
    own_master = 0 if state.master_weight else bucket.itemsize
    param_out = 0 if bucket.itemsize == FLOAT32_NBYTES else bucket.itemsize
    itemsize = _gradient_itemsize(plan) + 2 * (state.itemsize + own_master) + param_out
    return bucket.shard_numel * itemsize


def exchange_traffic_nbytes(plan: StatePlan) -> int:
    """Return the bytes that one rank copies in host memory around the mean of one bucket.

    All gradients are packed into a slot, in the dtype of the mean; this rank's shard is copied.
    """
    bucket, itemsize = plan.bucket, plan.gradient.itemsize
    return bucket.numel * (bucket.itemsize + itemsize) + bucket.shard_numel * 2 * itemsize


def _gradient_itemsize(plan: StatePlan) -> int:
    """Return the bytes of an element of the gradient where it is read."""
    return plan.gradient.shard_itemsize or plan.bucket.itemsize


def block_sums_nbytes(buckets: Sequence[Bucket]) -> int:
    """Return the bytes of the one array of block sums that all buckets share, 1/16 an element."""
    largest = max((bucket.shard_numel for bucket in buckets), default=0)
    return largest // BLOCK_NUMEL * BLOCK_SUM_NBYTES
