"""The bytes that a run takes on each rank, from the layout that the optimizer itself would use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload_adam.layout.budget import (
    CHECKPOINT_BLOCK_NBYTES,
    NUM_REDUCE_SLOTS,
    NUM_STAGING_SLOTS,
    BucketPlanes,
    block_sums_nbytes,
    copy_room_nbytes,
    landed_itemsize,
    plane_nbytes,
)
from offload_adam.layout.flat import Bucket, ParameterSpec, plan_buckets
from offload_adam.layout.placing import kept_on_device
from offload_adam.plan.inputs import Training

NUM_SLOTS_IN_FLIGHT = 2
"""Buckets that are reduced at once while backward goes on. A pool makes more where ranks drift."""

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes of one rank by category; activations and the framework's own are not in it.

    host, device: what lies where.
    num_buckets: how many collectives a step has in each direction.
    """

    host: Mapping[str, int]
    device: Mapping[str, int]
    num_buckets: int

    @property
    def host_nbytes(self) -> int:
        """Host bytes of one rank."""
        return sum(self.host.values())

    @property
    def device_nbytes(self) -> int:
        """Device bytes of one rank."""
        return sum(self.device.values())


def predict(specs: Sequence[ParameterSpec], training: Training) -> Prediction:
    """Return what a rank holds, without allocating anything.

    The state is laid out by `plan_buckets` and counted by `plane_nbytes`, as the optimizer does it;
    so it is exact. Slots are an estimate: two buckets.
    """
    shards = 1 if training.beside else training.world_size
    buckets = plan_buckets(specs, world_size=shards, bucket_nbytes=training.bucket_nbytes)
    on_host = hosted(buckets, training)
    parameters = sum(bucket.numel * bucket.itemsize for bucket in buckets)
    host: Counter[str] = Counter()
    device: Counter[str] = Counter()
    side = device if training.on_device else host
    side["parameters"] = parameters
    side["gradients"] = _gradients(buckets, training)
    side["slots"] = _slots(buckets, training)
    indices = {bucket.index for bucket in on_host}
    planes = [planes_of(bucket, training, hosted=bucket.index in indices) for bucket in buckets]
    for bucket, held in zip(buckets, planes, strict=True):
        home = host if bucket.index in indices else device
        home.update(plane_nbytes(bucket, held))
    host["block_sums"] = block_sums_nbytes(on_host)
    if training.on_device:
        host["staging"] = _staging(on_host)
    host["checkpoint room"] = copy_room_nbytes(buckets, planes, training.checkpoint_room_nbytes)
    if training.on_device and training.saves:
        # What lies in host memory is written from where it lies.
        host["checkpoint writer"] = CHECKPOINT_BLOCK_NBYTES
    return Prediction(_positive(host), _positive(device), len(buckets))


def hosted(buckets: Sequence[Bucket], training: Training) -> list[Bucket]:
    """Return the buckets whose state lies on the host."""
    if not training.on_device:
        return list(buckets)
    if training.beside:
        return []
    on_device = {bucket.index for bucket in buckets}
    kept = kept_on_device(buckets, on_device, training.offload_fraction)
    return [bucket for bucket in buckets if bucket.index not in kept]


def planes_of(bucket: Bucket, training: Training, *, hosted: bool = True) -> BucketPlanes:
    """Return which planes a bucket needs.

    Args:
        hosted: its state lies on the host.
    """
    offloaded = training.on_device and not training.beside
    reduces = training.reduces and training.world_size > 1
    return BucketPlanes(
        own_master=bucket.itemsize == FLOAT32 and not (offloaded and hosted),
        amsgrad=training.amsgrad,
        landed_itemsize=landed_itemsize(
            bucket.itemsize,
            offloaded=offloaded,
            accumulates=training.accumulates,
            reduces=reduces,
            reduce_fp32=training.reduce_fp32,
        ),
    )


def _gradients(buckets: Sequence[Bucket], training: Training) -> int:
    """Return what `.grad` takes at its peak: all of it, or one bucket while the rest has left.

    Gradients stay where they are read in place, and where someone else averages them.
    """
    leaves = training.streams and training.reduces and not training.beside
    sizes = [bucket.numel * bucket.itemsize for bucket in buckets]
    landed = [planes_of(bucket, training).landed_itemsize > 0 for bucket in buckets]
    return max(sizes, default=0) if leaves and all(landed) else sum(sizes)


def _slots(buckets: Sequence[Bucket], training: Training) -> int:
    if not training.reduces or training.world_size == 1:
        return 0
    largest: dict[str, int] = {}
    for bucket in buckets:
        nbytes = bucket.numel * (FLOAT32 if training.reduce_fp32 else bucket.itemsize)
        largest[bucket.family] = max(largest.get(bucket.family, 0), nbytes)
    if training.on_device and not training.accumulates:
        return NUM_REDUCE_SLOTS * sum(largest.values())  # a ring for each kind
    return min(len(buckets), NUM_SLOTS_IN_FLIGHT) * max(largest.values(), default=0)


def _staging(buckets: Sequence[Bucket]) -> int:
    """Return two shards of the largest bucket in each 16-bit format."""
    largest: dict[str, int] = {}
    for bucket in buckets:
        if bucket.itemsize < FLOAT32:
            nbytes = bucket.shard_numel * bucket.itemsize
            largest[bucket.family] = max(largest.get(bucket.family, 0), nbytes)
    return NUM_STAGING_SLOTS * sum(largest.values())


def _positive(totals: Mapping[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in totals.items() if nbytes}
