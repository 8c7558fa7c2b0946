"""Skip the tests of this folder without a GPU, and write each result as soon as a test ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

MOST_TEXT = 4000
"""The last characters of a failure are written: the error is at its end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, help="add a line of JSON to this file as soon as a test ends"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(without)


def pytest_configure(config: pytest.Config) -> None:
    # The option exists only if this folder is on the command line.
    file: Path | None = config.getoption("--results", None)
    if file is not None:
        config.pluginmanager.register(ResultFile(file))


class ResultFile:
    """Adds each result to a file at once; pytest itself shows failures after the last test."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        found: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        if not report.passed:
            found["text"] = report.longreprtext[-MOST_TEXT:]
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
