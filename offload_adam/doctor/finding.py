"""The result of one check, and the table of all results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table
from rich.text import Text


class Status(StrEnum):
    """Severity of a finding: nothing to do, slower or tighter than need be, or a run will fail."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it.

    advice: empty if and only if the status is ok.
    """

    topic: str
    status: Status
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.status is Status.OK) == bool(self.advice):
            raise AssertionError(f"{self.topic}: {self.status} with the advice {self.advice!r}")


def ok(topic: str, found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(topic, Status.OK, found)


def warning(topic: str, found: str, advice: str) -> Finding:
    """Return a finding that costs a run time or memory."""
    return Finding(topic, Status.WARNING, found, advice)


def failed(topic: str, found: str, advice: str) -> Finding:
    """Return a finding with which a run cannot start, or is sure to fail later."""
    return Finding(topic, Status.FAILED, found, advice)


def worst(findings: Iterable[Finding]) -> Status:
    """Return the most severe status, ok if there are no findings."""
    return max((one.status for one in findings), key=list(Status).index, default=Status.OK)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return one row for each finding, with the advice below what was found."""
    table = Table("", "check", "found", title="Checks of this machine")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for finding in findings:
        style = _STYLES[finding.status]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style=style)
        table.add_row(Text(finding.status.value, style=style), Text(finding.topic), text)
    return table


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of findings of each status."""
    counts = {status: sum(one.status is status for one in findings) for status in Status}
    return ", ".join(f"{count} {status.value}" for status, count in counts.items())
