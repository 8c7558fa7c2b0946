"""Every test of this folder needs a GPU, and is skipped without one; results are kept at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

MOST_TEXT = 4000
"""Characters of a failure that are kept: its end, where the error is."""


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
    # Without this folder on the command line the option does not exist.
    file: Path | None = config.getoption("--results", None)
    if file is not None:
        config.pluginmanager.register(ResultFile(file))


class ResultFile:
    """Adds each result to a file at once: pytest itself shows failures when all tests are over."""

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
