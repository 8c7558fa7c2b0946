"""Accelerate, Trainer and Lightning with FSDP2: equal to torch's AdamW, also when resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations import fsdp2_runs
from tests.integrations.trainer_runs import ENVIRONMENT
from tests.support.fsdp2 import largest_difference, train_plain
from tests.support.ranks import RankPool

KINDS = ("drop-in", "streaming")


def accelerate(rank: int, world_size: int, folder: Path) -> list[tuple[str, float, bool]]:
    exact = train_plain(
        fsdp2_runs.make_model(), world_size, num_steps=fsdp2_runs.NUM_STEPS, rank=rank
    )
    found = []
    for kind, saved in zip(KINDS, ("SHARDED_STATE_DICT", "FULL_STATE_DICT"), strict=True):
        run, is_same = fsdp2_runs.accelerate(kind, folder / kind, state_dict_type=saved)
        found.append((kind, largest_difference(run, exact), is_same))
    return found


def test_accelerate(ranks: RankPool, tmp_path: Path) -> None:
    for found in ranks.run(accelerate, 2, tmp_path, env=ENVIRONMENT):
        for name, difference, is_same in found:
            assert difference < 2e-6, name
            assert is_same, name


@pytest.mark.parametrize("saved", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_trainer(saved: str, ranks: RankPool, tmp_path: Path) -> None:
    runs = {
        kind: ranks.run(fsdp2_runs.trainer, 2, tmp_path / kind, kind, saved, env=ENVIRONMENT)
        for kind in ("torch", *KINDS)
    }
    for kind in KINDS:
        for (losses, norms, again), (expected, given, _) in zip(
            runs[kind], runs["torch"], strict=True
        ):
            torch.testing.assert_close(losses, expected, atol=2e-6, rtol=0)
            torch.testing.assert_close(norms, given, atol=2e-6, rtol=1e-5)
            assert again == losses


def lightning(rank: int, world_size: int, folder: Path) -> dict[str, tuple[list[float], ...]]:
    return {kind: fsdp2_runs.lightning_run(folder / kind, kind) for kind in ("torch", *KINDS)}


def test_lightning(ranks: RankPool, tmp_path: Path) -> None:
    for found in ranks.run(lightning, 2, tmp_path):
        expected, expected_again = found["torch"]
        for kind in KINDS:
            losses, again = found[kind]
            torch.testing.assert_close(losses, expected, atol=2e-6, rtol=0)
            torch.testing.assert_close(again, expected_again, atol=2e-6, rtol=0)
