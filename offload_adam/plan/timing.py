"""The time of a step: seconds by resource, and the timeline of an overlapped step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload_adam.layout.budget import (
    NUM_REDUCE_SLOTS,
    NUM_STAGING_SLOTS,
    exchange_traffic_nbytes,
    traffic_nbytes,
    update_traffic_nbytes,
)
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.ring import ALL_REDUCE_PASSES, pass_nbytes
from offload_adam.layout.schedule import Operation, plan_schedule
from offload_adam.layout.state_plan import StatePlan
from offload_adam.layout.timeline import Timeline, predict_timeline
from offload_adam.plan.inputs import Machine, Source, Training, total_numel
from offload_adam.units import format_count

GB = 1e9
TERA = 1e12
FLOPS_PER_PARAMETER = 6
"""Operations for each parameter and token: two in forward, four in backward."""
FORWARD_SHARE = 1 / 3
COMPARED_NUMEL = (8_000_000, 64_000_000)
"""Least and most elements of a node's shards for which tests compare predictions with measured
steps. Fixed costs, which are not predicted, dominate smaller steps."""
MOST_COMPARED_RANKS = 2
"""Largest number of ranks for which tests do so."""
# By resource, the operations of the schedule that use it.
_RESOURCES = {
    "compute": (Operation.GRADIENT, Operation.USE),
    "update": (Operation.SUM_SQUARES, Operation.UPDATE),
    "bus": (Operation.COPY_D2H, Operation.COPY_H2D),
    "network": (Operation.REDUCE, Operation.GATHER),
}
_HOW_TO_MEASURE = {
    "update": "run offload-adam doctor on the training machine",
    "bus": "give --bus-bandwidth, or run offload-adam doctor on the training machine",
    "network": "run offload-adam doctor under torchrun, with the ranks of the run",
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds that a step spends on each resource.

    doubts: why the times are rough; empty if tests compare such predictions with measured steps.
    """

    seconds: Mapping[str, float]
    doubts: tuple[str, ...] = ()

    @property
    def bound(self) -> str:
        """Return the resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total_s(self) -> float:
        """Return the time without any overlap."""
        return sum(self.seconds.values())

    @property
    def least_s(self) -> float:
        """Return the time with perfect overlap: that of the slowest resource."""
        return max(self.seconds.values())


def predict_time(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> StepTime | None:
    """Return the time of a step, None if no bandwidth that it needs is known.

    The keys of `StepTime.seconds`:
        compute: forward and backward, if tokens and speed are known.
        update: norm and update of all ranks of a node, which share its memory.
        bus: D2H copies of gradients and H2D copies of parameters.
        network: collectives, as sends of one rank around a ring.
    """
    buckets = [_bucket_seconds(plan, training, machine) for plan in training.plan(specs)]
    seconds: dict[str, float] = {}
    doubts: list[str] = []
    for name, operations in _RESOURCES.items():
        parts = [bucket[operation] for bucket in buckets for operation in operations]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            if name in _HOW_TO_MEASURE:
                doubts.append(
                    f"no bandwidth is known for the {name}, so its time is missing: "
                    f"{_HOW_TO_MEASURE[name]}"
                )
        elif any(known):  # otherwise this run does not use the resource
            seconds[name] = sum(known)
    if not seconds.keys() & _HOW_TO_MEASURE.keys():
        return None  # forward and backward alone are no prediction of the optimizer
    given = [name for name in seconds if machine.source_of(name) is Source.GIVEN]
    if given:
        doubts.insert(0, f"speeds were given, not measured: {', '.join(given)}")
    return StepTime(seconds, (*doubts, *_doubts(specs, training)))


def update_nbytes(specs: Sequence[ParameterSpec], training: Training) -> int:
    """Return the bytes of host memory that one rank's updates read and write, without the norm."""
    return sum(update_traffic_nbytes(p) for p in training.plan(specs) if p.location.is_host)


def _doubts(specs: Sequence[ParameterSpec], training: Training) -> Iterator[str]:
    """Yield how the run differs from those whose predicted times tests compare with real ones."""
    shards = training.policy.num_shards
    on_node = total_numel(specs) * training.local_world_size // shards
    least, most = COMPARED_NUMEL
    if training.frozen_nbytes:
        yield "forward and backward of frozen parameters are not counted"
    if not least <= on_node <= most:
        yield (
            f"a node updates {format_count(on_node)} parameters, but predictions were compared "
            f"with measured steps of {format_count(least)} to {format_count(most)} parameters only"
        )
    if training.on_device or training.world_size > MOST_COMPARED_RANKS:
        yield "predictions were compared with measured steps of one or two ranks on a CPU only"
    elif training.local_world_size < training.world_size:
        yield "predictions were compared with measured steps of ranks on one node only"


def _bucket_seconds(
    plan: StatePlan, training: Training, machine: Machine
) -> dict[Operation, float | None]:
    """Return how long each operation on a bucket takes, None where the speed is unknown.

    Packing and updates on the device take no time. Packing on the host is a part of the update.
    """
    bucket, network = plan.bucket, machine.network
    numel = sum(placed.numel for placed in bucket.placements)  # without padding
    flops = FLOPS_PER_PARAMETER * numel * (training.num_tokens or 0)
    norm, update = _memory_nbytes(plan, training)
    copied_numel = bucket.shard_numel if plan.is_offloaded else 0
    mean, gather = _sent_nbytes(plan, training)
    mean_speed = None if network is None else network.mean(plan.gradient.itemsize)
    gather_speed = None if network is None else network.gather
    return {
        Operation.GRADIENT: _seconds(flops * (1 - FORWARD_SHARE), TERA, machine.tera_flops),
        Operation.USE: _seconds(flops * FORWARD_SHARE, TERA, machine.tera_flops),
        Operation.SUM_SQUARES: _seconds(norm, GB, machine.host_gb_per_s),
        Operation.UPDATE: _seconds(update, GB, machine.host_gb_per_s),
        Operation.COPY_D2H: _seconds(
            copied_numel * plan.gradient.itemsize, GB, machine.bus_gb_per_s
        ),
        Operation.COPY_H2D: _seconds(copied_numel * bucket.itemsize, GB, machine.bus_gb_per_s),
        Operation.REDUCE: _seconds(mean, GB, mean_speed),
        Operation.GATHER: _seconds(gather, GB, gather_speed),
    }


def _seconds(amount: float, unit: float, speed: float | None) -> float | None:
    """Return how long an amount takes at a speed in units a second, None if that is unknown."""
    if amount == 0:
        return 0.0
    return None if speed is None else amount / unit / speed


def _memory_nbytes(plan: StatePlan, training: Training) -> tuple[int, int]:
    """Return the host memory that norm and update of a bucket read and write, on all local ranks.

    The ranks of a node share the bandwidth of its memory.
    """
    if not plan.location.is_host:
        return 0, 0
    update = update_traffic_nbytes(plan)
    norm = traffic_nbytes(plan) - update
    if _averages(training) and not training.on_device and not training.replicated:
        # Gradients in host memory are also packed, averaged there, and copied to their shard.
        update += exchange_traffic_nbytes(plan)
    return training.local_world_size * norm, training.local_world_size * update


def _sent_nbytes(plan: StatePlan, training: Training) -> tuple[float, float]:
    """Return the bytes that a rank sends to average a bucket's gradients, and to gather it."""
    bucket, world_size = plan.bucket, training.world_size
    mean = 0.0
    if _averages(training):
        # A reduce-scatter is one pass around the ring. An all-reduce is two: gloo, on CPUs, has no
        # fast reduce-scatter, and replicated state needs the whole average but no all-gather.
        passes = ALL_REDUCE_PASSES if training.replicated or not training.on_device else 1
        mean = passes * pass_nbytes(bucket.numel * plan.gradient.itemsize, world_size)
    gather = pass_nbytes(bucket.numel * bucket.itemsize, bucket.world_size)
    return mean, gather


def _averages(training: Training) -> bool:
    """Return whether the optimizer averages gradients between ranks."""
    return training.reduces and training.world_size > 1


def predict_overlap(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> Timeline | None:
    """Return one step's timeline, None if the step does not overlap or a speed is unknown.

    Forward and backward are divided over the buckets by their elements. The prediction assumes that
    copies, collectives and updates do not slow each other down.
    """
    # A model on the CPU shares cores with the updates: both are slower than alone. Gradients that
    # another library averages after backward are not in the schedule.
    if not (training.overlaps and training.on_device and training.reduces):
        return None
    if machine.tera_flops is None or training.num_tokens is None:
        return None
    plans = training.plan(specs)
    buckets = {plan.bucket.index: _bucket_seconds(plan, training, machine) for plan in plans}
    if any(None in bucket.values() for bucket in buckets.values()):
        return None
    schedule = plan_schedule(
        plans, num_reduce_slots=NUM_REDUCE_SLOTS, num_staging_slots=NUM_STAGING_SLOTS
    )
    num_parts = {plan.bucket.index: plan.num_parts for plan in plans}
    return predict_timeline(
        schedule,
        lambda task: buckets[task.bucket].get(task.operation) or 0.0,
        lambda bucket: num_parts[bucket],
    )
