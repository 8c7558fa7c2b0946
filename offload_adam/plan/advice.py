"""Whether a plan fits, which settings would change it, and the largest model that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.state_plan import resolve_bucket_nbytes
from offload_adam.plan.inputs import MOST_NUMEL, Machine, Training, synthetic_specs
from offload_adam.plan.prediction import Prediction, predict

_PROBE_NUMEL = 10**10


def fits(plan: Prediction, training: Training, machine: Machine) -> bool:
    """Return whether the ranks of a node fit into its memory, as far as its size is known."""
    on_node = plan.host_nbytes * training.local_world_size
    host = machine.host_nbytes is None or on_node <= machine.host_nbytes
    device = machine.device_nbytes is None or plan.device_nbytes <= machine.device_nbytes
    return host and device


def largest_model(itemsize: int, training: Training, machine: Machine) -> int | None:
    """Return how many parameters fit, to three digits; None if no memory is known."""
    if machine.host_nbytes is None and machine.device_nbytes is None:
        return None

    def plan(numel: int) -> Prediction:
        return predict(synthetic_specs(numel, itemsize), training)

    # Bytes are nearly proportional to parameters: bisect around the number that proportion gives.
    probe = plan(_PROBE_NUMEL)
    memories = (
        (machine.host_nbytes, probe.host_nbytes * training.local_world_size),
        (machine.device_nbytes, probe.device_nbytes),
    )
    found = [_PROBE_NUMEL * have // need for have, need in memories if have is not None and need]
    guess = min([*found, MOST_NUMEL])
    guesses = [guess * 101 // 100 + 1, guess * 99 // 100, guess]
    low, high = 0, MOST_NUMEL + 1
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        numel = guesses.pop() if guesses else min(middle, 2 * low or middle)
        if low < numel < high:
            is_held = fits(plan(numel), training, machine)
            low, high = (numel, high) if is_held else (low, numel)
    return low


@dataclass(frozen=True, slots=True)
class Option:
    """A setting, and the bytes by which it would change one rank's memory; negative if it saves."""

    setting: str
    host: int
    device: int


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
            replace(spec, itemsize=2, bucket_key=f"{spec.bucket_key} halved") for spec in specs
        ]
        yield "train.dtype: bf16", halves, training
    if not training.streams:
        yield "optimizer.streaming: true", specs, replace(training, streams=True)
    if training.accumulates:
        yield "optimizer.accumulate: null", specs, replace(training, accumulates=False)
    if training.reduce_fp32:
        yield "optimizer.reduce_dtype: null", specs, replace(training, reduce_fp32=False)
    if training.replicated:
        yield "optimizer.use_offload: true", specs, replace(training, replicated=False)
    if training.amsgrad:
        yield "without amsgrad", specs, replace(training, amsgrad=False)
    if training.on_device and not training.replicated and training.offload.offload_fraction > 0.5:
        yield "memory.offload_fraction: 0.5", specs, training.with_offload(offload_fraction=0.5)
    if training.world_size > 1 and not training.replicated:
        if training.reduces:  # someone else averages in `.grad`, in its dtype
            external = replace(training, reduces=False, accumulates=False, reduce_fp32=False)
            yield "optimizer.gradient_reduction: external", specs, external
        else:
            yield "optimizer.gradient_reduction: optimizer", specs, replace(training, reduces=True)
    half_nbytes = max(1, resolve_bucket_nbytes(specs, training.policy) // 2)
    smaller = training.with_offload(bucket_nbytes=half_nbytes)
    yield f"optimizer.bucket_nbytes: {half_nbytes}", specs, smaller
    yield "twice as many ranks", specs, replace(training, world_size=2 * training.world_size)
