"""A pytest plugin that prints how many tests ran and were left out, by marker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

_UNMARKED = "unmarked"
_TOTAL = "total"
# Markers without arguments that pytest and hypothesis declare beside the project's own.
_FOREIGN = {"tryfirst", "trylast", "hypothesis"}


class MarkerSummary:
    """Counts tests by the markers that `pyproject.toml` declares.

    A test with two markers counts in both rows, so the rows may add up to more than the total.
    """

    def __init__(self, config: pytest.Config) -> None:
        declared = [line.split(":")[0].strip() for line in config.getini("markers")]
        self._names = [name for name in declared if "(" not in name and name not in _FOREIGN]
        self._required: str | None = config.getoption("--require-marker")
        self._rows_of: dict[str, list[str]] = {}
        self._ran: Counter[str] = Counter()
        self._passed: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def _rows(self, item: pytest.Item) -> list[str]:
        return [*([n for n in self._names if item.get_closest_marker(n)] or [_UNMARKED]), _TOTAL]

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            self._left_out.update(self._rows(item))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._rows_of[item.nodeid] = self._rows(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rows = self._rows_of.get(report.nodeid, [_TOTAL])
        if report.skipped:
            self._skipped.update(rows)
        elif report.when == "call" or (report.when == "setup" and report.failed):
            self._ran.update(rows)
            if report.passed:
                self._passed.update(rows)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._required and not self._passed[self._required]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("tests by marker")
        write = terminalreporter.write_line
        write(f"{'marker':<14}{'ran':>8}{'skipped':>10}{'left out':>10}")
        for row in [_UNMARKED, *self._names, _TOTAL]:
            counts = (self._ran[row], self._skipped[row], self._left_out[row])
            if any(counts):
                write(f"{row:<14}{counts[0]:>8}{counts[1]:>10}{counts[2]:>10}")
        if self._left_out:
            write("left out by -m or -k; launch/test.sh --all leaves nothing out")
        if self._required and not self._passed[self._required]:
            write(f"ERROR: no {self._required} test passed", red=True)
