"""An examination as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from offload_adam.doctor.finding import Finding, Status

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return one row for each finding; what to do stands below what was found."""
    table = Table("", "what", "found", title="What this machine gives a run")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for finding in findings:
        status = Text(finding.status.value, style=_STYLES[finding.status])
        table.add_row(status, Text(finding.topic), _said(finding))
    return table


def summary(findings: Sequence[Finding]) -> str:
    """Return how many findings ask for something."""
    counts = {status: sum(one.status is status for one in findings) for status in Status}
    return ", ".join(f"{count} {status.value}" for status, count in counts.items())


def _said(finding: Finding) -> Text:
    text = Text(finding.found)
    if finding.advice:
        text.append(f"\n-> {finding.advice}", style=_STYLES[finding.status])
    return text
