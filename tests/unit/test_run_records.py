"""Records of a run read back exactly, and its folder never mixes the files of two runs."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from offload_adam.config import RunConfig, load_config
from offload_adam.profiling.json_lines import read_objects
from offload_adam.train import console
from offload_adam.train.console import (
    StepDisplay,
    compare_with_bigram,
    describe,
    summary_table,
)
from offload_adam.train.records import RunTotals, StepRecord
from offload_adam.train.run_folder import open_run_folder


def record(step: int = 1, loss: float = 0.1 + 0.2, val_loss: float | None = None) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        lr=1e-4 / 3,
        grad_norm=math.pi,
        skipped=False,
        step_ms=20.0,
        tokens_per_s=1e5 / 7,
        timings_ms={"forward": 5.0, "step": 15.0, "optimizer.update": 10.0},
        val_loss=val_loss,
    )


def test_floats_read_back_exactly() -> None:
    values = json.loads(record(val_loss=2 / 3).to_json())
    assert values["loss"] == 0.1 + 0.2
    assert values["lr"] == 1e-4 / 3
    assert values["grad_norm"] == math.pi
    assert values["tokens_per_s"] == 1e5 / 7
    assert values["val_loss"] == 2 / 3
    assert values["timings_ms"] == {"forward": 5.0, "step": 15.0, "optimizer.update": 10.0}


def test_absent_values_are_left_out() -> None:
    assert "val_loss" not in json.loads(record().to_json())
    assert "non_finite" not in json.loads(record().to_json())


def test_non_finite_values_are_null_in_valid_json() -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    broken = StepRecord(3, math.nan, 0.1, math.inf, True, 1.0, 1.0, {"a": -math.inf}, ("w", "b"))
    values = json.loads(broken.to_json(), parse_constant=refuse)
    assert (values["loss"], values["grad_norm"], values["timings_ms"]["a"]) == (None, None, None)
    assert values["skipped"] is True
    assert values["non_finite"] == ["w", "b"]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x" / "metrics.jsonl"
    config = RunConfig.model_validate({"run": {"name": "x", "dir": str(tmp_path)}})
    with open_run_folder(config, last_step=0) as metrics:
        for step in (1, 2):
            metrics.write(record(step).to_json() + "\n")
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            assert steps == list(range(1, step + 1))


def test_files_of_earlier_runs_move_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def prepare(seed: int) -> str:
        caplog.clear()
        values = {"run": {"name": "x", "dir": str(tmp_path), "seed": seed}}
        open_run_folder(RunConfig.model_validate(values), last_step=0).close()
        return caplog.text

    assert prepare(0) == ""
    (tmp_path / "x" / "metrics.jsonl").write_text("first")
    assert "metrics-1.jsonl and config-1.yaml" in prepare(1)
    (tmp_path / "x" / "metrics.jsonl").write_text("second")
    assert "metrics-2.jsonl and config-2.yaml" in prepare(2)
    assert (tmp_path / "x" / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "x" / "metrics-1.jsonl").read_text() == "first"
    assert (tmp_path / "x" / "metrics-2.jsonl").read_text() == "second"
    for seed, name in enumerate(("config-1.yaml", "config-2.yaml", "config.yaml")):
        assert load_config(tmp_path / "x" / name).run.seed == seed


@pytest.mark.parametrize("left", ["metrics-1.jsonl", "config-1.yaml"])
def test_no_file_of_an_earlier_run_is_overwritten(tmp_path: Path, left: str) -> None:
    """Also if only one of a run's two files has been kept."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / left).write_text("kept")
    config = RunConfig.model_validate({"run": {"name": "x", "dir": str(tmp_path)}})
    for _ in range(2):
        open_run_folder(config, last_step=0).close()
    assert (folder / left).read_text() == "kept"
    moved = {"metrics-2.jsonl", "config-2.yaml"}
    assert {path.name for path in folder.iterdir()} == {
        left,
        "metrics.jsonl",
        "config.yaml",
    } | moved


def test_a_resumed_run_drops_the_records_of_the_steps_that_it_repeats(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"run": {"name": "x", "dir": str(tmp_path)}})
    lines = [record(step).to_json() for step in (1, 2, 3, 4)]
    with open_run_folder(config, last_step=0) as metrics:
        metrics.write("\n".join([*lines, lines[0][:9]]))  # the last line is truncated
    with open_run_folder(config, last_step=2) as metrics:
        metrics.write(lines[2] + "\n")
    assert (tmp_path / "x" / "metrics.jsonl").read_text().splitlines() == lines[:3]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 1' + b"0" * 400 + b"}",
        b'{"step": 1' + b"0" * 5000 + b"}",
        b'{"step": 1e999}',
        b'{"step": NaN}',
        b'{"step": -5}',
        b'{"step": "1"}',
        b'{"loss": 1.0}',
        b"[" * 200_000,
        b"[1]",
        b"\xff\xfe",
        b"",
    ],
)
def test_a_resumed_run_drops_damaged_lines(tmp_path: Path, damage: bytes) -> None:
    config = RunConfig.model_validate({"run": {"name": "x", "dir": str(tmp_path)}})
    lines = [record(step).to_json() for step in (1, 2)]
    path = tmp_path / "x" / "metrics.jsonl"
    open_run_folder(config, last_step=0).close()
    path.write_bytes(b"\n".join([lines[0].encode(), damage, lines[1].encode()]))
    open_run_folder(config, last_step=2).close()
    assert path.read_text().splitlines() == lines
    assert {file.name for file in path.parent.iterdir()} == {"metrics.jsonl", "config.yaml"}


@pytest.mark.timeout(30)
def test_a_resumed_run_replaces_pipes(tmp_path: Path) -> None:
    """To open a pipe would block the run."""
    config = RunConfig.model_validate({"run": {"name": "x", "dir": str(tmp_path)}})
    (tmp_path / "x").mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        os.mkfifo(tmp_path / "x" / name)
    open_run_folder(config, last_step=2).close()
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == b""
    assert load_config(tmp_path / "x" / "config.yaml") == config


def test_damaged_lines_and_lines_that_lack_a_key_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert list(read_objects(path)) == []
    path.write_bytes(b'{"a": 1, "b": 2}\n{"a": 3}\n\xff\n' + b"[" * 200_000 + b"\n{\n5\n")
    assert [values for _, values in read_objects(path, "a", "b")] == [{"a": 1, "b": 2}]
    assert [values["a"] for _, values in read_objects(path, "a")] == [1, 3]


def test_the_summary_adds_up() -> None:
    totals = RunTotals(tokens_per_step=100)
    totals.add(record(1))
    totals.add(record(2, val_loss=1.75))
    text = io.StringIO()
    Console(file=text, width=100).print(
        summary_table(totals, bigram_loss=2.5, folder=Path("runs/x[/red]"))
    )
    lines = text.getvalue().splitlines()

    def row(name: str) -> str:
        return next(line for line in lines if name in line)

    assert "1.7500 nats" in row("final validation loss")
    assert "2.5000 nats" in row("bigram")
    assert "2 (0)" in row("steps (")
    assert "5,000 tokens/s" in row("throughput")  # 200 tokens in 40 ms
    assert "15.00 ms a step   75%" in row("│ step ")
    assert "runs/x[/red] " in row("run folder")  # not read as markup


def test_both_displays_show_loss_and_skips() -> None:
    skipped = StepRecord(2, math.nan, 0.1, math.nan, True, 1.0, 1.0, {}, ("head.weight",))
    for terminal in (False, True):
        text = io.StringIO()
        display = StepDisplay(Console(file=text, force_terminal=terminal, width=200), 3)
        with display.shown():
            for shown in (record(1), skipped, record(3, loss=1.25, val_loss=1.5)):
                display.show(shown)
        assert "loss 1.2500" in text.getvalue()
        assert "val 1.5000" in text.getvalue()
        assert re.search(r"step 2/3  loss nan .*  skipped\n", text.getvalue())


def test_a_log_file_gets_the_first_and_the_last_step_and_one_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    text = io.StringIO()
    display = StepDisplay(Console(file=text, width=200), 6)
    for step in range(1, 7):
        timings_ms = {"forward": 5.0, "data": 0.4, "step.norm": 3.0}
        display.show(replace(record(step), timings_ms=timings_ms))
        now_s[0] += 2.0
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "4/6", "6/6"]
    assert lines[0] == (
        "step 1/6  loss 0.3000  lr 3.33e-05  norm 3.14  14.3K tokens/s  20 ms  (forward 5)"
    )
    assert all(line.endswith("20 ms  (forward 5)") for line in lines)


PHASES = {"data": 11.0, "forward": 3456.0, "backward": 7890.0, "step": 456.0, "loss": 12.0}


@pytest.mark.parametrize(
    ("changes", "num_steps", "line"),
    [
        (
            {"step": 40, "val_loss": 3.0874},
            40,
            "step 40/40  loss 3.1854  val 3.0874  lr 1.02e-03  norm 0.999  44.5K tokens/s  12 ms  "
            "(step 1)",
        ),
        (
            {"step": 39},
            40,
            "step 39/40  loss 3.1854  lr 1.02e-03  norm 0.999  44.5K tokens/s  12 ms  "
            "(backward 7, step 1)",
        ),
        (
            {
                "step": 1_000_000,
                "val_loss": 10.9876,
                "loss": 10.1234,
                "grad_norm": 12_345.6,
                "tokens_per_s": 12_345_678.0,
                "step_ms": 12_345.6,
                "timings_ms": PHASES,
            },
            1_000_000,
            "step 1000000/1000000  loss 10.1234  val 10.9876  lr 1.02e-03  norm 1.23e+04  "
            "12.3M tokens/s  12.3 s",
        ),
        (
            {
                "step": 2**24,
                "val_loss": 123_456.0,
                "loss": 1.5e10,
                "grad_norm": 3e30,
                "tokens_per_s": 9.99e8,
                "step_ms": 1e6,
                "timings_ms": PHASES,
            },
            2**24,
            "step 16777216/16777216 loss 1.5e+10 val 1.235e+05 lr 1.02e-03 norm 3e+30 "
            "999M tokens/s 1000.0 s",
        ),
        (
            {"step": 2, "loss": math.nan, "grad_norm": math.nan, "skipped": True},
            3,
            "step 2/3  loss nan  lr 1.02e-03  norm nan  44.5K tokens/s  12 ms  "
            "(backward 7, step 1)  skipped",
        ),
        (
            {"step": 2, "step_ms": math.nan, "timings_ms": {}},
            3,
            "step 2/3  loss 3.1854  lr 1.02e-03  norm 0.999  completed from kept state",
        ),
    ],
    ids=["validated", "usual", "large", "largest", "skipped", "resumed"],
)
def test_a_step_takes_one_line_of_100_columns(
    changes: dict[str, Any], num_steps: int, line: str
) -> None:
    usual = StepRecord(
        step=1,
        loss=3.1854,
        lr=1.02e-3,
        grad_norm=0.999,
        skipped=False,
        step_ms=12.2,
        tokens_per_s=44_474.0,
        timings_ms={"data": 0.3, "forward": 3.4, "backward": 7.2, "step": 1.1, "loss": 0.2},
    )
    assert describe(replace(usual, **changes), num_steps) == line
    assert len(line) <= 100


def test_only_a_run_shorter_than_the_quickstart_is_told_to_run_it() -> None:
    steps = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml").train.num_steps
    for num_steps, other in ((steps - 1, ", or run configs/quickstart.yaml"), (steps, "")):
        *_, last = compare_with_bigram(3.0, 2.5, num_steps, 20_480, 9_900_000)
        assert last == f"Train longer, with --train.num_steps={10 * num_steps}{other}."


@pytest.mark.parametrize(
    ("val_loss", "tokens", "lines"),
    [
        (None, 100, []),
        (2.5, 100, []),
        (math.nan, 100, []),
        (
            3.08744,
            20_480,
            [
                "The model predicts worse (3.0874 nats) than a bigram model (2.5000 nats).",
                "The run was short: 40 steps are 20,480 tokens, 0.21% of the training text.",
                "Train longer, with --train.num_steps=400, or run configs/quickstart.yaml.",
            ],
        ),
        (
            2.51,
            10_000_000,
            [
                "The model predicts worse (2.5100 nats) than a bigram model (2.5000 nats).",
                "The run was not short: 40 steps are 10,000,000 tokens. Change optimizer.lr or "
                "model.sizes.",
            ],
        ),
    ],
)
def test_a_run_that_is_worse_than_the_baseline_says_what_that_means(
    val_loss: float | None, tokens: int, lines: list[str]
) -> None:
    assert list(compare_with_bigram(val_loss, 2.5, 40, tokens, 9_900_000)) == lines
    assert all(len(line) <= 100 for line in lines)
