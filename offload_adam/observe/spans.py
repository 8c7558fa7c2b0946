"""Spans: which phase of a step took how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Spans(Protocol):
    """Something that is told when a named phase starts and ends."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return a context that encloses one stretch of the phase `name`."""
        ...


class NullSpans:
    """Spans that nobody watches."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()


class Stopwatch:
    """Wall time in seconds, summed for each name.

    Lifecycle: one for each step; read `elapsed_s` when the step is over.
    """

    def __init__(self) -> None:
        self.elapsed_s: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time inside the context to `name`, also where it raises."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            spent_s = time.perf_counter() - start_s
            self.elapsed_s[name] = self.elapsed_s.get(name, 0.0) + spent_s
