"""`StatePlan`: how each bucket's state is stored, and how its gradients and parameters move.

    parameters   state               location     gradients                  new parameters
    host         host                HOST         read in place, or a shard  written by the kernel
    device       host                OFFLOADED    D2H copy of the shard      H2D copy of the shard
    device       device, sharded     DEVICE       a shard on the device      written by torch
    device       device, every rank  REPLICATED   read in place, or a shard  written by torch

The plans are computed once. Construction allocates by them, the schedule is derived from them, and
`offload-adam plan` predicts memory with them.

Worked example: two ranks, one bucket of 1000 bf16 parameters on a GPU, averaged by this package.

    bucket.numel       1024    padded to 2 ranks x whole blocks of 128
    bucket.shard_numel  512    elements of each rank
    location      OFFLOADED
    state          4, 4, 4     bytes an element: master weight, exp_avg, exp_avg_sq (no amsgrad)
    gradient             2     bytes an element: reduced and copied in bf16
    host bytes        7168     512 * (4 + 4 + 4 + 2), and the staging slots that buckets share
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from offload_adam.layout.flat import Bucket, ParameterSpec, blocks_of, plan_buckets
from offload_adam.options import OffloadPolicy, StateFormat

FLOAT32_NBYTES = 4
BFLOAT16_NBYTES = 2

# The default bucket size balances two costs of a step whose updates take longer than the forward.
# Assume 8 ranks on a node with 400 GB/s of host memory, an update that moves 28 bytes for each bf16
# parameter, and P bytes of parameters in buckets of b bytes.
# - Each bucket costs about 100 us between two kernels, regardless of its size. The update of a
#   32 MiB shard takes 9.4 ms at the rank's 50 GB/s, so they add 1 %. The update of a 4 MiB shard
#   takes 1.2 ms, so they add 8 %. Hence 32 MiB per rank.
# - D2H copy, update and H2D copy of one bucket are never hidden: about 12 ms for 256 MiB.
# The sum, P / b * 100 us + b / 256 MiB * 12 ms, is minimal at b = 78 MB for 2.7 GB of parameters
# and at 177 MB for 14 GB. Buckets twice as large cost 2 ms more, but need half as many collectives.
# Hence at least 16 buckets, and at most 256 MiB, of which the device holds three for the averages.
# With more than 8 ranks the shards are smaller, but the buckets of 1 GB of parameters cost at most
# 0.5 ms, while its forward over 4096 tokens takes 10 ms at 400 TFLOP/s.
AUTO_SHARD_NBYTES = 32 * 1024 * 1024
"""Default bytes of a rank's share of a bucket, and minimum bytes of a bucket."""
MOST_AUTO_NBYTES = 256 * 1024 * 1024
LEAST_AUTO_BUCKETS = 16

PART_NUMEL = 16 * 1024 * 1024
"""Elements of a part of a large update, which is copied to the device during the next part.

They are 32 MiB of 16-bit parameters, the default size of a bucket.
"""


class StateLocation(Enum):
    """Where a bucket's parameters are stored, and where this rank's part of their state is."""

    HOST = "parameters and state in host memory"
    OFFLOADED = "parameters on a device, state in host memory"
    DEVICE = "parameters and this rank's shard of the state on a device"
    REPLICATED = "parameters and all of their state on every rank's device"

    @property
    def is_host(self) -> bool:
        """Whether the state is in host memory, where the Numba kernels update it."""
        return self in (StateLocation.HOST, StateLocation.OFFLOADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePolicy:
    """The options from which `plan_state` decides how state is stored.

    world_size: number of ranks that train together.
    bucket_nbytes: bytes of parameters in one bucket; None for the default of
        `resolve_bucket_nbytes`.
    reduces: this package averages the gradients over the ranks.
    accumulates: several backwards of a step are summed in the gradient shard, in fp32.
    accumulates_later: without `accumulates`, the first step with several backwards takes memory
        for their sums, see `StatePlan.accumulator_itemsize`.
    reduces_in_fp32: 16-bit gradients are averaged in fp32.
    streams: gradients are moved out of `.grad` during backward.
    replicated: state is stored on its parameter's device, whole on every rank.
    sharded: parameters are sharded over the ranks, by FSDP2 or tensor parallelism. Each rank stores
        the state of its own parts.
    offload_fraction: minimum fraction of the elements on a device whose state is on the host.
    pins_state, pins_staging: host state, and staging buffers, are page-locked.
    keeps: state, gradients, and parameters that are a part of the state outlive the process.
    """

    world_size: int = 1
    bucket_nbytes: int | None = None
    reduces: bool = True
    accumulates: bool = False
    accumulates_later: bool = False
    reduces_in_fp32: bool = False
    streams: bool = False
    replicated: bool = False
    sharded: bool = False
    offload_fraction: float = 1.0
    pins_state: bool = True
    pins_staging: bool = True
    keeps: bool = False

    @classmethod
    def from_options(
        cls,
        offload: OffloadPolicy,
        *,
        world_size: int,
        reduces: bool,
        accumulates: bool,
        accumulates_later: bool,
        reduces_in_fp32: bool,
        streams: bool,
        replicated: bool,
        sharded: bool = False,
    ) -> StatePolicy:
        """Return the policy for these options."""
        return cls(
            world_size=world_size,
            bucket_nbytes=offload.bucket_nbytes,
            reduces=reduces,
            accumulates=accumulates,
            accumulates_later=accumulates_later and offload.keep == "none",
            reduces_in_fp32=reduces_in_fp32,
            streams=streams,
            replicated=replicated,
            sharded=sharded,
            offload_fraction=offload.offload_fraction,
            pins_state=offload.pin == "all",
            pins_staging=offload.pin != "none",
            keeps=offload.keep != "none",
        )

    @property
    def num_shards(self) -> int:
        """Number of ranks that share a bucket's state."""
        return 1 if self.replicated or self.sharded else self.world_size

    @property
    def averages(self) -> bool:
        """Whether this package averages gradients, over more than one rank."""
        return self.reduces and self.world_size > 1


@dataclass(frozen=True, slots=True)
class PlaneSizes:
    """Bytes per element of each plane of state; 0 for a plane that does not exist.

    master_weight: 4 for fp32. 2 for the high half of a split master weight, if the parameter is on
        another device than its state. 0 if the parameter itself is the master weight or its high
        half.
    master_remainder: 2 for the low half of a split master weight, 1 for its upper byte alone.
    max_exp_avg_sq: only with amsgrad.
    exponents: bytes per block of 128 elements, not per element: the exponents of 8-bit codes.
    """

    master_weight: int
    master_remainder: int
    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    exponents: int

    @property
    def moments(self) -> int:
        """Bytes per element of the moments together."""
        return self.exp_avg + self.exp_avg_sq + self.max_exp_avg_sq

    @property
    def itemsize(self) -> int:
        """Bytes per element of all planes together, without the exponents of blocks."""
        return self.master_weight + self.master_remainder + self.moments

    @property
    def saved(self) -> int:
        """Bytes per element of the planes in a checkpoint, which omits copies of parameters.

        8-bit codes are saved as bfloat16 values, see `memory.codes`.
        """
        master = self.master_remainder or self.master_weight
        moments = max(self.exp_avg, BFLOAT16_NBYTES) + max(self.exp_avg_sq, BFLOAT16_NBYTES)
        return master + moments + self.max_exp_avg_sq

    def nbytes_of(self, numel: int) -> int:
        """Return the bytes of all planes of `numel` elements in whole blocks."""
        return numel * self.itemsize + blocks_of(numel) * self.exponents


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """How the gradients of one bucket move from autograd to the update.

    averaged: this package averages them over the ranks.
    streams: they are moved out of `.grad` during backward.
    itemsize: bytes per element while they are averaged and copied.
    shard_itemsize: bytes per element of this rank's gradient shard, which the update reads; 0 if it
        reads the tensors of autograd instead.
    accumulates: later backwards of a step add to the shard.
    """

    averaged: bool
    streams: bool
    itemsize: int
    shard_itemsize: int
    accumulates: bool


@dataclass(frozen=True, slots=True)
class StatePlan:
    """How one bucket's state is stored, and how its gradients and parameters move.

    pinned: host state is page-locked, so that copies need no staging buffer.
    pins_staging: staging buffers are page-locked.
    kept: the state outlives the process, with all that a later one needs to complete a step.
    """

    bucket: Bucket
    location: StateLocation
    state: PlaneSizes
    gradient: GradientPlan
    pinned: bool
    pins_staging: bool
    kept: bool = False

    @property
    def is_offloaded(self) -> bool:
        """Whether gradients are copied to the host and parameters back to a device."""
        return self.location is StateLocation.OFFLOADED

    @property
    def num_parts(self) -> int:
        """Number of parts in which the shard is updated, each followed by its own H2D copy."""
        return max(1, self.bucket.shard_numel // PART_NUMEL) if self.is_offloaded else 1

    @property
    def gathers(self) -> bool:
        """Whether other ranks' parameters are gathered after the update."""
        return self.bucket.world_size > 1 and self.bucket.numel > 0

    @property
    def copies_directly(self) -> bool:
        """Whether D2H copies of gradients write directly into the gradient shard.

        Such a copy can be issued as soon as the gradients are reduced, without work for the host.
        Otherwise gradients are copied to a buffer first: the host must cast or add them, or the
        shard is not page-locked.
        """
        gradient = self.gradient
        return (
            self.is_offloaded
            and self.pinned
            and not gradient.accumulates
            and gradient.itemsize == gradient.shard_itemsize
        )

    @property
    def accumulator_itemsize(self) -> int:
        """Bytes per element that sums of several backwards take besides the gradient shard.

        It is 0 if the shard itself can hold the sums. A shard that receives direct copies cannot:
        the copy of a further backward would overwrite the gradients of earlier ones.
        """
        adds_in_shard = self.gradient.shard_itemsize == FLOAT32_NBYTES and not self.copies_directly
        return 0 if adds_in_shard else FLOAT32_NBYTES

    @property
    def keeps_parameters(self) -> bool:
        """Whether the parameters outlive the process: they are master weights, or parts of them."""
        return self.kept and self.state.master_weight == 0

    @property
    def uses_ring(self) -> bool:
        """Whether gradients are packed into a slot of a ring with a fixed number of slots.

        Otherwise they are packed into a slot of a pool that grows, or not at all.
        """
        # The next bucket in a slot waits on a stream for the D2H copy that empties the slot. This
        # copy must have been issued by then, and only a direct copy is issued early enough.
        # Streamed gradients use a ring even without averaging: their own memory is free once they
        # are packed, so gradients that wait for a slow bus take no more memory than the slots.
        gradient = self.gradient
        return self.copies_directly and (gradient.averaged or gradient.streams)

    @property
    def packs(self) -> bool:
        """Whether gradients are concatenated in a slot of a ring or a pool."""
        return self.gradient.averaged or self.uses_ring

    @property
    def stages_parameters(self) -> bool:
        """Whether the H2D copy of updated parameters reads from a staging slot.

        If the kernel writes 16-bit parameters, it writes them into the slot. Otherwise the H2D copy
        reads the master weight, or its high half. If only the slot is page-locked, the master
        weight is copied into the slot first.
        """
        # A copy from memory that is not page-locked would block the thread that issues it.
        return self.is_offloaded and (
            self.writes_parameters or (self.pins_staging and not self.pinned)
        )

    @property
    def writes_parameters(self) -> bool:
        """Whether the kernel writes 16-bit parameters in addition to their master weights.

        False for fp32 parameters, and for parameters that are the high halves of master weights.
        """
        return self.bucket.itemsize < FLOAT32_NBYTES and not self.bucket.splits_master


def plan_state(
    specs: Sequence[ParameterSpec], policy: StatePolicy, *, first_index: int = 0
) -> tuple[StatePlan, ...]:
    """Lay parameters out in buckets, and decide for each bucket how its state is stored.

    A pure function, so that every rank and `offload-adam plan` compute the same result.

    Args:
        specs: parameters in forward order.
        first_index: index of the first new bucket, after those that already exist.

    Raises:
        ValueError: state in low precision would be stored on a device.
    """
    buckets = plan_buckets(
        specs,
        world_size=policy.num_shards,
        bucket_nbytes=resolve_bucket_nbytes(specs, policy),
        first_index=first_index,
    )
    on_device = kept_on_device(buckets, policy.offload_fraction)
    plans = []
    for bucket in buckets:
        location = _location_of(bucket, policy, bucket.index in on_device)
        if bucket.state_format != "fp32" and not location.is_host:
            raise ValueError(
                f"state_format={bucket.state_format!r} needs state in host memory, where the "
                "kernels update it. Pass offload_fraction=1 (and use_offload=True to Adam), or "
                "state_format='fp32'."
            )
        state = _plane_sizes(bucket, location)
        gradient = _gradient_plan(bucket, location, policy)
        pinned = policy.pins_state and location.is_host
        plans.append(
            StatePlan(bucket, location, state, gradient, pinned, policy.pins_staging, policy.keeps)
        )
    return tuple(plans)


def resolve_bucket_nbytes(specs: Sequence[ParameterSpec], policy: StatePolicy) -> int:
    """Return the bytes of parameters at which a bucket is full.

    The default is 32 MiB for each rank that has a shard. It is limited to 256 MiB and to a 16th of
    the parameters, but is at least 32 MiB.

    Args:
        specs: the parameters that are laid out together.
    """
    if policy.bucket_nbytes is not None:
        return policy.bucket_nbytes
    total_nbytes = sum(spec.numel * spec.itemsize for spec in specs)
    most_nbytes = min(MOST_AUTO_NBYTES, total_nbytes // LEAST_AUTO_BUCKETS)
    return max(AUTO_SHARD_NBYTES, min(policy.num_shards * AUTO_SHARD_NBYTES, most_nbytes))


def kept_on_device(buckets: Sequence[Bucket], offload_fraction: float) -> frozenset[int]:
    """Return the indices of the buckets on a device whose state stays there.

    They are the first buckets in forward order: the device updates them at once, and the next
    forward reads them while the host updates the other buckets. Smaller buckets after the first one
    that does not fit are not kept either.

    Args:
        buckets: in the order in which backward completes them, the reverse of forward order.
        offload_fraction: minimum fraction of the elements whose state is on the host.
    """
    if offload_fraction == 1.0:
        return frozenset()  # the loop below would keep leading buckets without elements
    candidates = [bucket for bucket in reversed(buckets) if bucket.on_device]
    total = sum(bucket.numel for bucket in candidates)
    left = total - math.ceil(offload_fraction * total)
    kept = []
    for bucket in candidates:
        left -= bucket.numel
        if left < 0:
            break
        kept.append(bucket.index)
    return frozenset(kept)


def _location_of(bucket: Bucket, policy: StatePolicy, stays: bool) -> StateLocation:
    if not bucket.on_device:
        return StateLocation.HOST
    if policy.replicated:
        return StateLocation.REPLICATED
    return StateLocation.DEVICE if stays else StateLocation.OFFLOADED


# exp_avg, exp_avg_sq, exponents of a block, and remainder of a bfloat16 parameter.
_FORMAT_NBYTES: Mapping[StateFormat, tuple[int, int, int, int]] = {
    "fp32": (4, 4, 0, 0),
    "bf16": (2, 2, 0, 2),
    "mixed": (2, 1, 2, 1),
    "int8": (1, 1, 2, 1),
}


def _plane_sizes(bucket: Bucket, location: StateLocation) -> PlaneSizes:
    """Return the bytes per element of each plane of a bucket's state.

    state format    exp_avg   exp_avg_sq   exponents of a block   remainder of a bf16 parameter
    fp32            4         4            0                      0
    bf16            2         2            0                      2
    mixed           2         1            2                      1
    int8            1         1            2                      1

    state format, parameter            master_weight
    fp32, 16-bit parameter             4
    low precision, bf16 parameter      own
    low precision, fp16 parameter      4
    any, fp32 parameter                own

    "own": the parameter is the master weight, or its high half. The size is then 0, or that of the
    parameter if it is on a device and its state in host memory, which then has a copy of it.
    """
    exp_avg, exp_avg_sq, exponents, remainder = _FORMAT_NBYTES[bucket.state_format]
    if bucket.splits_master or bucket.itemsize == FLOAT32_NBYTES:
        master = bucket.itemsize if location is StateLocation.OFFLOADED else 0
    else:
        master = FLOAT32_NBYTES
    return PlaneSizes(
        master_weight=master,
        master_remainder=remainder if bucket.splits_master else 0,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        max_exp_avg_sq=FLOAT32_NBYTES if bucket.amsgrad else 0,
        exponents=exponents,
    )


def _gradient_plan(bucket: Bucket, location: StateLocation, policy: StatePolicy) -> GradientPlan:
    averaged = policy.averages and bucket.numel > 0
    streams = policy.streams and bucket.numel > 0
    itemsize = FLOAT32_NBYTES if policy.averages and policy.reduces_in_fp32 else bucket.itemsize
    if policy.accumulates:
        shard_itemsize = FLOAT32_NBYTES
    elif (
        policy.averages
        or policy.keeps  # tensors of autograd do not outlive the process
        or location in (StateLocation.OFFLOADED, StateLocation.DEVICE)
    ):
        shard_itemsize = itemsize
    else:
        shard_itemsize = 0
    return GradientPlan(averaged, streams, itemsize, shard_itemsize, policy.accumulates)
