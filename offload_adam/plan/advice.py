"""Whether a plan fits, which settings would change it, and the largest model that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    def holds(numel: int) -> bool:
        return fits(predict(synthetic_specs(numel, itemsize), training), training, machine)

    # Bytes are nearly proportional to parameters: bisect around the number that proportion gives.
    guess = _guess(predict(synthetic_specs(_PROBE_NUMEL, itemsize), training), training, machine)
    low, high = guess * 99 // 100, min(guess * 101 // 100 + 1, MOST_NUMEL)
    while low > 0 and not holds(low):
        low, high = low // 2, low
    while holds(high):
        if high == MOST_NUMEL:
            return high
        low, high = high, min(2 * high, MOST_NUMEL)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _guess(probe: Prediction, training: Training, machine: Machine) -> int:
    """Return how many parameters fit if each needs as many bytes as those of `probe`."""
    shares = [
        (machine.host_nbytes, probe.host_nbytes * training.local_world_size),
        (machine.device_nbytes, probe.device_nbytes),
    ]
    found = [
        _PROBE_NUMEL * available // needed
        for available, needed in shares
        if available is not None and needed > 0
    ]
    return min([*found, MOST_NUMEL])


@dataclass(frozen=True, slots=True)
class Option:
    """A setting, and the bytes by which it would change one rank's memory; negative if it saves."""

    setting: str
    host: int
    device: int


def options(specs: Sequence[ParameterSpec], training: Training) -> Iterator[Option]:
    """Yield the settings that would change the memory of a rank."""
    now = predict(specs, training)
    for setting, change in _changes(specs, training):
        then = change()
        host, device = then.host_nbytes - now.host_nbytes, then.device_nbytes - now.device_nbytes
        if host or device:
            yield Option(setting, host, device)


def _changes(
    specs: Sequence[ParameterSpec], training: Training
) -> Iterator[tuple[str, Callable[[], Prediction]]]:
    """Yield each setting that could change the memory, and its prediction."""

    def with_training(**changes: object) -> Callable[[], Prediction]:
        return lambda: predict(specs, replace(training, **changes))  # type: ignore[arg-type]

    def with_offload(**changes: object) -> Callable[[], Prediction]:
        return lambda: predict(specs, training.with_offload(**changes))

    if any(spec.itemsize == 4 for spec in specs):
        halves = [
            replace(spec, itemsize=2, bucket_key=f"{spec.bucket_key} halved") for spec in specs
        ]
        yield "train.dtype: bf16", lambda: predict(halves, training)
    if not training.streams:
        yield "optimizer.streaming: true", with_training(streams=True)
    if training.accumulates:
        yield "optimizer.accumulate: null", with_training(accumulates=False)
    if training.reduce_fp32:
        yield "optimizer.reduce_dtype: null", with_training(reduce_fp32=False)
    if training.replicated:
        yield "optimizer.use_offload: true", with_training(replicated=False)
    if training.amsgrad:
        yield "without amsgrad", with_training(amsgrad=False)
    if training.on_device and not training.replicated and training.offload.offload_fraction > 0.5:
        yield "memory.offload_fraction: 0.5", with_offload(offload_fraction=0.5)
    if training.world_size > 1 and not training.replicated:
        if training.reduces:  # someone else averages in `.grad`, in its dtype
            external = with_training(reduces=False, accumulates=False, reduce_fp32=False)
            yield "optimizer.gradient_reduction: external", external
        else:
            yield "optimizer.gradient_reduction: optimizer", with_training(reduces=True)
    half_nbytes = max(1, resolve_bucket_nbytes(specs, training.policy) // 2)
    yield f"optimizer.bucket_nbytes: {half_nbytes}", with_offload(bucket_nbytes=half_nbytes)
    yield "twice as many ranks", with_training(world_size=2 * training.world_size)
