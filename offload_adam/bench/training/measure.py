"""Time the steps of one contender, and record the memory that it takes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

import psutil
import torch

from offload_adam.bench.peers import PeerUnavailableError
from offload_adam.bench.training.contenders import CONTENDERS, Offloading, TrainContender
from offload_adam.bench.training.model import Decoder, Sizes, make_model, make_tokens
from offload_adam.layout.budget import Category

NUM_WARMUPS = 2
"""Steps before the timed ones: the first compile and allocate, the second fill caches."""
NUM_UPDATES = 3
"""Updates that are timed by themselves."""
PRECEDING = ("reduce", "norm", "agree")
"""Phases of a step that come before its updates."""
OUT_OF_MEMORY = "the GPU has too little memory"
_SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a process is to measure.

    contender: a name of CONTENDERS, None for the model alone.
    batches: numbers of sequences, each measured by itself, the smallest first.
    time_limit_s: seconds after which the process is killed; what it has found until then counts.
    """

    contender: str | None
    sizes: Sizes
    device: str
    batches: tuple[int, ...]
    num_steps: int
    time_limit_s: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """The model's own work at one batch.

    forward_ms, forward_backward_ms: medians.
    peak_gpu_nbytes: most that torch's allocator held, None without a GPU.
    """

    forward_ms: float
    forward_backward_ms: float
    peak_gpu_nbytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A contender's training steps at one batch.

    steps_ms: each timed step, from the end of the one before, the device included.
    update_ms: its update after a backward that is over, until all of it is over; median.
    updates_only_ms: of the above what is left without reduction, norm and agreement, None where the
        contender does not tell.
    peak_gpu_nbytes: most that torch's allocator held, None without a GPU.
    peak_host_nbytes: most host memory that this contender took from before its optimizer was made
        until the end of these steps: see `HostPeak`.
    """

    steps_ms: tuple[float, ...]
    update_ms: float
    updates_only_ms: float | None
    peak_gpu_nbytes: int | None
    peak_host_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a process found.

    num_parameters: elements of the model.
    buckets: bytes that go down and up for each bucket of this package's, in no order.
    alone, steps: by batch, whichever the task asked for.
    reasons: why a batch has no result, by batch.
    unavailable: why the contender does not work here; everything else is empty then.
    """

    num_parameters: int = 0
    buckets: tuple[int, ...] = ()
    alone: Mapping[int, Alone] = field(default_factory=dict)
    steps: Mapping[int, Steps] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    unavailable: str | None = None


Tell = Callable[[Measured], None]


class HostPeak:
    """The most host memory that was taken since this was made, by samples of a thread.

    It is what the node's available memory fell, on a GPU, and else what the process's resident
    memory grew. Memory that CUDA allocates and pins is not always resident for the kernel's books.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._peak = taken_nbytes(device)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> HostPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def nbytes(self) -> int:
        """Return the peak until now."""
        self._peak = max(self._peak, taken_nbytes(self._device))
        return self._peak - self._before

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.nbytes()


def measure(task: Task, tell: Tell = lambda found: None) -> Measured:
    """Carry out a task.

    Args:
        tell: called with everything found so far after each batch.
    """
    device = torch.device(task.device)
    model = make_model(task.sizes, device)
    found = Measured(num_parameters=sum(parameter.numel() for parameter in model.parameters()))
    if task.contender is None:

        def with_alone(found: Measured, batch: int) -> Measured:
            return replace(found, alone={**found.alone, batch: _alone(model, task, batch)})

        return _each_batch(task.batches, found, with_alone, tell)
    gc.collect()
    with HostPeak(device) as host:
        try:
            contender = CONTENDERS[task.contender](model)
        except PeerUnavailableError as error:
            return Measured(unavailable=str(error))

        def with_steps(found: Measured, batch: int) -> Measured:
            steps = _steps(contender, task, batch, host)
            return replace(found, steps={**found.steps, batch: steps})

        try:
            found = replace(found, buckets=_buckets(contender))
            return _each_batch(task.batches, found, with_steps, tell)
        finally:
            contender.close()


def _each_batch(
    batches: Sequence[int],
    found: Measured,
    add: Callable[[Measured, int], Measured],
    tell: Tell,
) -> Measured:
    """Add the result of each batch, up to the first that the GPU has no memory for."""
    for batch in sorted(batches):
        try:
            found = add(found, batch)
        except torch.OutOfMemoryError:
            too_large = [other for other in batches if other >= batch]
            return replace(found, reasons=dict.fromkeys(too_large, OUT_OF_MEMORY))
        tell(found)
    return found


def _alone(model: Decoder, task: Task, batch: int) -> Alone:
    """Time the model without an optimizer."""
    device = torch.device(task.device)
    tokens = make_tokens(task.sizes, batch, device)
    reset_peak(device)

    def forward() -> None:
        model(tokens)

    def both() -> None:
        model.zero_grad()
        model(tokens).backward()

    return Alone(
        forward_ms=median(_timed(forward, task.num_steps, device)),
        # As contenders are timed: a synchronisation after each would count gaps in this alone.
        forward_backward_ms=median(_in_a_row(both, task.num_steps, device)),
        peak_gpu_nbytes=peak_nbytes(device),
    )


def _steps(contender: TrainContender, task: Task, batch: int, host: HostPeak) -> Steps:
    device = torch.device(task.device)
    tokens = make_tokens(task.sizes, batch, device)
    reset_peak(device)

    def step() -> None:
        contender.backward(tokens)
        contender.update()

    def finish() -> None:
        contender.finish()
        synchronize(device)

    steps_ms = _in_a_row(step, task.num_steps, device)
    finish()
    peak_gpu_nbytes, peak_host_nbytes = peak_nbytes(device), host.nbytes()
    updates = [_one_update(contender, tokens, finish) for _ in range(NUM_UPDATES)]
    only = [own for _, own in updates if own is not None]
    return Steps(
        steps_ms=tuple(steps_ms),
        update_ms=median(whole for whole, _ in updates),
        updates_only_ms=median(only) if only else None,
        peak_gpu_nbytes=peak_gpu_nbytes,
        peak_host_nbytes=peak_host_nbytes,
    )


def reset_peak(device: torch.device) -> None:
    """Reset the recorded peak of GPU memory to what is allocated now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_nbytes(device: torch.device) -> int | None:
    """Return the most GPU memory that torch's allocator held, None without a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _in_a_row(step: Callable[[], None], num_steps: int, device: torch.device) -> list[float]:
    """Time steps that follow each other without a wait, as training does.

    Marks are set where a step has been issued, on the device in the model's own stream. What a step
    leaves running is so in the time of the next one, as far as that waits for it.
    """
    for _ in range(NUM_WARMUPS):
        step()
    marks = [_Mark(device)]
    for _ in range(num_steps):
        step()
        marks.append(_Mark(device))
    synchronize(device)
    return [later.ms_since(earlier) for earlier, later in pairwise(marks)]


class _Mark:
    """A moment: of the device's current stream, or of the host where there is none."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time_s = time.perf_counter()

    def ms_since(self, earlier: _Mark) -> float:
        """Return the milliseconds from the earlier mark, when both are reached."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event))
        return (self._time_s - earlier._time_s) * 1e3


def _one_update(
    contender: TrainContender, tokens: torch.Tensor, finish: Callable[[], None]
) -> tuple[float, float | None]:
    """Return the milliseconds of one update by itself, and of what follows the agreement in it."""
    contender.backward(tokens)
    synchronize(tokens.device)
    start_s = time.perf_counter()
    contender.update()
    finish()
    whole_ms = (time.perf_counter() - start_s) * 1e3
    if not isinstance(contender, Offloading) or contender.optimizer.last_step is None:
        return whole_ms, None
    timings = contender.optimizer.last_step.timings
    return whole_ms, whole_ms - 1e3 * sum(timings.get(phase, 0.0) for phase in PRECEDING)


def _timed(work: Callable[[], None], num_times: int, device: torch.device) -> Sequence[float]:
    milliseconds = []
    for number in range(NUM_WARMUPS + num_times):
        synchronize(device)
        start_s = time.perf_counter()
        work()
        synchronize(device)
        if number >= NUM_WARMUPS:
            milliseconds.append((time.perf_counter() - start_s) * 1e3)
    return milliseconds


def _buckets(contender: TrainContender) -> tuple[int, ...]:
    """Return the bytes of parameters in each bucket of this package's."""
    if not isinstance(contender, Offloading):
        return ()
    entries = contender.optimizer.memory_ledger()
    return tuple(entry.nbytes for entry in entries if entry.category == Category.PARAMETERS)


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def taken_nbytes(device: torch.device) -> int:
    """Return the host memory in use: of the node, on a GPU, else of this process."""
    if device.type == "cuda":
        memory = psutil.virtual_memory()
        return int(memory.total - memory.available)
    return int(psutil.Process().memory_info().rss)
