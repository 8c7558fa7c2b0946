"""Spans: which phase took how long, on which thread and for which bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np

from offload_adam.coordinator.progress import PROGRESS

NO_BUCKET = -1
_NOTHING = nullcontext()


class Spans(Protocol):
    """Something that is told when a named phase starts and ends."""

    def span(self, name: str, bucket: int = NO_BUCKET) -> AbstractContextManager[None]:
        """Return a context that encloses one stretch of the phase `name`, for one bucket or all."""
        ...


class NullSpans:
    """Spans that nobody watches."""

    def span(self, name: str, bucket: int = NO_BUCKET) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return _NOTHING


class Span(NamedTuple):
    """One recorded stretch; times are `time.perf_counter_ns()` of this process."""

    name: str
    bucket: int
    thread: str
    start_ns: int
    end_ns: int


class SpanRecorder:
    """Keeps the latest spans of every thread, in memory that is allocated once.

    Owns: room for `capacity` spans, 40 bytes each; when it is full the oldest are written over and
    `num_dropped` counts them. Any thread may record.
    """

    def __init__(self, capacity: int = 200_000) -> None:
        self._table = np.zeros((capacity, 5), dtype=np.int64)
        self._names: dict[str, int] = {}
        self._threads: dict[int, tuple[int, str]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def span(self, name: str, bucket: int = NO_BUCKET) -> AbstractContextManager[None]:
        """Return a context that records what it encloses, also where that raises."""
        return _Recording(self, name, bucket)

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
        """How many spans have been written over."""
        return max(0, self._count - len(self._table))

    def spans(self) -> list[Span]:
        """Return what has been recorded, by start."""
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


class _Recording:
    """One span while it runs."""

    __slots__ = ("_bucket", "_name", "_recorder", "_start_ns")

    def __init__(self, recorder: SpanRecorder, name: str, bucket: int) -> None:
        self._recorder = recorder
        self._name = name
        self._bucket = bucket

    def __enter__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._recorder.add(self._name, self._bucket, self._start_ns, time.perf_counter_ns())


_recorder: Spans = NullSpans()


def span(name: str, bucket: int = NO_BUCKET) -> AbstractContextManager[None]:
    """Enclose a stretch that the process's recorder keeps; without one it costs a call."""
    return _recorder.span(name, bucket)


@contextmanager
def recorded_by(recorder: Spans) -> Iterator[None]:
    """Let every `span` of this process, on all its threads, go to `recorder` inside."""
    global _recorder
    before = _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = before


class Stopwatch:
    """Wall time in seconds, summed for each name; the process's recorder keeps each stretch.

    A span is also where this process is meanwhile.

    Lifecycle: one for each step, whose `elapsed_s` is read when the step is over; or one for what
        runs beside the steps, of which `take` gives what has been added since.
    Threads: several may add, each to names of its own.
    """

    def __init__(self) -> None:
        self.elapsed_s: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Return the sums so far and begin anew; nothing may be adding meanwhile."""
        taken, self.elapsed_s = self.elapsed_s, {}
        return taken

    @contextmanager
    def span(self, name: str, bucket: int = NO_BUCKET) -> Iterator[None]:
        """Add the time inside the context to `name`, also where it raises."""
        start_s = time.perf_counter()
        try:
            with PROGRESS.at(name, None if bucket == NO_BUCKET else bucket), span(name, bucket):
                yield
        finally:
            spent_s = time.perf_counter() - start_s
            self.elapsed_s[name] = self.elapsed_s.get(name, 0.0) + spent_s
