"""The result of one check, and the table of all results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

STATUSES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
"""The statuses of findings with their styles, from the least to the most severe."""


class Finding(NamedTuple):
    """What a check found, and what to do about it.

    advice: what to do; "" if nothing needs to be done. A run that ignores the advice takes more
        time or memory than it needs.
    is_fatal: a run that ignores the advice cannot start, or is sure to fail later.
    """

    topic: str
    found: str
    advice: str = ""
    is_fatal: bool = False

    @property
    def status(self) -> str:
        """Return the key of `STATUSES`."""
        return "failed" if self.is_fatal else "warning" if self.advice else "ok"


def worst(findings: Iterable[Finding]) -> str:
    """Return the most severe status, ok if there are no findings."""
    return max((one.status for one in findings), key=list(STATUSES).index, default="ok")


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return one row for each finding, with the advice below what was found."""
    table = Table("", "check", "found", title="Checks of this machine")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for finding in findings:
        style = STATUSES[finding.status]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style=style)
        table.add_row(Text(finding.status, style=style), Text(finding.topic), text)
    return table


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of findings of each status, such as "9 ok, 1 warning, 0 failed"."""
    counts = Counter(one.status for one in findings)
    plural = "" if counts["warning"] == 1 else "s"
    return f"{counts['ok']} ok, {counts['warning']} warning{plural}, {counts['failed']} failed"
