"""A profiled run: what it writes, that it adds up, and that it changes no bit."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from rich.console import Console

from offload_adam.config import RunConfig
from offload_adam.doctor import bandwidth_cache
from offload_adam.train.job import run_job
from offload_adam.train.model import build_model
from tests.unit.test_train_alone import SMALL, run

COSINE = {"min_lr": 0.001, "max_lr": 0.01, "decay_steps": 8}
STEPS = SMALL["train"] | {"num_steps": 8}


def bits(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"streaming": False},
        {"name": "Adam", "learning_rate": 0.01, "use_offload": True},
        {
            "name": "Adam",
            "learning_rate": {"name": "WarmUpLR", "learning_rate": 0.01, "warmup_steps": 4},
        },
        {"name": "Adam", "loss_scale": 64.0, "weight_decay": 0.1, "max_grad_norm": 1.0},
    ],
    ids=str,
)
def test_a_profiled_run_is_the_same_run(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    sections: dict[str, Any] = {**SMALL, "train": STEPS, "optimizer": optimizer}
    plain = run_with(tmp_path / "plain", sections)
    recorded = run_with(tmp_path / "recorded", {**sections, "profile": {"enabled": True}})
    assert bits(plain) == bits(recorded)
    folder = tmp_path / "recorded" / "case"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    steps = [event for event in spans if event["cat"] == "train step"]
    assert [step["name"] for step in steps] == [f"train step #{n}" for n in range(1, 9)]
    shares = []
    for step in steps:
        end = step["ts"] + step["dur"]
        inside = [s for s in spans if step["ts"] <= s["ts"] and s["ts"] + s["dur"] <= end]
        names = {event["cat"] for event in inside}
        assert {"data", "forward", "backward", "step", "norm", "update", "loss"} <= names
        phases = [s for s in inside if s["cat"] in ("data", "forward", "backward", "step", "loss")]
        covered = sum(event["dur"] for event in phases)
        assert covered <= step["dur"] + 1.0
        shares.append(covered / step["dur"])
    assert median(shares) > 0.5  # another process may take the core between two phases
    samples = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    assert samples[-1]["ledger"]["exp_avg"] > 0
    assert samples[-1]["rss"] > samples[-1]["ledger"]["exp_avg"]
    pytest.importorskip("vl_convert")
    assert "A step takes" in (folder / "report.html").read_text(encoding="utf-8")


def run_with(folder: Path, sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Train with exactly these sections, and return the records."""
    values = {**sections, "run": {"name": "case", "dir": str(folder)}}
    run_job(RunConfig.model_validate(values), Console(file=io.StringIO()))
    lines = (folder / "case" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_without_profiling_nothing_is_written(tmp_path: Path) -> None:
    run(tmp_path, train=STEPS)
    assert {path.name for path in (tmp_path / "case").iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_the_report_compares_updates_with_what_doctor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vl_convert")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bandwidth_cache.keep(bandwidth_cache.Bandwidth({1: 20.0}, 2.0))
    run_with(tmp_path, {**SMALL, "train": STEPS, "profile": {"enabled": True}})
    page = (tmp_path / "case" / "report.html").read_text(encoding="utf-8")
    said = re.search(r"move ([\d.]+) GB/s on rank 0, (\d+)% of the 20\.0 GB/s", page)
    assert said is not None
    events = json.loads((tmp_path / "case" / "trace.json").read_text())["traceEvents"]
    update_us = median(event["dur"] for event in events if event.get("name") == "update #0")
    # fp32 in one bucket: 4 bytes of gradient, and 3 times 8 of state.
    model = build_model(RunConfig.model_validate(SMALL))
    numel = sum(-(-p.numel() // 128) * 128 for p in model.parameters())
    expected = 28 * numel / update_us / 1e3
    assert float(said[1]) == pytest.approx(expected, abs=0.06)
    assert float(said[2]) == pytest.approx(100 * expected / 20.0, abs=0.6)
    # The norm reads 4 bytes more, at what a step was measured to get.
    planned = re.search(r"and the update. The plan predicts ([\d.]+) ms .* by doctor", page)
    assert planned is not None
    assert float(planned[1]) == pytest.approx(32 * numel / 2.0 / 1e6, abs=0.06)


def test_a_report_shows_no_share_of_a_bandwidth_that_updates_exceed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("plotly")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bandwidth_cache.keep(bandwidth_cache.Bandwidth({1: 1e-4}))
    run_with(tmp_path, {**SMALL, "train": STEPS, "profile": {"enabled": True}})
    page = (tmp_path / "case" / "report.html").read_text(encoding="utf-8")
    (note,) = re.findall(r"<p>(Updates move .*?)</p>", page)
    assert "%" not in note
    assert note.endswith("Run offload-adam doctor again on an idle machine.")
    assert "more than the 0.0 GB/s that were measured as its share" in caplog.text
    assert "Run offload-adam doctor again on an idle machine." in caplog.text
