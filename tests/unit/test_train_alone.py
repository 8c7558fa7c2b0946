"""The job on one rank, in this process: what a run writes, and what a skipped step does."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from offload_adam.config import ConfigError, RunConfig
from offload_adam.optimizer import OffloadAdam
from offload_adam.train import loop
from offload_adam.train.data import sample_batch
from offload_adam.train.job import run_job
from offload_adam.train.model import next_token_loss

SMALL: dict[str, dict[str, Any]] = {
    "model": {"sizes": {"num_layers": 1, "width": 16, "num_heads": 2}},
    "train": {"num_steps": 30, "batch_size": 4, "sequence_length": 16, "eval_sequences": 8},
    "optimizer": {"lr": 1e-2},
}


def run(folder: Path, **sections: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Train with `SMALL` changed by sections; return the records and what was printed."""
    values: dict[str, Any] = {name: dict(section) for name, section in SMALL.items()}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    values["run"] = {"name": "case", "dir": str(folder)}
    text = io.StringIO()
    run_job(RunConfig.model_validate(values), Console(file=text, width=120))
    lines = (folder / "case" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], text.getvalue()


def test_a_run_repeats_to_the_bit(tmp_path: Path) -> None:
    first, printed = run(tmp_path / "a")
    second, _ = run(tmp_path / "b")
    for name in ("step", "loss", "lr", "grad_norm", "skipped"):
        assert [record[name] for record in first] == [record[name] for record in second]
    assert first[-1]["val_loss"] == second[-1]["val_loss"]
    assert first[-1]["val_loss"] < first[0]["loss"] - 1.0
    assert f"{first[-1]['val_loss']:.4f} nats" in printed
    # 30 steps of 64 tokens are too few to learn more than a table of byte pairs.
    assert printed.splitlines()[-2:] == [
        "The run was short: 30 steps are 1,920 tokens, "
        f"{192_000 / training_tokens(printed):.2g}% of the training text.",
        "Train longer, with --train.num_steps=300, or run configs/quickstart.yaml.",
    ]


def training_tokens(printed: str) -> int:
    """Return the bytes of the training split, as the run names them."""
    found = re.search(r"([\d,]+) bytes for training", printed)
    assert found is not None
    return int(found[1].replace(",", ""))


def test_evaluations_stand_where_they_were_asked_for(tmp_path: Path) -> None:
    records, _ = run(tmp_path, train=SMALL["train"] | {"num_steps": 8, "eval_every": 3})
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6, 8]


class Clock:
    """A clock that a test moves on by hand. `now_s` is its time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def after(self, work: Callable[..., Any], spent_s: float) -> Callable[..., Any]:
        """Return a function that does `work` and moves the clock on by `spent_s` seconds."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            self.now_s += spent_s
            return result

        return timed


def test_the_phases_of_a_step_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All time in a step belongs to exactly one phase."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    monkeypatch.setattr(loop, "sample_batch", clock.after(sample_batch, 1.0))
    forward = clock.after(next_token_loss, 2.0)

    def forward_and_backward(*args: Any) -> torch.Tensor:
        loss: torch.Tensor = forward(*args)
        loss.register_hook(clock.after(lambda _: None, 4.0))
        return loss

    monkeypatch.setattr(loop, "next_token_loss", forward_and_backward)
    monkeypatch.setattr(OffloadAdam, "step", clock.after(OffloadAdam.step, 8.0))
    monkeypatch.setattr(OffloadAdam, "zero_grad", clock.after(OffloadAdam.zero_grad, 16.0))
    monkeypatch.setattr(loop, "_mean_over_ranks", clock.after(loop._mean_over_ranks, 32.0))

    train = SMALL["train"] | {"num_steps": 3, "gradient_accumulation_steps": 2}
    records, _ = run(tmp_path, train=train)
    expected_ms = {"data": 2e3, "forward": 4e3, "backward": 8e3, "step": 24e3, "loss": 32e3}
    assert len(records) == 3
    for record in records:
        phases_ms = {name: ms for name, ms in record["timings_ms"].items() if "." not in name}
        assert phases_ms == expected_ms
        assert record["step_ms"] == sum(expected_ms.values())


@pytest.mark.parametrize(
    ("train", "optimizer"),
    [
        ({"dtype": "bf16"}, {}),
        ({"gradient_accumulation_steps": 2}, {"accumulate": "host"}),
        ({"gradient_accumulation_steps": 2}, {"streaming": False}),
        ({}, {"gradient_reduction": "external"}),
        ({}, {"amsgrad": True, "weight_decay": 0.1, "max_grad_norm": 0.5}),
    ],
)
def test_every_way_of_running_learns(
    tmp_path: Path, train: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    records, _ = run(
        tmp_path, train=SMALL["train"] | train, optimizer=SMALL["optimizer"] | optimizer
    )
    assert records[-1]["val_loss"] < 4.6
    assert not any(record["skipped"] for record in records)


def test_accumulating_is_the_same_in_grad_and_on_the_host(tmp_path: Path) -> None:
    train = SMALL["train"] | {"gradient_accumulation_steps": 3, "num_steps": 10}
    in_grad, _ = run(tmp_path / "a", train=train)
    on_host, _ = run(
        tmp_path / "b", train=train, optimizer=SMALL["optimizer"] | {"accumulate": "host"}
    )
    for one, other in zip(in_grad, on_host, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


class BreaksOnce(nn.Module):
    """A bigram model whose fifth forward in training returns NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)
        self.num_forwards = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(tokens)
        if self.training:
            self.num_forwards += 1
            if self.num_forwards == 5:
                return logits * float("nan")
        return logits


def test_a_skipped_step_counts_and_leaves_the_schedule_alone(tmp_path: Path) -> None:
    records, printed = run(
        tmp_path,
        model={"sizes": None, "factory": f"{__name__}:BreaksOnce"},
        train=SMALL["train"] | {"num_steps": 8},
        schedule={"warmup_steps": 7},
    )
    assert [record["skipped"] for record in records] == [step == 5 for step in range(1, 9)]
    assert [record["loss"] for record in records if record["skipped"]] == [None]
    assert records[4]["grad_norm"] is None
    assert records[4]["non_finite"] == ["table.weight"]
    rates = [0.01 * update / 8 for update in (1, 2, 3, 4, 5, 5, 6, 7)]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    assert records[5]["loss"] < records[0]["loss"]
    (line,) = [line for line in printed.splitlines() if line.startswith("step 5/")]
    assert line.endswith("skipped")
    assert "8 (1)" in printed


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("last", [None, 2])
def test_a_first_step_that_fails_touches_nothing_of_an_earlier_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    last: int | None,
) -> None:
    """Both if a new run begins, and if the run resumes from a step before its last record."""
    caplog.set_level(logging.INFO)
    every = 0 if last is None else last
    section = {"every": every, "resume": "auto"}
    train = SMALL["train"] | {"num_steps": 3}
    run(tmp_path, train=train, checkpoint=section)
    if last is not None:
        shutil.rmtree(tmp_path / "case" / "checkpoints" / "step-3")
    before = contents(tmp_path)

    def fail(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "next_token_loss", fail)
        with pytest.raises(RuntimeError, match="no such kernel"):
            run(tmp_path, train=train, checkpoint=section)
    assert contents(tmp_path) == before
    caplog.clear()
    records, _ = run(tmp_path, train=train, checkpoint=section)
    assert [record["step"] for record in records] == [1, 2, 3]
    line = f"Resuming from {tmp_path}/case/checkpoints/step-2 at step 2"
    assert ("Renamed the files of an earlier run" if last is None else line) in caplog.text


def test_a_model_that_returns_no_logits_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.factory"):
        run(tmp_path, model={"sizes": None, "factory": f"{__name__}:returns_tokens"})


class ReturnsTokens(BreaksOnce):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


def returns_tokens() -> nn.Module:
    return ReturnsTokens()
