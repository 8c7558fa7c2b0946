"""Spans: how long each phase took, on which thread and for which bucket.

A phase is marked by `with stopwatch.span(...)`, which feeds all of these, or by `with span(...)`,
which feeds the last two:

    Stopwatch        sums the seconds of each phase        `last_step.timings`
    PROGRESS         the phase of this rank now            messages about hung ranks, `/status`
    SpanRecorder     start and end of each span            `offload-adam profile`
    record_function  a range for torch's profiler          `torch.profiler.profile(...)`

By default, `torch.profiler.profile` records the thread that starts it, and autograd's threads. To
record the update thread too, pass
`experimental_config=torch.profiler._ExperimentalConfig(profile_all_threads=True)`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from torch.profiler import record_function

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.torch_private import profiler_is_on

NO_BUCKET = -1
_NOTHING = nullcontext()

RANGES: Mapping[str, str] = {
    # In backward hooks; in `step()` for gradients that stay in `.grad`.
    "pack": "OffloadAdam::pack",  # copy a bucket's gradients to one slot
    # In `step()`.
    "wait previous": "OffloadAdam::wait_previous",  # for the previous step's updates
    "reduce": "OffloadAdam::reduce",  # wait until the gradients of all ranks are averaged
    "edits": "OffloadAdam::edits",  # find weights that the user modified
    "agree": "OffloadAdam::agree",  # the step's small all-reduce
    "device update": "OffloadAdam::device_update",  # launch updates of state on a device
    # In `step()` and in forward hooks.
    "update wait": "OffloadAdam::wait_update",  # for the update of a bucket
    "gather": "OffloadAdam::all_gather",  # issue a bucket's all-gather, or wait for it
    # On the update thread; without overlap, on the calling thread.
    "D2H copy": "OffloadAdam::d2h_copy",  # wait for a bucket's gradients, cast or add them
    "norm": "OffloadAdam::norm",  # sums of squares
    "checkpoint wait": "OffloadAdam::wait_checkpoint",  # until a snapshot has read the bucket
    "update": "OffloadAdam::update",  # the kernel
    # On the update thread, wait for the staging slot; on the copy thread, issue the copy.
    "H2D copy": "OffloadAdam::h2d_copy",
}
"""The optimizer's phases: the name in timings and reports, and the range in torch's profiler.

Spans with other names, such as those of a training loop, do not appear in torch's profiler.
"""


class Span(NamedTuple):
    """One recorded span; times are `time.perf_counter_ns()` of this process."""

    name: str
    bucket: int
    thread: str
    start_ns: int
    end_ns: int


class SpanRecorder:
    """Keeps the latest spans of all threads.

    Owns: one table of `capacity` spans, 40 bytes each, 8 MB by default. When it is full, new spans
        overwrite the oldest ones; `num_dropped` counts the overwritten spans.
    Threads: any thread may record.
    """

    def __init__(self, capacity: int = 200_000) -> None:
        self._table = np.zeros((capacity, 5), dtype=np.int64)
        self._names: dict[str, int] = {}
        self._threads: dict[int, tuple[int, str]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def add(self, name: str, bucket: int, start_ns: int, end_ns: int) -> None:
        """Record a span of the calling thread."""
        with self._lock:
            row = self._table[self._count % len(self._table)]
            row[0] = self._names.setdefault(name, len(self._names))
            row[1] = bucket
            row[2] = self._thread_number()
            row[3] = start_ns
            row[4] = end_ns
            self._count += 1

    @property
    def num_dropped(self) -> int:
        """How many spans were overwritten."""
        return max(0, self._count - len(self._table))

    def spans(self) -> list[Span]:
        """Return the recorded spans, sorted by start."""
        with self._lock:
            rows = self._table[: min(self._count, len(self._table))].copy()
            names, threads = list(self._names), [name for _, name in self._threads.values()]
        order = np.argsort(rows[:, 3], kind="stable")
        return [
            Span(names[name], bucket, threads[thread], start, end)
            for name, bucket, thread, start, end in rows[order].tolist()
        ]

    def _thread_number(self) -> int:
        ident = threading.get_ident()
        known = self._threads.get(ident)
        if known is None:
            known = (len(self._threads), threading.current_thread().name)
            self._threads[ident] = known
        return known[0]


_recorder: SpanRecorder | None = None


def span(name: str, bucket: int = NO_BUCKET) -> AbstractContextManager[None]:
    """Mark the body as one span of a phase, for the recorder and for torch's profiler.

    Cost: two function calls if there is no recorder and no profiler.
    """
    # torch's `record_function` costs several microseconds even if no profiler runs.
    if _recorder is None and not profiler_is_on():
        return _NOTHING
    return _OpenSpan(name, bucket, _recorder)


class _OpenSpan:
    """One span while it runs. It ends also if the body raises."""

    __slots__ = ("_bucket", "_name", "_range", "_recorder", "_start_ns")

    def __init__(self, name: str, bucket: int, recorder: SpanRecorder | None) -> None:
        self._name = name
        self._bucket = bucket
        self._recorder = recorder
        self._range: record_function | None = None

    def __enter__(self) -> None:
        if self._name in RANGES and profiler_is_on():
            self._range = record_function(RANGES[self._name])
            self._range.__enter__()
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, *error: Any) -> None:
        if self._recorder is not None:
            self._recorder.add(self._name, self._bucket, self._start_ns, time.perf_counter_ns())
        if self._range is not None:
            self._range.__exit__(*error)


@contextmanager
def recorded_by(recorder: SpanRecorder) -> Iterator[None]:
    """Record every span of this process, on all its threads, while the body runs."""
    global _recorder
    before = _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = before


class Stopwatch:
    """Sums the wall time of spans by phase, in seconds, and sets this rank's phase in `PROGRESS`.

    Lifecycle: one for each step, whose `elapsed_s` is read at the end of the step. Another one
        times updates and waits after `step()` has returned; the next step calls `take` on it.
    Threads: several threads may add.
    """

    def __init__(self) -> None:
        # By phase and thread, so that no lock is needed: a signal handler may interrupt the thread
        # that holds it, and wait for another one that needs it.
        self._spent_s: dict[tuple[str, int], float] = {}

    @property
    def elapsed_s(self) -> dict[str, float]:
        """The sums by phase."""
        sums: dict[str, float] = {}
        for (name, _), spent_s in list(self._spent_s.items()):
            sums[name] = sums.get(name, 0.0) + spent_s
        return sums

    def take(self) -> dict[str, float]:
        """Return the sums and reset them to zero. No thread may be in a span during the call."""
        taken, self._spent_s = self.elapsed_s, {}
        return taken

    def span(self, name: str, bucket: int = NO_BUCKET) -> AbstractContextManager[None]:
        """Add the time of the body to a phase, also if the body raises; see `span`."""
        return _Timed(self, name, bucket)

    def add(self, name: str, spent_s: float) -> None:
        """Add to the time of a phase."""
        key = name, threading.get_ident()
        self._spent_s[key] = self._spent_s.get(key, 0.0) + spent_s


class _Timed:
    """One span of a stopwatch while it runs. A generator would take longer between two kernels."""

    __slots__ = ("_name", "_phase", "_span", "_start_s", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch, name: str, bucket: int) -> None:
        self._stopwatch = stopwatch
        self._name = name
        self._phase = PROGRESS.at(name, None if bucket == NO_BUCKET else bucket)
        self._span = span(name, bucket)

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()
        self._phase.__enter__()
        self._span.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            self._span.__exit__(*error)
            self._phase.__exit__(*error)
        finally:
            self._stopwatch.add(self._name, time.perf_counter() - self._start_s)
