"""Real runs with one slow resource: the report names it, and the setting that helps."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_adam.kernels.threads import allowed_cores
from offload_adam.sharded_optimizer import ShardedOptimizer
from tests.distributed import throttled_train
from tests.support.devices import HOST_AS_DEVICE
from tests.support.torchrun import run_two_ranks
from tests.unit.test_train_alone import SMALL, run

pytest.importorskip("vl_convert")

ROOT = Path(__file__).parents[2]
TRAIN = SMALL["train"] | {"num_steps": 4}
COMPUTE = "is spent on the model's forward and backward"


def finding(folder: Path) -> str:
    """Return the sentence at the top of a run's report."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r"<p><b>(A step takes .*?)</b></p>", page, re.DOTALL)
    assert found is not None
    return html.unescape(found[1])


def run_throttled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str | None, **optimizer: Any
) -> str:
    """Profile a small run with one resource throttled, or none, and return the sentence."""
    if what is not None:
        owner, name, delay_s = throttled_train.USED_BY[what]
        monkeypatch.setattr(owner, name, throttled_train.slowed(getattr(owner, name), delay_s))
    # Gradients and parameters are copied as they are between a device and the host. Unpinned, they
    # are copied by the step itself, where the time that a copy takes is the step's.
    unpinned = replace(HOST_AS_DEVICE, make_runtime=lambda _: None)
    monkeypatch.setattr(ShardedOptimizer, "_backend", unpinned)
    run(folder, train=TRAIN, optimizer={"overlap": False, **optimizer}, profile={"enabled": True})
    return finding(folder / "case")


def test_an_unthrottled_run_is_bound_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = run_throttled(tmp_path, monkeypatch, None)
    assert COMPUTE in sentence
    assert "none of its settings makes steps faster" in sentence


def test_a_slow_update_asks_for_more_threads_or_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = run_throttled(tmp_path / "all", monkeypatch, "cpu")
    assert "is spent on the norm and the update. All cores are busy with it" in sentence
    if allowed_cores() > 1:
        sentence = run_throttled(tmp_path / "one", monkeypatch, None, num_threads=1)
        assert f"The update runs on 1 of {allowed_cores()} cores: raise optimizer.num" in sentence


def test_slow_copies_ask_for_narrower_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = run_throttled(tmp_path, monkeypatch, "copies")
    assert (
        "is spent on copies between host and device. Set train.dtype: bf16, which halves"
        in sentence
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_slow_collectives_ask_for_rarer_ones(tmp_path: Path) -> None:
    train(tmp_path, "collectives")
    sentence = finding(tmp_path / "tiny")
    assert re.search(r"is spent on other ranks: \d+% on transfers between ranks, ", sentence)
    assert "Raise train.gradient_accumulation_steps: gradients are averaged" in sentence
    assert "Rank" not in sentence


@pytest.mark.slow
@pytest.mark.distributed
def test_a_slow_rank_is_named_and_what_it_is_slow_in(tmp_path: Path) -> None:
    train(tmp_path, "forward@1")
    sentence = finding(tmp_path / "tiny")
    assert re.search(r"on other ranks: \d+% on waiting for late ranks, ", sentence)
    late = re.search(
        r"Rank 1 on \S+ is ([\d.]+) ms later than other ranks: its forward takes", sentence
    )
    assert late is not None
    # Two microbatches a step, of 150 ms more each.
    assert float(late[1]) == pytest.approx(300.0, rel=0.2)


def train(folder: Path, what: str) -> None:
    """Profile the tiny run on two ranks with one resource throttled."""
    settings = [str(ROOT / "configs" / "tiny.yaml"), f"--run.dir={folder}"]
    settings += ["--train.num_steps=6", "--train.eval_sequences=8", "--schedule.warmup_steps=0"]
    arguments = [throttled_train.__file__, what, "profile", *settings]
    run_two_ranks(arguments, folder, timeout_s=100)
