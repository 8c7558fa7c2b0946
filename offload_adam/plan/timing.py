"""The time of a step: seconds by resource, and the timeline of an overlapped step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload_adam.layout.budget import (
    NUM_REDUCE_SLOTS,
    NUM_STAGING_SLOTS,
    exchange_traffic_nbytes,
    traffic_nbytes,
    update_traffic_nbytes,
)
from offload_adam.layout.flat import Bucket, ParameterSpec
from offload_adam.layout.ring import ALL_REDUCE_PASSES, RingSpeed, pass_nbytes
from offload_adam.layout.schedule import Operation, Task, plan_schedule
from offload_adam.layout.state_plan import StatePlan
from offload_adam.layout.timeline import Timeline, predict_timeline
from offload_adam.plan.inputs import Machine, Source, Training, total_numel

GB = 1e9
FLOPS_PER_PARAMETER = 6
"""Operations for each parameter and token: two in forward, four in backward."""
FORWARD_SHARE = 1 / 3
COMPARED_NUMEL = (8_000_000, 64_000_000)
"""Elements of a node's shards for which tests compare predictions with measured steps. Fixed costs,
which are not predicted, dominate smaller steps."""
MOST_COMPARED_RANKS = 2
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
    """Return the time of a step, None if no bandwidth is known.

    The resources are:
        compute: forward and backward, if tokens and speed are known.
        update: norm and update of all ranks of a node, which share its memory.
        bus: D2H copies of gradients and H2D copies of parameters.
        network: collectives, as sends of one rank around a ring.
    """
    plans = training.plan(specs)
    found = {
        "update": _copy_s(_update_nbytes(plans, training), machine.host_gb_per_s),
        "bus": _copy_s(_bus_nbytes(plans), machine.bus_gb_per_s),
        "network": _network_s(plans, training, machine.network),
    }
    seconds = {name: known_s for name, known_s in found.items() if known_s}
    if not seconds:
        return None
    compute = _compute_s(specs, training, machine)
    if compute is not None:
        seconds = {"compute": compute, **seconds}
    unknown = [name for name, known_s in found.items() if known_s is None]
    return StepTime(seconds, tuple(_doubts(specs, training, machine, seconds, unknown)))


def update_nbytes(specs: Sequence[ParameterSpec], training: Training) -> int:
    """Return the bytes of host memory that one rank's updates read and write, without the norm."""
    return sum(update_traffic_nbytes(plan) for plan in _on_host(training.plan(specs)))


def _doubts(
    specs: Sequence[ParameterSpec],
    training: Training,
    machine: Machine,
    known: Collection[str],
    unknown: Collection[str],
) -> Iterator[str]:
    """Yield the reasons why a prediction is rough.

    Args:
        known, unknown: resources with a known and an unknown speed.
    """
    given = [name for name in known if machine.source_of(name) is Source.GIVEN]
    if given:
        yield f"speeds were given, not measured: {', '.join(given)}"
    for name in unknown:
        yield f"no bandwidth is known for the {name}: {_HOW_TO_MEASURE[name]}"
    shards = 1 if training.replicated else training.world_size
    on_node = total_numel(specs) * training.local_world_size // shards
    least, most = COMPARED_NUMEL
    if not least <= on_node <= most:
        yield (
            f"a node updates {on_node:.2g} parameters, and predictions were checked against "
            f"measured steps of {least:.2g} to {most:.2g}"
        )
    if training.on_device or training.world_size > MOST_COMPARED_RANKS:
        yield "predictions were checked against measured steps of one or two ranks on a CPU only"
    elif training.local_world_size < training.world_size:
        yield "predictions were checked against measured steps of ranks on one node only"


def _copy_s(nbytes: int, gb_per_s: float | None) -> float | None:
    """Return the seconds that bytes take, None if the speed is unknown."""
    if nbytes == 0:
        return 0.0
    return None if gb_per_s is None else nbytes / GB / gb_per_s


def _on_host(plans: Sequence[StatePlan]) -> list[StatePlan]:
    return [plan for plan in plans if plan.location.is_host]


def _update_nbytes(plans: Sequence[StatePlan], training: Training) -> int:
    """Return the bytes of host memory that the ranks of a node read and write in a step."""
    of_rank = sum(map(traffic_nbytes, _on_host(plans)))
    # Gradients in host memory are also packed, averaged there, and copied to the gradient shard.
    averages_on_host = not training.on_device and training.reduces and training.world_size > 1
    if averages_on_host and not training.replicated:
        of_rank += sum(map(exchange_traffic_nbytes, plans))
    return of_rank * training.local_world_size


def _bus_nbytes(plans: Sequence[StatePlan]) -> int:
    """Return the bytes that one GPU copies, D2H and H2D together."""
    return sum(
        plan.bucket.shard_numel * (plan.gradient.itemsize + plan.bucket.itemsize)
        for plan in plans
        if plan.is_offloaded
    )


def _network_s(
    plans: Sequence[StatePlan], training: Training, network: RingSpeed | None
) -> float | None:
    """Return the seconds of a step's collectives, None if their speed is unknown."""
    if training.world_size == 1 or (training.replicated and not training.reduces):
        return 0.0
    if network is None:
        return None
    # A reduce-scatter is one pass around the ring. An all-reduce is two: gloo, on CPUs, has no fast
    # reduce-scatter, and replicated state needs the whole average but no all-gather.
    all_reduces = training.replicated or not training.on_device
    passes = 0 if not training.reduces else ALL_REDUCE_PASSES if all_reduces else 1
    return sum(
        passes * _mean_pass_s(plan, training, network)
        + (0.0 if training.replicated else _gather_s(plan.bucket, training, network))
        for plan in plans
    )


def _mean_pass_s(plan: StatePlan, training: Training, network: RingSpeed) -> float:
    """Return the seconds of one pass of a bucket's gradients around the ring."""
    itemsize = plan.gradient.itemsize
    nbytes = pass_nbytes(plan.bucket.numel * itemsize, training.world_size)
    return nbytes / GB / network.mean(itemsize)


def _gather_s(bucket: Bucket, training: Training, network: RingSpeed) -> float:
    """Return the seconds of the all-gather of a bucket's parameters."""
    nbytes = pass_nbytes(bucket.numel * bucket.itemsize, training.world_size)
    return nbytes / GB / network.gather


def _compute_s(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> float | None:
    """Return the seconds of forward and backward, None if tokens or speed are unknown."""
    if machine.tera_flops is None or training.num_tokens is None:
        return None
    flops = FLOPS_PER_PARAMETER * total_numel(specs) * training.num_tokens
    return flops / 1e12 / machine.tera_flops


def predict_overlap(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> Timeline | None:
    """Return one step's timeline, None if the step does not overlap or a speed is unknown.

    Forward and backward are divided over the buckets by their elements. The prediction assumes that
    copies, collectives and updates do not slow each other down, and that packing and updates on the
    device take no time.
    """
    compute_s = _compute_s(specs, training, machine)
    host, bus, network = machine.host_gb_per_s, machine.bus_gb_per_s, machine.network
    if training.world_size == 1:
        network = RingSpeed.uniform(1.0)  # one rank sends nothing
    if compute_s is None or host is None or bus is None or network is None:
        return None
    # The schedule has times neither for a model on the CPU, which shares cores with the updates,
    # nor for gradients that someone else averages after backward.
    if not (training.overlaps and training.on_device and training.reduces):
        return None
    plans = training.plan(specs)
    by_index = {plan.bucket.index: plan for plan in plans}
    element_s = compute_s / total_numel(specs)

    def seconds_of(task: Task) -> float:
        plan = by_index[task.bucket]
        bucket = plan.bucket
        numel = sum(placed.numel for placed in bucket.placements)
        update = update_traffic_nbytes(plan) * training.local_world_size
        both = traffic_nbytes(plan) * training.local_world_size
        match task.operation:
            case Operation.GRADIENT:
                return element_s * (1 - FORWARD_SHARE) * numel
            case Operation.USE:
                return element_s * FORWARD_SHARE * numel
            case Operation.REDUCE:
                return _mean_pass_s(plan, training, network)
            case Operation.GATHER:
                return _gather_s(bucket, training, network)
            case Operation.COPY_D2H:
                return bucket.shard_numel * plan.gradient.itemsize / GB / bus
            case Operation.COPY_H2D:
                return bucket.shard_numel * bucket.itemsize / GB / bus
            case Operation.SUM_SQUARES if plan.location.is_host:
                return (both - update) / GB / host
            case Operation.UPDATE if plan.location.is_host:
                return update / GB / host
            case _:
                return 0.0

    slots = {"num_reduce_slots": NUM_REDUCE_SLOTS, "num_staging_slots": NUM_STAGING_SLOTS}
    return predict_timeline(plan_schedule(plans, **slots), seconds_of)
