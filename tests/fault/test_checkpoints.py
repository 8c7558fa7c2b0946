"""Ranks that end while a checkpoint is written, under torchrun: the run goes on, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.train.saving import steps_in
from tests.fault.runs import Ended, run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

SHORT = ("--train.num_steps=12", "--checkpoint.every=4", "--checkpoint.keep_last=9")


def bits(ended: Ended) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in ended.records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Return what a run records that nothing happens to."""
    ended = run(tmp_path_factory.mktemp("whole"), "", *SHORT)
    assert ended.code == 0, ended.printed
    return bits(ended)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("place", "newest"),
    [("write", 4), ("written", 4), ("commit", 4), ("rename", 4), ("committed", 8)],
)
def test_a_killed_save_costs_no_more_than_that_checkpoint(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], mode: str, place: str, newest: int
) -> None:
    """A kill -9 in the write, after it, before the manifest, before the rename, and after all."""
    if mode == "async" and place == "committed":
        place, newest = "committed/11", 8  # step 8's is on the disk three steps later
    else:
        place = f"{place}/8"
    options = ("--max-restarts=1",)
    ended = run(tmp_path, f"kill@{place}", *SHORT, f"--checkpoint.mode={mode}", options=options)
    assert ended.code == 0, ended.printed
    assert "is dead: process " in ended.printed
    assert f"goes on from {tmp_path}/tiny/checkpoints/step-{newest}, after step {newest}" in (
        ended.printed.replace("\n", "")
    )
    assert bits(ended) == uninterrupted
    folder = tmp_path / "tiny" / "checkpoints"
    assert sorted(steps_in(folder)) == [4, 8, 12]
    for step in (4, 8, 12):
        assert verify_checkpoint(folder / f"step-{step}").step == step
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_that_is_full_on_one_rank(
    tmp_path: Path, uninterrupted: list[tuple[Any, ...]], mode: str
) -> None:
    """RLIMIT_FSIZE: it takes a part of the file. Training goes on, and says so on every rank."""
    ended = run(tmp_path, "fill@write/8", *SHORT, f"--checkpoint.mode={mode}")
    assert ended.code == 0, ended.printed
    assert bits(ended) == uninterrupted
    assert "cannot be written (1 so far); training goes on without it" in ended.printed
    assert "cannot be written (2 so far)" in ended.printed
    assert "File too large" in ended.printed
    folder = tmp_path / "tiny" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-4"]
    verify_checkpoint(folder / "step-4")


def test_a_checkpoint_that_is_required_ends_the_run(tmp_path: Path) -> None:
    ended = run(tmp_path, "fill@write/8", *SHORT, "--checkpoint.required=true")
    assert ended.code == 1
    assert "File too large" in ended.printed
    assert [record["step"] for record in ended.records] == list(range(1, 9))
