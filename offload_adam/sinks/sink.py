"""What a sink is, and that one which fails never stops training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""One step's metrics, as in a line of `metrics.jsonl`."""


class MetricSink(Protocol):
    """Takes the record of every step, on rank 0."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Finish what is buffered, and give back what the sink holds."""
        ...


class GuardedSinks:
    """Passes records to sinks, and drops a sink that raises, with a log of why.

    Owns: the sinks, until `close`.
    """

    def __init__(self, sinks: Iterable[MetricSink]) -> None:
        self._sinks = list(sinks)

    def write(self, record: Record) -> None:
        """Pass one record on."""
        for sink in list(self._sinks):
            if not _succeeds(sink, lambda sink=sink: sink.write(record)):  # type: ignore[misc]
                self._sinks.remove(sink)
                _succeeds(sink, sink.close)

    def close(self) -> None:
        """Close every sink that is left. Idempotent."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            _succeeds(sink, sink.close)


def _succeeds(sink: MetricSink, action: Callable[[], None]) -> bool:
    try:
        action()
    except Exception:
        logger.exception("%s has failed and gets no more; training goes on", type(sink).__name__)
        return False
    return True


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record by name, nested ones joined with a slash.

    Bools count as 0 and 1; what is not a number, such as the loss of a skipped step, is left out.
    """
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            inner = numbers_of(value)
            numbers.update({f"{name}/{key}": number for key, number in inner.items()})
        elif isinstance(value, (bool, int, float)):
            numbers[name] = float(value)
    return numbers
