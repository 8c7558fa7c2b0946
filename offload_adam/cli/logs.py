"""The log of a command on stderr: one record a line, with time, level and rank, as text or JSON."""

from __future__ import annotations

import json
import logging
import warnings
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

from offload_adam.coordinator.launcher import launched
from offload_adam.printable import printable

_TEXT = "%(asctime)s %(levelname)-7s rank %(rank)s %(name)s: %(message)s"


class LogFormat(StrEnum):
    """How log records are written: text for people, JSON for a log collector."""

    TEXT = "text"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object on one line; `time` is ISO 8601 in UTC.

    Keys: time, level, rank, logger, message, and exception with the traceback of an error.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        values = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "rank": self._rank,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)


class _TextFormatter(logging.Formatter):
    """Escapes control characters, which a name of a file could bring into the log."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def configure_logging(log_format: LogFormat) -> None:
    """Write log records and Python warnings to stderr.

    Rank 0 logs from INFO on, the other ranks from WARNING on: their node or GPU may be the one with
    a problem. The package logs a message that would be the same on all ranks on rank 0 only. Of
    Python's warnings, the other ranks show RuntimeWarnings, which concern a process or its machine.
    A UserWarning concerns the user's code or configuration, which all ranks share.

    Only commands call this: the library itself configures no logging. If the root logger has
    handlers already, they are kept and no handler is added.
    """
    rank = launched("RANK")
    handler = logging.StreamHandler()
    if log_format == LogFormat.JSON:
        handler.setFormatter(JsonFormatter(rank))
    else:
        handler.setFormatter(_TextFormatter(_TEXT, "%Y-%m-%d %H:%M:%S", defaults={"rank": rank}))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("offload_adam").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # logging.captureWarnings would log two lines for each warning, the second of source code.
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if launched("RANK") == 0 or issubclass(category, RuntimeWarning):
        logger = logging.getLogger("py.warnings")
        logger.warning("%s: %s (%s, line %d)", category.__name__, message, filename, lineno)
