"""What all sinks share: their interface, their optional packages, and how they read a record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import pydantic_core

from offload_adam.config import ConfigError, Mistake
from offload_adam.config.sections import ObserveSection
from offload_adam.integrations.missing import how_to_install

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""The metrics of one step, with the names of a line of `metrics.jsonl`."""

EXTRAS = {
    "http_port": ("watch", ("prometheus_client", "waitress")),
    "tensorboard": ("tensorboard", ("tensorboard",)),
    "wandb_project": ("wandb", ("wandb",)),
}
"""Key of the section `observe` -> the extra that it needs, and the packages of this extra."""


class MetricSink(Protocol):
    """Receives the record of every step, on rank 0."""

    def write(self, record: Record) -> None:
        """Process the record of one step."""

    def close(self) -> None:
        """Flush buffered records and free resources."""


class GuardedSinks:
    """Passes records to several sinks, and drops a sink that raises an exception.

    Training continues without the dropped sink; its traceback is logged.

    Owns: the sinks, until `close`.
    """

    def __init__(self) -> None:
        self._sinks: list[MetricSink] = []

    def add(self, sink: MetricSink) -> None:
        """Add a sink. Sinks are written and closed in the order in which they were added."""
        self._sinks.append(sink)

    def write(self, record: Record) -> None:
        """Write one record to every sink."""
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except Exception:
                logger.exception(
                    "Dropping %s after an error, training continues", type(sink).__name__
                )
                self._sinks.remove(sink)
                _close(sink)

    def close(self) -> None:
        """Close all sinks. Idempotent."""
        while self._sinks:
            _close(self._sinks.pop(0))


def _close(sink: MetricSink) -> None:
    try:
        sink.close()
    except Exception:
        logger.exception("Cannot close %s", type(sink).__name__)


def reject_missing_extras(section: ObserveSection) -> None:
    """Reject sinks whose packages are not installed, before the ranks join.

    Raises:
        ConfigError: naming each key and its extra.
    """
    mistakes = []
    for key, (extra, packages) in EXTRAS.items():
        missing = [package for package in packages if find_spec(package) is None]
        # Port 0 asks for a server too, although it is falsy and equals False.
        value = getattr(section, key)
        if missing and value is not None and value is not False:
            problem = f"needs {' and '.join(missing)}: {how_to_install(extra)}"
            mistakes.append(Mistake(f"observe.{key}", problem))
    if mistakes:
        raise ConfigError("configuration", mistakes)


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record by name. Names of nested values are joined by a slash.

    Bools become 0 or 1, and NaN stays NaN (the loss of a skipped step). Other values are left out.
    """
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            inner = numbers_of(value)
            numbers.update({f"{name}/{key}": number for key, number in inner.items()})
        elif isinstance(value, (bool, int, float)):
            numbers[name] = float(value)
    return numbers


def to_json(value: Any) -> str:
    """Return strict JSON in one line. Floats read back exactly.

    NaN and infinities, which JSON cannot represent, become null. Values of other types than JSON's
    become their `str`.
    """
    return pydantic_core.to_json(value, inf_nan_mode="null", fallback=str).decode()
