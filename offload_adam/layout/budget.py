"""How many host bytes the optimizer state of a layout takes, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload_adam.layout.flat import BLOCK_NUMEL, Bucket

FLOAT32_NBYTES = 4
BLOCK_SUM_NBYTES = 8

NUM_STAGING_SLOTS = 2
"""Host slots for parameters on their way up: the kernel writes one while the other is copied."""

NUM_REDUCE_SLOTS = 3
"""Slots on a device for gradients: one is packed, one reduced, and one on its way to the host."""

ROOM_ALIGNMENT_NBYTES = 128
"""Copies start at multiples of this, which is no more than the padding of what they are made of."""

CHECKPOINT_BLOCK_NBYTES = 4 * 1024 * 1024
"""Bytes of a checkpoint's file that have one checksum: so a part can be verified alone."""


@dataclass(frozen=True, slots=True)
class BucketPlanes:
    """Which host arrays one bucket needs beside its parameters.

    own_master: the parameter is fp32 in host memory, and so its own master weight.
    landed_itemsize: bytes an element of the landed gradient shard, 0 where gradients are read where
        autograd left them.
    """

    own_master: bool
    amsgrad: bool
    landed_itemsize: int


def landed_itemsize(
    itemsize: int, *, offloaded: bool, accumulates: bool, reduces: bool, reduce_fp32: bool
) -> int:
    """Return the bytes an element in which gradients land, 0 where they are read in place.

    Args:
        itemsize: bytes of an element of the parameter.
        offloaded: parameters live on a device, their state on the host.
        accumulates: several backwards of a step add up where they land, in fp32.
        reduces: gradients are averaged over the ranks here, in fp32 if `reduce_fp32`.
    """
    if accumulates:
        return FLOAT32_NBYTES
    if reduces:
        return FLOAT32_NBYTES if reduce_fp32 else itemsize
    return itemsize if offloaded else 0


def plane_nbytes(bucket: Bucket, planes: BucketPlanes) -> dict[str, int]:
    """Return the host bytes of one rank's shard of one bucket, plane by plane.

    4 a parameter for each of master weight (unless the parameter is it), exp_avg, exp_avg_sq and,
    with amsgrad, max_exp_avg_sq; the landed gradient beside them. Each plane is a whole number of
    blocks, so that planes cut from one arena stay aligned.
    """
    itemsizes = {
        "master_weight": 0 if planes.own_master else FLOAT32_NBYTES,
        "exp_avg": FLOAT32_NBYTES,
        "exp_avg_sq": FLOAT32_NBYTES,
        "max_exp_avg_sq": FLOAT32_NBYTES if planes.amsgrad else 0,
        "landed gradients": planes.landed_itemsize,
    }
    return {name: bucket.shard_numel * size for name, size in itemsizes.items() if size}


def saved_nbytes(bucket: Bucket, planes: BucketPlanes) -> int:
    """Return the bytes of one rank's shard of one bucket that a checkpoint holds.

    Parameters and planes of state; the padding between them counted in.
    """
    num_planes = 2 + planes.amsgrad + (not planes.own_master)
    return bucket.shard_numel * (bucket.itemsize + num_planes * FLOAT32_NBYTES)


def copy_room_nbytes(
    buckets: Sequence[Bucket], planes: Sequence[BucketPlanes], limit_nbytes: int
) -> int:
    """Return the bytes of one rank's room for copies of what a checkpoint has still to write.

    All that these buckets could fill, or as many as are allowed, less than 128 of them aside.
    """
    nbytes = sum(saved_nbytes(bucket, held) for bucket, held in zip(buckets, planes, strict=True))
    return min(nbytes, limit_nbytes // ROOM_ALIGNMENT_NBYTES * ROOM_ALIGNMENT_NBYTES)


def traffic_nbytes(bucket: Bucket, planes: BucketPlanes) -> int:
    """Return the bytes that norm and update of one rank's shard of one bucket read and write.

    The gradient is read by the norm and by the update, which reads and writes each plane of state
    (a parameter that is its own master weight, too) and writes the rounded parameter.
    """
    return update_traffic_nbytes(bucket, planes) + bucket.shard_numel * _gradient(bucket, planes)


def update_traffic_nbytes(bucket: Bucket, planes: BucketPlanes) -> int:
    """Return the bytes that the update alone reads and writes."""
    state = 2 * FLOAT32_NBYTES * (3 + planes.amsgrad)
    rounded = 0 if bucket.itemsize == FLOAT32_NBYTES else bucket.itemsize
    return bucket.shard_numel * (_gradient(bucket, planes) + state + rounded)


def exchange_traffic_nbytes(bucket: Bucket, sent_itemsize: int) -> int:
    """Return the bytes that one rank copies in host memory around the mean of one bucket.

    All gradients are packed into a slot, in the dtype of the mean; this rank's shard lands.
    """
    packed = bucket.numel * (bucket.itemsize + sent_itemsize)
    return packed + bucket.shard_numel * 2 * sent_itemsize


def _gradient(bucket: Bucket, planes: BucketPlanes) -> int:
    """Return the bytes of an element of the gradient where it is read."""
    return planes.landed_itemsize or bucket.itemsize


def block_sums_nbytes(buckets: Sequence[Bucket]) -> int:
    """Return the bytes of the one array of block sums that all buckets share, 1/16 an element."""
    largest = max((bucket.shard_numel for bucket in buckets), default=0)
    return largest // BLOCK_NUMEL * BLOCK_SUM_NBYTES
