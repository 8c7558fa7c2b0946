"""Time the steps of one contender and record the memory that it takes.

Each contender runs in its own process, so that its memory and threads end with it.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import psutil
import torch

from offload_adam.bench.peers import PeerUnavailableError
from offload_adam.bench.training.contenders import (
    CONTENDERS,
    MODEL_ALONE,
    PACKAGES,
    ModelAlone,
    Offloading,
    TrainContender,
)
from offload_adam.bench.training.model import Sizes, make_model, make_tokens
from offload_adam.layout.budget import Category

logger = logging.getLogger(__name__)

NUM_WARMUPS = 2
"""Steps before the timed ones: the first compiles and allocates, the second fills caches."""
NUM_UPDATES = 3
"""Updates that are timed alone, after backward has finished."""
PRECEDING = ("reduce", "norm", "agree")
"""Phases of a step that come before its updates."""
OUT_OF_MEMORY = "out of GPU memory"
_SAMPLE_S = 0.05
START_METHOD = "spawn"  # a forked process cannot use CUDA
_POLL_S = 1.0  # between checks that the process is alive
_EXIT_S = 10.0  # for the process to exit after its results; then it is killed
_DONE = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process measures.

    contender: a name of CONTENDERS, or MODEL_ALONE.
    batches: numbers of sequences, measured in ascending order.
    time_limit_s: seconds until the process is killed; results until then count.
    """

    contender: str
    sizes: Sizes
    device: str
    batches: tuple[int, ...]
    num_steps: int
    time_limit_s: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Training steps of one contender at one batch.

    steps_ms: each timed step, including its work on the device, from the end of the step before.
    forward_ms: median of the forward, for the model alone.
    update_ms: median time from the end of backward until the whole update has finished; None for
        the model alone.
    updates_only_ms: update_ms without reduction, norm and agreement; None for other optimizers.
    peak_gpu_nbytes: maximum that torch's allocator held, None without a GPU.
    peak_host_nbytes: maximum of host memory from before the optimizer was made until the end of
        these steps, see `HostPeak`.
    """

    steps_ms: tuple[float, ...]
    forward_ms: float | None = None
    update_ms: float | None = None
    updates_only_ms: float | None = None
    peak_gpu_nbytes: int | None = None
    peak_host_nbytes: int = 0

    @property
    def step_ms(self) -> float:
        """Median of the steps."""
        return median(self.steps_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Results of a process.

    num_parameters: elements of the model.
    buckets: bytes of the parameters in each of this package's buckets, in no order.
    steps: by batch.
    reasons: why a batch has no result, by batch.
    unavailable: why the contender does not work here; the other fields are empty then.
    """

    num_parameters: int = 0
    buckets: tuple[int, ...] = ()
    steps: Mapping[int, Steps] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    unavailable: str | None = None


def in_own_process(task: Task) -> Measured:
    """Carry out a task in a spawned process, within its time limit.

    If the process fails or hangs, return the batches measured so far, and the reason for each batch
    that is missing.
    """
    package = PACKAGES.get(task.contender)
    if package is not None and importlib.util.find_spec(package) is None:
        # Without this check, a process would take seconds to find the same.
        return Measured(unavailable="not installed")
    context: Any = multiprocessing.get_context(START_METHOD)
    answers: Any = context.Queue()
    process = context.Process(target=_answer, args=(task, answers), daemon=True)
    process.start()
    try:
        found, failure = _collect(answers, process, task.time_limit_s)
        if failure is None:
            process.join(timeout=_EXIT_S)
            return found
    finally:
        process.kill()
        process.join()
    logger.warning("Failed to measure %s: %s", task.contender, failure)
    missing = [batch for batch in task.batches if batch not in found.steps]
    return replace(found, reasons={**dict.fromkeys(missing, failure), **found.reasons})


def _collect(answers: Any, process: Any, time_limit_s: float) -> tuple[Measured, str | None]:
    """Return the last results of the process, and the reason if it did not finish."""
    found = Measured()
    end_s = time.monotonic() + time_limit_s
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            answer = answers.get(timeout=min(_POLL_S, left_s))
        except queue.Empty:
            if not process.is_alive() and answers.empty():
                return found, f"its process ended with {process.exitcode}"
            continue
        if answer is _DONE:
            return found, None
        if isinstance(answer, str):
            return found, answer
        found = answer
    return found, f"it did not end within {time_limit_s:.0f} s"


def _answer(task: Task, answers: Any) -> None:
    """Put the results into the queue after each batch, then _DONE or the text of an error."""
    try:
        answers.put(measure(task, answers.put))
        answers.put(_DONE)
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        answers.put(f"{type(error).__name__}: {first}")


class HostPeak:
    """The maximum of host memory taken since this object was made, sampled by a thread.

    On a GPU, this is the decrease of the node's available memory: the resident memory of a process
    does not always include memory that CUDA pins. On a CPU, it is the growth of resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._peak = self._taken_nbytes()
        # Without this lock, one thread could overwrite a higher peak of the other.
        self._lock = threading.Lock()
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
        with self._lock:
            self._peak = max(self._peak, self._taken_nbytes())
            return self._peak - self._before

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.nbytes()

    def _taken_nbytes(self) -> int:
        if self._device.type == "cuda":
            memory = psutil.virtual_memory()
            return int(memory.total - memory.available)
        return int(psutil.Process().memory_info().rss)


def measure(task: Task, tell: Callable[[Measured], None] = lambda found: None) -> Measured:
    """Carry out a task, up to the first batch that does not fit into the GPU.

    Args:
        tell: called after each batch with all results so far.
    """
    device = torch.device(task.device)
    model = make_model(task.sizes, device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    gc.collect()
    with HostPeak(device) as host:
        try:
            contender = {MODEL_ALONE: ModelAlone, **CONTENDERS}[task.contender](model)
        except PeerUnavailableError as error:
            return Measured(unavailable=str(error))
        try:
            found = Measured(num_parameters=num_parameters, buckets=_buckets(contender))
            for batch in sorted(task.batches):
                try:
                    steps = _steps(contender, task, batch, host)
                except torch.OutOfMemoryError:
                    too_large = [other for other in task.batches if other >= batch]
                    return replace(found, reasons=dict.fromkeys(too_large, OUT_OF_MEMORY))
                found = replace(found, steps={**found.steps, batch: steps})
                tell(found)
            return found
        finally:
            contender.close()


def _buckets(contender: TrainContender) -> tuple[int, ...]:
    if not isinstance(contender, Offloading):
        return ()
    entries = contender.optimizer.memory_ledger()
    return tuple(entry.nbytes for entry in entries if entry.category == Category.PARAMETERS)


def _steps(contender: TrainContender, task: Task, batch: int, host: HostPeak) -> Steps:
    device = torch.device(task.device)
    tokens = make_tokens(task.sizes, batch, device)
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        contender.backward(tokens)
        contender.update()

    steps_ms = _consecutive_ms(step, task.num_steps, device)
    contender.finish()
    synchronize(device)
    steps = Steps(
        steps_ms=tuple(steps_ms),
        peak_gpu_nbytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        peak_host_nbytes=host.nbytes(),
    )
    if isinstance(contender, ModelAlone):
        forwards = [
            _elapsed_ms(device, lambda: contender.model(tokens))
            for _ in range(NUM_WARMUPS + task.num_steps)
        ]
        return replace(steps, forward_ms=median(forwards[NUM_WARMUPS:]))
    updates = [_update_ms(contender, tokens) for _ in range(NUM_UPDATES)]
    only = [own for _, own in updates if own is not None]
    return replace(
        steps,
        update_ms=median(whole for whole, _ in updates),
        updates_only_ms=median(only) if only else None,
    )


def _consecutive_ms(step: Callable[[], None], num_steps: int, device: torch.device) -> list[float]:
    """Time steps that follow each other without a wait, as in training.

    On a GPU, events in the model's stream mark the end of each step. Work that a step leaves
    running counts in the next step, as far as the next step waits for this work.
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
    """A point in time: of the device's current stream on a GPU, otherwise of the host."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time_s = time.perf_counter()

    def ms_since(self, earlier: _Mark) -> float:
        """Return the milliseconds since an earlier mark. The device must have passed both."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event))
        return (self._time_s - earlier._time_s) * 1e3


def _update_ms(contender: TrainContender, tokens: torch.Tensor) -> tuple[float, float | None]:
    """Return the milliseconds of one update after backward has finished.

    The second value leaves out the phases in PRECEDING; it is None for other optimizers.
    """

    def update() -> None:
        contender.update()
        contender.finish()

    contender.backward(tokens)
    whole_ms = _elapsed_ms(tokens.device, update)
    if not isinstance(contender, Offloading) or contender.optimizer.last_step is None:
        return whole_ms, None
    timings = contender.optimizer.last_step.timings
    return whole_ms, whole_ms - 1e3 * sum(timings.get(phase, 0.0) for phase in PRECEDING)


def _elapsed_ms(device: torch.device, work: Callable[[], object]) -> float:
    """Return the milliseconds of some work, from an idle device until it is idle again."""
    synchronize(device)
    start_s = time.perf_counter()
    work()
    synchronize(device)
    return (time.perf_counter() - start_s) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; do nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
