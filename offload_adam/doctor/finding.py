"""One line of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a finding is to be taken: it is right, it costs speed or room, or a run cannot start."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at and found, and what to do where it is not right.

    advice: empty exactly where the status is ok.
    """

    topic: str
    status: Status
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.status is Status.OK) == bool(self.advice):
            raise AssertionError(f"{self.topic}: {self.status} with the advice {self.advice!r}")


def ok(topic: str, found: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(topic, Status.OK, found)


def warning(topic: str, found: str, advice: str) -> Finding:
    """Return a finding that costs a run speed or room."""
    return Finding(topic, Status.WARNING, found, advice)


def failed(topic: str, found: str, advice: str) -> Finding:
    """Return a finding with which a run cannot start, or is sure to fail."""
    return Finding(topic, Status.FAILED, found, advice)


def worst(findings: Iterable[Finding]) -> Status:
    """Return the gravest status of all."""
    present = {finding.status for finding in findings}
    return next(one for one in reversed(Status) if one in present or one is Status.OK)
