"""The tiny job as a user starts it, against a plain loop over torch's own Adam."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from offload_adam.config import RunConfig, load_config
from offload_adam.config.optimizer_sections import OffloadAdamSection
from offload_adam.train.data import load_corpus, sample_batch
from offload_adam.train.model import build_model, next_token_loss

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.yaml"


class Finished(NamedTuple):
    """What a run printed and wrote."""

    printed: str
    records: list[dict[str, Any]]
    folder: Path


def command(world_size: int) -> list[str]:
    if world_size == 1:
        return [sys.executable, "-m", "offload_adam"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={world_size}", "-m", "offload_adam"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def train(folder: Path, world_size: int, *overrides: str) -> Finished:
    done = subprocess.run(
        [*command(world_size), "train", str(TINY), f"--run.dir={folder}", *overrides],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "tiny" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Finished(done.stdout, [json.loads(line) for line in lines], folder / "tiny")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(tmp_path_factory.mktemp("two"), 2)


def learning_rate(config: RunConfig, update: int) -> float:
    assert isinstance(config.optimizer, OffloadAdamSection)
    warmup, num_steps = config.schedule.warmup_steps, config.train.num_steps
    lr, floor = config.optimizer.lr, config.optimizer.lr * config.schedule.min_lr_ratio
    if update < warmup:
        return lr * (update + 1) / (warmup + 1)
    turn = math.pi * (update - warmup) / (num_steps - warmup)
    return floor + (lr - floor) * (1 + math.cos(turn)) / 2


def reference_run(config: RunConfig, world_size: int) -> tuple[list[float], list[float]]:
    """Return the losses and gradient norms of one process that sees every rank's microbatches."""
    train = config.train
    tokens = load_corpus(config.data, train.sequence_length).training
    model = build_model(config)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    losses, norms = [], []
    num_batches = world_size * train.gradient_accumulation_steps
    size, seed = train.batch_size, config.run.seed
    for step in range(1, train.num_steps + 1):
        total = 0.0
        for rank in range(world_size):
            for microbatch in range(train.gradient_accumulation_steps):
                number = (step - 1) * num_batches + microbatch * world_size + rank
                first = number * size
                batch = sample_batch(tokens, size, train.sequence_length, seed=seed, first=first)
                loss = next_token_loss(model, batch) / num_batches
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step - 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(norm.item())
    return losses, norms


def check_against_reference(run: Finished, world_size: int) -> None:
    config = load_config(run.folder / "config.yaml")
    losses, norms = reference_run(config, world_size)
    records = run.records
    assert [record["step"] for record in records] == list(range(1, config.train.num_steps + 1))
    rates = [learning_rate(config, update) for update in range(config.train.num_steps)]
    assert [record["lr"] for record in records] == pytest.approx(rates, rel=1e-9)
    # fp32 sums in another order, and Adam divides: the two part slowly.
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=2e-3)
    assert [record["grad_norm"] for record in records[:5]] == pytest.approx(norms[:5], rel=1e-3)
    assert records[0]["loss"] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.distributed
def test_two_ranks_follow_one_process_with_all_their_data(on_two_ranks: Finished) -> None:
    check_against_reference(on_two_ranks, world_size=2)


def test_a_process_alone_follows_torchs_adam(tmp_path: Path) -> None:
    check_against_reference(train(tmp_path, 1), world_size=1)


@pytest.mark.distributed
def test_the_validation_loss_falls_and_is_printed_beside_the_baseline(
    on_two_ranks: Finished,
) -> None:
    evaluated = {r["step"]: r["val_loss"] for r in on_two_ranks.records if "val_loss" in r}
    assert list(evaluated) == [20, 40]
    assert evaluated[40] < evaluated[20] < math.log(256) - 1
    assert f"{evaluated[40]:.4f} nats" in on_two_ranks.printed
    assert "bigram baseline, same split" in on_two_ranks.printed
    assert on_two_ranks.printed.count("final validation loss") == 1  # from rank 0 alone


@pytest.mark.distributed
def test_every_record_is_complete(on_two_ranks: Finished) -> None:
    tokens_per_step = 2 * 2 * 8 * 32  # ranks, microbatches, sequences, tokens
    for record in on_two_ranks.records:
        assert record["skipped"] is False
        assert record["grad_norm"] > 0
        assert record["step_ms"] * record["tokens_per_s"] == pytest.approx(1e3 * tokens_per_step)
        assert {"forward", "backward", "step"} <= set(record["timings_ms"])


@pytest.mark.distributed
def test_external_reduction_trains_the_same(on_two_ranks: Finished, tmp_path: Path) -> None:
    external = train(tmp_path, 2, "--optimizer.gradient_reduction=external")
    for ours, theirs in zip(on_two_ranks.records, external.records, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_keeps_the_metrics(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*command(1), "train", str(TINY), f"--run.dir={tmp_path}", "--train.num_steps=100000"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline_s = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, printed = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in printed
    lines = metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
