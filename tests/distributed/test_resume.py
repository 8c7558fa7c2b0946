"""A run that resumes has the same losses and weights; checkpoints that are kept or rejected."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from offload_adam.checkpoint.format import RankEntry, read_manifest
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.checkpoint.rank_file import RankFile
from offload_adam.config import ConfigError, RunConfig
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.coordinator.startup import World
from offload_adam.errors import CheckpointError
from offload_adam.train import saving
from offload_adam.train.job import run_job
from tests.support.jobs import run_on_ranks, train_as_a_rank
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of
from tests.unit.test_train_alone import SMALL

KINDS: dict[str, dict[str, Any]] = {
    "streaming": {"lr": 0.01},
    "drop_in": {"lr": 0.01, "streaming": False, "weight_decay": 0.1},
    "adam": {"name": "Adam", "learning_rate": 0.01, "use_offload": True},
    "scheduled": {
        "name": "Adam",
        "learning_rate": {
            "name": "CosineDecayLR",
            "min_lr": 0.0,
            "max_lr": 0.01,
            "decay_steps": 12,
        },
    },
}


def values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "model": SMALL["model"],
        "train": SMALL["train"] | {"num_steps": 12},
        "optimizer": {"lr": 0.01},
        "checkpoint": {"every": 4, "keep_last": 10},
    }
    for name, section in sections.items():
        replaces = name == "optimizer"
        chosen[name] = section if replaces else chosen.get(name, {}) | section
    chosen["run"] = {"name": "case", "dir": str(folder)} | chosen.get("run", {})
    return chosen


def on_ranks(folder: Path) -> dict[str, Any]:
    return values(folder, optimizer={"lr": 0.01, "num_threads": 1})


def run(folder: Path, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    run_job(RunConfig.model_validate(values(folder, **sections)), Console(file=io.StringIO()))
    return records(folder)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "case" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def bits(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"], r.get("val_loss")) for r in found]


def checksums(folder: Path, step: int) -> Any:
    """Return the checksums of all tensor bytes of a checkpoint."""
    manifest = read_manifest(folder / "case" / "checkpoints" / f"step-{step}")
    return {name: entry.checksums for name, entry in manifest.files.items()}


def steps(folder: Path) -> list[int]:
    return sorted(saving.steps_in(folder / "case" / "checkpoints"))


def forget_after(folder: Path, step: int) -> None:
    """Turn a finished run into one that was killed some steps after this checkpoint."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(folder / "case" / "checkpoints" / f"step-{later}")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    optimizer = KINDS[kind]
    whole = run(tmp_path / "whole", optimizer=optimizer)
    again = run(tmp_path / "again", optimizer=optimizer)
    assert bits(whole) == bits(again)
    assert steps(tmp_path / "again") == [4, 8, 12]
    forget_after(tmp_path / "again", 4)
    resumed = run(tmp_path / "again", optimizer=optimizer)
    assert bits(resumed) == bits(whole)
    assert steps(tmp_path / "again") == [4, 8, 12]
    for step in (8, 12):
        assert checksums(tmp_path / "again", step) == checksums(tmp_path / "whole", step)


def test_a_start_from_the_first_step_because_all_checkpoints_are_damaged_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "case" / "checkpoints"
    config = RunConfig.model_validate(values(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert saving.find_checkpoint(config) is None
        assert not caplog.records
        (folder / "step-4").mkdir(parents=True)
        assert saving.find_checkpoint(config) is None
    skipped, start = (record.getMessage() for record in caplog.records)
    assert skipped.startswith(
        f"Skipping checkpoint step-4: {folder / 'step-4'} is not a checkpoint"
    )
    assert start == f"Starting from the first step: no checkpoint in {folder} is intact"


def test_a_checkpoint_to_resume_from_that_does_not_exist_is_rejected(tmp_path: Path) -> None:
    config = RunConfig.model_validate(values(tmp_path, checkpoint={"resume": "no"}))
    with pytest.raises(ConfigError, match=r"must be auto, never or the folder of .* no does not"):
        saving.find_checkpoint(config)


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path)
    folder = tmp_path / "case" / "checkpoints"
    for step, name in ((12, "manifest.json"), (8, "rank-00000-of-00001.safetensors")):
        path = folder / f"step-{step}" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    (folder / "step-16.partial").mkdir()
    with caplog.at_level(logging.WARNING):
        found = saving.find_checkpoint(RunConfig.model_validate(values(tmp_path)))
    assert found == folder / "step-4"
    assert caplog.text.count("Skipping checkpoint") == 2
    assert "first step" not in caplog.text
    assert bits(run(tmp_path)) == bits(whole)
    # They are out of the way, and the run has written its own.
    assert steps(tmp_path) == [4, 8, 12]
    for step in (8, 12):
        verify_checkpoint(folder / f"step-{step}")
        assert (folder / "earlier-1" / f"step-{step}").is_dir()


def test_a_damaged_checkpoint_does_not_count_as_one_to_keep(tmp_path: Path) -> None:
    """Of three checkpoints to keep, only those that are known to be intact count."""
    run(tmp_path)
    damaged = tmp_path / "case" / "checkpoints" / "step-8" / "rank-00000-of-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    longer = SMALL["train"] | {"num_steps": 16}
    run(tmp_path, train=longer, checkpoint={"every": 4, "keep_last": 3})
    assert steps(tmp_path) == [4, 8, 12, 16]
    longer = SMALL["train"] | {"num_steps": 20}
    run(tmp_path, train=longer, checkpoint={"every": 4, "keep_last": 2})
    assert steps(tmp_path) == [16, 20]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_checkpoint_of_another_run_is_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """If it cannot be moved aside, it stays, and the run continues without its own checkpoint."""
    run(tmp_path)
    monkeypatch.setattr(saving, "set_aside", lambda *_: None)
    checkpoint = {"every": 4, "keep_last": 10, "resume": "never", "mode": mode}
    run(tmp_path, optimizer={"lr": 0.5}, checkpoint=checkpoint)
    folder = tmp_path / "case" / "checkpoints"
    for step in (4, 8, 12):
        path = folder / f"step-{step}"
        assert read_manifest(path).decoded_extra()["config"]["optimizer"]["lr"] == 0.01
        assert f"Cannot write checkpoint {path} (" in caplog.text
    assert caplog.text.count("exists and is never overwritten") >= 3


def test_a_run_removes_no_unfinished_export(tmp_path: Path) -> None:
    folder = tmp_path / "case" / "checkpoints"
    export = folder / "step-4-dcp.00000000-1-00000000.partial"
    killed = folder / "step-4.00000000-1-00000000.partial"
    for path in (export, killed):
        path.mkdir(parents=True)
    run(tmp_path)
    assert export.is_dir()
    assert not killed.exists()


def test_another_seed_is_rejected(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.seed.*was 0 in the checkpoint and is 1"):
        run(tmp_path, run={"seed": 1})


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    whole = run(tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "case").rglob("*") if p.is_file()}
    assert bits(run(tmp_path)) == bits(whole)
    assert {p: p.read_bytes() for p in (tmp_path / "case").rglob("*") if p.is_file()} == before


def test_keys_that_may_not_change_are_named(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.lr.*was 0.01 in the checkpoint and is 0.02"):
        run(tmp_path, optimizer={"lr": 0.02})
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, optimizer={"lr": 0.02}, train={"batch_size": 2})
    assert [m.path for m in caught.value.mistakes] == ["optimizer.lr", "train.batch_size"]
    longer = run(tmp_path, train={"num_steps": 14}, observe={"tensorboard": False})
    assert [record["step"] for record in longer] == list(range(1, 15))


def test_a_run_may_change_to_bf16_state_but_not_back(tmp_path: Path) -> None:
    whole = run(tmp_path)
    low = {"lr": 0.01, "state_format": "bf16"}
    longer = SMALL["train"] | {"num_steps": 16}
    resumed = run(tmp_path, optimizer=low, train=longer)
    assert bits(resumed)[:12] == bits(whole)
    assert [record["step"] for record in resumed] == list(range(1, 17))
    saved = read_manifest(tmp_path / "case" / "checkpoints" / "step-16").optimizer.formats
    assert set(saved.values()) == {"bf16"}
    with pytest.raises(ConfigError, match=r"state_format.*was \"bf16\" .* and is \"fp32\" now"):
        run(tmp_path, train=longer)


def test_resume_never_and_by_path(tmp_path: Path) -> None:
    whole = run(tmp_path / "a")
    source = tmp_path / "a" / "case" / "checkpoints" / "step-8"
    resumed = run(tmp_path / "b", checkpoint={"resume": str(source)})
    assert bits(resumed) == bits(whole)[8:]
    with pytest.raises(ConfigError, match=r"checkpoint\.resume"):
        run(tmp_path / "c", checkpoint={"resume": str(tmp_path)})
    anew = run(tmp_path / "a", checkpoint={"resume": "never"})
    assert bits(anew) == bits(whole)


def test_no_run_resumes_from_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    """The other run is shorter, has another learning rate, and began anew in the same folder."""
    run(tmp_path)
    folder = tmp_path / "case" / "checkpoints"
    foreign = {step: checksums(tmp_path, step) for step in (4, 8, 12)}
    other: dict[str, Any] = {"optimizer": {"lr": 0.02}, "checkpoint": {"resume": "never"}}
    run(tmp_path, train={"num_steps": 6}, **other)
    assert steps(tmp_path) == [4, 6]
    assert checksums(tmp_path, 4) != foreign[4]
    assert saving.find_checkpoint(RunConfig.model_validate(values(tmp_path))) == folder / "step-6"
    # Once more: what is set aside is kept, each time in a folder of its own.
    run(tmp_path, **other)
    assert steps(tmp_path) == [4, 8, 12]
    aside = {path.name: sorted(saving.steps_in(path)) for path in folder.glob("earlier-*")}
    assert aside == {"earlier-1": [4, 8, 12], "earlier-2": [4, 6]}
    for step, expected in foreign.items():
        found = read_manifest(folder / "earlier-1" / f"step-{step}").files
        assert {name: entry.checksums for name, entry in found.items()} == expected


@pytest.mark.parametrize("how", ["never", "path"])
def test_a_restart_resumes_from_the_newest_checkpoint_however_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run(tmp_path / "a")
    source = tmp_path / "a" / "case" / "checkpoints" / "step-4"
    resume = "never" if how == "never" else str(source)
    config = RunConfig.model_validate(values(tmp_path / "b", checkpoint={"resume": resume}))
    first = None if how == "never" else source
    assert saving.find_checkpoint(config) == first
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert saving.find_checkpoint(config) == first  # it came to no checkpoint of its own
    run(tmp_path / "b", train={"num_steps": 8})
    newest = tmp_path / "b" / "case" / "checkpoints" / "step-8"
    assert saving.find_checkpoint(config) == newest


def test_old_checkpoints_are_removed_and_some_are_kept(tmp_path: Path) -> None:
    run(tmp_path, checkpoint={"every": 1, "keep_last": 2, "keep_every": 5})
    assert steps(tmp_path) == [5, 10, 11, 12]


@pytest.mark.parametrize("required", [False, True])
def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, required: bool
) -> None:
    (tmp_path / "case").mkdir(parents=True)
    (tmp_path / "case" / "checkpoints").write_text("not a folder")
    if required:
        with pytest.raises((OSError, CheckpointError)):
            run(tmp_path, checkpoint={"required": True})
        return
    found = run(tmp_path)
    assert len(found) == 12
    assert "(3 failed so far): " in caplog.text
    assert ". Training continues without it" in caplog.text


def test_a_background_checkpoint_is_the_same(tmp_path: Path) -> None:
    """Saves every second step, so that some are still in progress when the next one is due."""
    often = {"every": 2, "keep_last": 10}
    whole = run(tmp_path / "sync", checkpoint=often)
    beside = run(tmp_path / "async", checkpoint=often | {"mode": "async"})
    assert bits(beside) == bits(whole)
    for step in range(2, 13, 2):
        assert checksums(tmp_path / "async", step) == checksums(tmp_path / "sync", step)
    assert steps(tmp_path / "async") == [2, 4, 6, 8, 10, 12]
    forget_after(tmp_path / "async", 6)
    resumed = run(tmp_path / "async", checkpoint=often | {"mode": "async"})
    assert bits(resumed) == bits(whole)
    assert checksums(tmp_path / "async", 12) == checksums(tmp_path / "sync", 12)


def test_a_slow_disk_is_waited_for_by_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pending checkpoint is committed first, and the last one before the run ends."""
    finish = RankFile.finish

    def slow(file: RankFile) -> RankEntry:
        time.sleep(0.05)
        return finish(file)

    monkeypatch.setattr(RankFile, "finish", slow)
    run(tmp_path, checkpoint={"every": 1, "keep_last": 20, "mode": "async"})
    assert steps(tmp_path) == list(range(1, 13))
    assert not list(tmp_path.rglob("*.partial"))
    for step in (1, 7, 12):
        verify_checkpoint(tmp_path / "case" / "checkpoints" / f"step-{step}")


@pytest.mark.parametrize("required", [False, True])
def test_a_disk_that_fills_up_during_training(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    required: bool,
) -> None:
    """Training continues; the older checkpoint stays, and no file of the new one."""
    finish = RankFile.finish

    def full(file: RankFile) -> RankEntry:
        if threading.current_thread().name == "checkpoint" and "step-8" in str(file.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(file)

    monkeypatch.setattr(RankFile, "finish", full)
    how = {"mode": "async", "required": required}
    if required:
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, checkpoint=how)
        assert steps(tmp_path) == [4]
    else:
        assert len(run(tmp_path, checkpoint=how)) == 12
        assert steps(tmp_path) == [4, 12]
        assert "(1 failed so far): " in caplog.text
        assert ". Training continues without it" in caplog.text
    assert not list(tmp_path.rglob("*.partial"))


def train_apart(rank: int, world_size: int, sections: dict[str, Any]) -> Outcome:
    """Run the job with a working folder, and therefore a run folder, of its own on each rank."""
    before = Path.cwd()
    os.chdir(Path(sections["run"]["dir"]) / f"disk-{rank}")
    try:
        own = {**sections, "run": {"name": "case", "dir": "runs"}}
        return outcome_of(lambda: train_as_a_rank(rank, world_size, own))
    finally:
        os.chdir(before)


@pytest.mark.distributed
def test_a_folder_that_is_not_shared_is_found_before_the_first_step(
    ranks: RankPool, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / f"disk-{rank}").mkdir()
    found = run_on_ranks(ranks, 2, on_ranks(tmp_path), train_apart)
    assert [outcome.error for outcome in found] == ["CheckpointError"] * 2
    for outcome in found:
        assert "Rank(s) [1] failed in looking for rank 0's folder: runs/case is not shared" in (
            outcome.message
        )
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("required", [False, True])
def test_an_unwritable_folder_is_reported_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, required: bool
) -> None:
    """The check runs only with several ranks, so this single rank is told that there are two."""
    section = {"every": 4, "required": required}
    config = RunConfig.model_validate(values(tmp_path, checkpoint=section))
    (tmp_path / "case").write_text("not a folder")
    job: Any = SimpleNamespace(
        config=config, world=World(world_size=2), optimizer=SimpleNamespace(ranks=RankGroup())
    )
    if required:
        with pytest.raises(OSError, match="Not a directory"):
            saving.require_shared_folder(job)
    else:
        saving.require_shared_folder(job)
        assert "Cannot write checkpoints to" in caplog.text
        assert "Not a directory" in caplog.text


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    unfinished = tmp_path / "case" / "checkpoints" / "step-3.partial"
    unfinished.mkdir(parents=True)
    (unfinished / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    run(tmp_path)
    assert not unfinished.exists()


@pytest.mark.distributed
def test_a_run_resumes_in_another_world_size(ranks: RankPool, tmp_path: Path) -> None:
    run_on_ranks(ranks, 2, on_ranks(tmp_path))
    two = checksums(tmp_path, 12)
    assert len(two) == 2
    forget_after(tmp_path, 8)
    run_on_ranks(ranks, 2, on_ranks(tmp_path))
    assert checksums(tmp_path, 12) == two
    forget_after(tmp_path, 4)
    run(tmp_path)
    assert len(checksums(tmp_path, 8)) == 1
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))
    # No sample is left out or seen again: 4 steps of two ranks, 8 of one.
    manifests = [read_manifest(tmp_path / "case" / "checkpoints" / f"step-{n}") for n in (4, 8, 12)]
    size = manifests[0].extra["samples"] // 8
    assert size > 0
    assert [manifest.extra["samples"] for manifest in manifests] == [8 * size, 12 * size, 16 * size]
