"""How long a step is, of which forward and backward need to be told, and what bounds it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload_adam.layout.budget import (
    exchange_traffic_nbytes,
    traffic_nbytes,
    update_traffic_nbytes,
)
from offload_adam.layout.flat import Bucket, ParameterSpec
from offload_adam.layout.ring import ALL_REDUCE_PASSES, RingSpeed, pass_nbytes
from offload_adam.layout.state_plan import StatePlan
from offload_adam.plan.inputs import Machine, Source, Training, total_numel

GB = 1e9
FLOPS_PER_PARAMETER = 6
"""Operations for each parameter and token: two forward, four backward."""
COMPARED_NUMEL = (8_000_000, 64_000_000)
"""Elements of a node's shards for which predictions were compared with measured steps. Below them
the fixed costs of a step count, which are not in the prediction."""
MOST_COMPARED_RANKS = 2
_HOW_TO_MEASURE = {
    "update": "run offload-adam doctor where it is to train",
    "bus": "give --bus-bandwidth, or run offload-adam doctor where it is to train",
    "network": "run offload-adam doctor under torchrun, with the ranks of the run",
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds that a step spends on each resource, were it used alone.

    doubts: why the times are rough; empty where they are as good as those that were compared with
        measured steps.
    """

    seconds: Mapping[str, float]
    doubts: tuple[str, ...] = ()

    @property
    def rough(self) -> bool:
        """Whether something speaks against the times."""
        return bool(self.doubts)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total_s(self) -> float:
        """The time without any overlap, as the sequential executor takes it."""
        return sum(self.seconds.values())

    @property
    def least_s(self) -> float:
        """The time with perfect overlap: that of what bounds it."""
        return max(self.seconds.values())


def predict_time(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> StepTime | None:
    """Return the time of a step, None where no bandwidth is known.

    compute: forward and backward, where tokens and speed are known; else only the optimizer's part
    is in it.
    update: norm and update read and write the state of all ranks of a node through its one memory.
    bus: gradients down, parameters up. network: what a rank sends and receives over a ring.
    """
    plans = training.plan(specs)
    found = {
        "update": _moved_s(_host_nbytes(plans, training), machine.host_gb_per_s),
        "bus": _moved_s(_bus_nbytes(plans), machine.bus_gb_per_s),
        "network": _network_s(plans, training, machine.network),
    }
    seconds = {name: known_s for name, known_s in found.items() if known_s}
    if not seconds:
        return None
    compute = compute_seconds(specs, training, machine)
    if compute is not None:
        seconds = {"compute": compute, **seconds}
    unknown = [name for name, known_s in found.items() if known_s is None]
    return StepTime(seconds, tuple(_doubts(specs, training, machine, seconds, unknown)))


def compute_seconds(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> float | None:
    """Return the time of forward and backward, None where tokens or speed are not known."""
    if machine.tera_flops is None or training.num_tokens is None:
        return None
    flops = FLOPS_PER_PARAMETER * total_numel(specs) * training.num_tokens
    return flops / 1e12 / machine.tera_flops


def update_nbytes(specs: Sequence[ParameterSpec], training: Training) -> int:
    """Return what the updates of one rank read and write in host memory, without the norm."""
    return sum(update_traffic_nbytes(plan) for plan in _on_host(training.plan(specs)))


def _doubts(
    specs: Sequence[ParameterSpec],
    training: Training,
    machine: Machine,
    known: Collection[str],
    unknown: Collection[str],
) -> Iterator[str]:
    """Yield what makes a prediction rough.

    Args:
        known, unknown: the resources whose speeds are, and are not.
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
            f"a node updates {on_node:.2g} parameters, and {least:.2g} to {most:.2g} were compared "
            "with measured steps"
        )
    if training.on_device or training.world_size > MOST_COMPARED_RANKS:
        yield "only steps of one and two ranks on a CPU were compared with measured ones"
    elif training.local_world_size < training.world_size:
        yield "only steps of ranks on one node were compared with measured ones"


def _moved_s(nbytes: int, gb_per_s: float | None) -> float | None:
    """Return the seconds that bytes take, None where the speed is not known."""
    if nbytes == 0:
        return 0.0
    return None if gb_per_s is None else nbytes / GB / gb_per_s


def _on_host(plans: Sequence[StatePlan]) -> list[StatePlan]:
    return [plan for plan in plans if plan.location.is_host]


def _host_nbytes(plans: Sequence[StatePlan], training: Training) -> int:
    """Return the traffic of a node's memory; none where state lies on the devices.

    Parameters in host memory have their gradients there, too: these are packed, and copied to the
    gradient shard.
    """
    exchanged = not training.on_device and training.reduces and training.world_size > 1
    of_rank = sum(map(traffic_nbytes, _on_host(plans)))
    if exchanged and not training.replicated:
        of_rank += sum(map(exchange_traffic_nbytes, plans))
    return of_rank * training.local_world_size


def _bus_nbytes(plans: Sequence[StatePlan]) -> int:
    """Return what one GPU copies, in both directions, one after the other."""
    return sum(
        plan.bucket.shard_numel * (plan.gradient.itemsize + plan.bucket.itemsize)
        for plan in plans
        if plan.is_offloaded
    )


def _network_s(
    plans: Sequence[StatePlan], training: Training, network: RingSpeed | None
) -> float | None:
    """Return the seconds of a step's collectives, None where their speed is not known.

    A reduce-scatter is one pass and an all-reduce two: gloo, on CPUs, has no reduce-scatter worth
    its name, and replicated state needs the whole average. It gathers nothing.
    """
    if training.world_size == 1 or (training.replicated and not training.reduces):
        return 0.0
    if network is None:
        return None
    all_reduces = training.replicated or not training.on_device
    passes = 0 if not training.reduces else ALL_REDUCE_PASSES if all_reduces else 1
    return sum(
        passes * mean_pass_s(plan, training, network)
        + (0.0 if training.replicated else gather_s(plan.bucket, training, network))
        for plan in plans
    )


def mean_pass_s(plan: StatePlan, training: Training, network: RingSpeed) -> float:
    """Return the seconds of one pass of a bucket's gradients around the ring."""
    itemsize = plan.gradient.itemsize
    nbytes = pass_nbytes(plan.bucket.numel * itemsize, training.world_size)
    return nbytes / GB / network.mean(itemsize)


def gather_s(bucket: Bucket, training: Training, network: RingSpeed) -> float:
    """Return the seconds in which a bucket's parameters are gathered."""
    nbytes = pass_nbytes(bucket.numel * bucket.itemsize, training.world_size)
    return nbytes / GB / network.gather
