"""Where the host's time goes within one step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time of named phases, in milliseconds, from its construction on.

    The host's time: work that was only launched on a GPU counts where the host waits for it.
    """

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self.timings_ms: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's time to the phase `name`."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - started_s) * 1e3
            self.timings_ms[name] = self.timings_ms.get(name, 0.0) + elapsed_ms

    def elapsed_ms(self) -> float:
        """Return the time since construction."""
        return (time.perf_counter() - self._started_s) * 1e3
