"""`offload-adam profile`: the files it writes, with and without its extra, and its exit codes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.integrations.missing import how_to_install

TINY = str(Path(__file__).parents[3] / "configs" / "tiny.yaml")
SHORT = ("--train.num_steps=3", "--train.eval_sequences=2", "--schedule.warmup_steps=0")
ALWAYS = {"config.yaml", "metrics.jsonl", "memory.jsonl", "trace.json"}


def profile(folder: Path, *overrides: str) -> tuple[int, set[str]]:
    """Profile the tiny run, and return the exit code and the names of the files."""
    settings = [TINY, f"--run.dir={folder}", *SHORT, *overrides]
    result = CliRunner().invoke(app, ["profile", *settings])
    written = {path.name for path in (folder / "tiny").glob("*")}
    return result.exit_code, written


def test_the_command_profiles_a_run(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    assert profile(tmp_path) == (0, ALWAYS | {"report.html"})


def test_without_the_extra_all_else_is_written_and_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with caplog.at_level(logging.INFO):
        assert profile(tmp_path) == (0, ALWAYS)
    assert f"report.html needs vl-convert-python: {how_to_install('report')}" in caplog.text
    assert "A step takes" in caplog.text
    assert "Memory peaked" in caplog.text


def test_a_wrong_setting_ends_with_2_and_writes_nothing(tmp_path: Path) -> None:
    assert profile(tmp_path, "--profile.interval_ms=0") == (2, set())
