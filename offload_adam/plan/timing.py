"""How long a step is, of which forward and backward need to be told, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offload_adam.layout.budget import FLOAT32_NBYTES, traffic_nbytes, update_traffic_nbytes
from offload_adam.layout.flat import Bucket, ParameterSpec, plan_buckets
from offload_adam.plan.inputs import Machine, Training, total_numel
from offload_adam.plan.prediction import hosted, planes_of

GB = 1e9
FLOPS_PER_PARAMETER = 6
"""Operations for each parameter and token: two forward, four backward."""
COMPARED_NUMEL = (8_000_000, 64_000_000)
"""Elements of a node's shards for which predictions were compared with measured steps. Below them
the fixed costs of a step count, which are not in the prediction."""


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
    shards = 1 if training.beside else training.world_size
    buckets = plan_buckets(specs, world_size=shards, bucket_nbytes=training.bucket_nbytes)
    nbytes = {
        "update": _host_nbytes(buckets, training),
        "bus": _bus_nbytes(buckets, training),
        "network": _network_nbytes(buckets, training),
    }
    bandwidths = {
        "update": machine.host_gb_per_s,
        "bus": machine.bus_gb_per_s,
        "network": machine.network_gb_per_s,
    }
    seconds = {
        name: nbytes[name] / GB / bandwidth
        for name, bandwidth in bandwidths.items()
        if bandwidth is not None and nbytes[name] > 0
    }
    if not seconds:
        return None
    compute = compute_seconds(specs, training, machine)
    if compute is not None:
        seconds = {"compute": compute, **seconds}
    unknown = [name for name, size in nbytes.items() if size > 0 and name not in seconds]
    return StepTime(seconds, tuple(_doubts(specs, training, machine, unknown)))


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
    shards = 1 if training.beside else training.world_size
    buckets = plan_buckets(specs, world_size=shards, bucket_nbytes=training.bucket_nbytes)
    return sum(
        update_traffic_nbytes(bucket, planes_of(bucket, training))
        for bucket in hosted(buckets, training)
    )


def _doubts(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine, unknown: Sequence[str]
) -> Iterator[str]:
    """Yield what makes a prediction rough."""
    if not machine.measured:
        yield "bandwidths were given, not measured"
    for name in unknown:
        yield f"no bandwidth is known for the {name}"
    shards = 1 if training.beside else training.world_size
    on_node = total_numel(specs) * training.local_world_size // shards
    least, most = COMPARED_NUMEL
    if not least <= on_node <= most:
        yield (
            f"a node updates {on_node:.2g} parameters, and {least:.2g} to {most:.2g} were compared "
            "with measured steps"
        )
    if training.on_device or training.world_size > 1:
        yield "only steps of one rank on a CPU were compared with measured ones"


def _host_nbytes(buckets: Sequence[Bucket], training: Training) -> int:
    """Return the traffic of a node's memory; none where state lies on the devices."""
    of_rank = sum(
        traffic_nbytes(bucket, planes_of(bucket, training)) for bucket in hosted(buckets, training)
    )
    return of_rank * training.local_world_size


def _bus_nbytes(buckets: Sequence[Bucket], training: Training) -> int:
    """Return what one GPU copies, in both directions, one after the other."""
    if not training.on_device:
        return 0
    return sum(
        bucket.shard_numel * (sent_itemsize(bucket, training) + bucket.itemsize)
        for bucket in hosted(buckets, training)
    )


def _network_nbytes(buckets: Sequence[Bucket], training: Training) -> float:
    """Return what a rank sends: (N - 1) / N of the model for each pass around a ring.

    A reduce-scatter is one pass and an all-reduce two: gloo, on CPUs, has no reduce-scatter worth
    its name, and state beside the parameters needs the whole average.
    """
    if training.world_size == 1:
        return 0.0
    passes = 0 if not training.reduces else 2 if training.beside or not training.on_device else 1
    return sum(
        passes * pass_nbytes(bucket, training, sent_itemsize(bucket, training))
        + pass_nbytes(bucket, training, 0 if training.beside else bucket.itemsize)
        for bucket in buckets
    )


def pass_nbytes(bucket: Bucket, training: Training, itemsize: int) -> float:
    """Return what a rank sends in one pass of a bucket around the ring."""
    return (training.world_size - 1) / training.world_size * bucket.numel * itemsize


def sent_itemsize(bucket: Bucket, training: Training) -> int:
    """Return the bytes of an element of an averaged gradient."""
    widened = training.reduces and training.world_size > 1 and training.reduce_fp32
    return FLOAT32_NBYTES if widened else bucket.itemsize
