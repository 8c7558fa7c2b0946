"""Whether a plan fits, which settings would change it, and the largest model that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import resolve_bucket_nbytes
from offload_adam.options import StateFormat
from offload_adam.plan.inputs import MOST_NUMEL, Machine, Training, synthetic_specs
from offload_adam.plan.prediction import Prediction, predict

_PROBE_NUMEL = 10**10


class Need(NamedTuple):
    """Bytes that a run needs of one memory, and those that it may use; None if unknown."""

    memory: str
    needed_nbytes: int
    available_nbytes: int | None

    @property
    def is_met(self) -> bool:
        """Whether the run fits into this memory, as far as its size is known."""
        return self.available_nbytes is None or self.needed_nbytes <= self.available_nbytes


def needs(plan: Prediction, training: Training, machine: Machine) -> list[Need]:
    """Return the needs of all ranks of a node on the host, and of one rank on its GPU."""
    on_node = plan.host_nbytes * training.local_world_size
    found = [Need("host memory per node", on_node, machine.host_nbytes)]
    if training.on_device:
        found.append(Need("memory per GPU", plan.device_nbytes, machine.device_nbytes))
    return found


def largest_model(
    itemsize: int, training: Training, machine: Machine, *, is_bfloat16: bool | None = None
) -> int | None:
    """Return about how many parameters fit, None if no memory is known.

    The result is below the limit by at most 0.1%, or by one parameter.

    Args:
        itemsize: bytes of an element of the parameters.
        is_bfloat16: see `synthetic_specs`.
    """

    def needs_of(numel: int) -> list[Need]:
        specs = synthetic_specs(numel, itemsize, is_bfloat16=is_bfloat16)
        return needs(predict(specs, training), training, machine)

    def fits(numel: int) -> bool:
        return all(need.is_met for need in needs_of(numel))

    probe = needs_of(_PROBE_NUMEL)
    if all(need.available_nbytes is None for need in probe):
        return None
    # Bytes are nearly proportional to parameters. Starting near the result saves predictions, which
    # take up to 0.2 s each.
    proportional = [
        _PROBE_NUMEL * need.available_nbytes // need.needed_nbytes
        for need in probe
        if need.available_nbytes is not None and need.needed_nbytes > 0
    ]
    low = min([*proportional, MOST_NUMEL])
    high = low * 101 // 100 + 1
    # Find a `low` that fits and a `high` that does not, then bisect.
    while low > 0 and not fits(low):
        low, high = low // 2, low
    while high <= MOST_NUMEL and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_NUMEL + 1)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class Option:
    """A setting, and the bytes by which it would change one rank's memory; negative if it saves."""

    setting: str
    host: int
    device: int


def most_exact_fit(
    specs: Sequence[ParameterSpec], training: Training, machine: Machine
) -> Training:
    """Return `training` with the most exact state format that fits, or else the smallest one."""
    formats = get_args(StateFormat) if training.allows_low_precision else ("fp32",)
    for state_format in formats:
        chosen = replace(training, state_format=state_format)
        if all(need.is_met for need in needs(predict(specs, chosen), chosen, machine)):
            break
    return chosen


def options(specs: Sequence[ParameterSpec], training: Training) -> Iterator[Option]:
    """Yield the settings that would change the memory of a rank."""
    now = predict(specs, training)
    for setting, changed_specs, changed in _changes(specs, training):
        then = predict(changed_specs, changed)
        host, device = then.host_nbytes - now.host_nbytes, then.device_nbytes - now.device_nbytes
        if host or device:
            yield Option(setting, host, device)


def _changes(
    specs: Sequence[ParameterSpec], training: Training
) -> Iterator[tuple[str, Sequence[ParameterSpec], Training]]:
    """Yield each setting that could change the memory, with its changed inputs."""
    if any(spec.itemsize == 4 for spec in specs):
        halves = [
            replace(
                spec,
                itemsize=2,
                bucket_key=f"{spec.bucket_key} halved",
                is_bfloat16=True,
            )
            for spec in specs
        ]
        yield "train.dtype: bf16", halves, training
    if not training.streams:
        yield "optimizer.streaming: true", specs, replace(training, streams=True)
    if training.accumulates:
        yield "optimizer.accumulate: auto", specs, replace(training, accumulates=False)
    elif training.policy.streams and not training.accumulates_later:
        later = replace(training, accumulates_later=True)
        yield "several backwards a step outside no_sync()", specs, later
    if training.reduce_fp32:
        yield "optimizer.reduce_dtype: null", specs, replace(training, reduce_fp32=False)
    if training.replicated:
        yield "optimizer.use_offload: true", specs, replace(training, replicated=False)
    if training.allows_low_precision:
        formats = get_args(StateFormat)
        for smaller in formats[formats.index(training.state_format) + 1 :]:
            setting = f"optimizer.state_format: {smaller}"
            yield setting, specs, replace(training, state_format=smaller)
    if training.amsgrad:
        yield "without amsgrad", specs, replace(training, amsgrad=False)
    can_stay = training.on_device and not training.replicated and training.state_format == "fp32"
    if can_stay and training.offload.offload_fraction > 0.5:
        yield "memory.offload_fraction: 0.5", specs, training.with_offload(offload_fraction=0.5)
    if training.world_size > 1 and not (training.replicated or training.sharded):
        if training.reduces:  # another library averages in `.grad`, in its dtype
            external = replace(
                training,
                reduces=False,
                accumulates=False,
                accumulates_later=False,
                reduce_fp32=False,
            )
            yield "optimizer.gradient_reduction: external", specs, external
        else:
            yield "optimizer.gradient_reduction: optimizer", specs, replace(training, reduces=True)
    half_nbytes = max(1, resolve_bucket_nbytes(specs, training.policy) // 2)
    smaller = training.with_offload(bucket_nbytes=half_nbytes)
    yield f"optimizer.bucket_nbytes: {half_nbytes}", specs, smaller
    if not training.sharded:  # the parts of more ranks would be smaller
        yield "twice as many ranks", specs, replace(training, world_size=2 * training.world_size)
