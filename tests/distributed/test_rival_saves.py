"""Several saves of one path: one succeeds and verifies, the others raise and leave nothing."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from offload_adam import CheckpointError, OffloadAdam, begin_checkpoint, save_checkpoint
from offload_adam.checkpoint import commit
from offload_adam.checkpoint.commit import partial_name, publish
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.checkpoint.save import Save
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of


def make(value: float, **options: Any) -> tuple[torch.nn.Linear, OffloadAdam]:
    model = torch.nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.fill_(value)
    return model, OffloadAdam(model.parameters(), **options)


def save_now(path: Path, model: torch.nn.Module, optimizer: OffloadAdam) -> None:
    save_checkpoint(path, model=model, optimizer=optimizer)


def save_in_background(path: Path, model: torch.nn.Module, optimizer: OffloadAdam) -> None:
    begin_checkpoint(path, model=model, optimizer=optimizer).wait()


@pytest.mark.parametrize("save_in_a_way", [save_now, save_in_background])
def test_a_save_that_is_overtaken_fails_and_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_in_a_way: Callable[..., None]
) -> None:
    """The other save begins and ends between this one's writing and its commit."""
    path = tmp_path / "c"
    (model, optimizer), (other_model, other) = make(1.0), make(2.0)
    commit = Save.commit

    def overtaken(save: Save, entry: Any) -> None:
        monkeypatch.setattr(Save, "commit", commit)
        save_checkpoint(path, model=other_model, optimizer=other)
        commit(save, entry)

    monkeypatch.setattr(Save, "commit", overtaken)
    with pytest.raises(
        CheckpointError, match=f"{path} was written by another process in the meantime"
    ):
        save_in_a_way(path, model, optimizer)
    verify_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    save_checkpoint(tmp_path / "d", model=model, optimizer=optimizer)
    optimizer.close()
    other.close()


def save_at_once(
    path: Path,
    start: threading.Barrier,
    outcomes: list[Outcome],
    model: torch.nn.Module,
    optimizer: OffloadAdam,
) -> None:
    start.wait(30.0)
    outcomes.append(outcome_of(lambda: save_now(path, model, optimizer)))


def test_of_two_saves_at_once_one_succeeds(tmp_path: Path) -> None:
    jobs = [make(1.0), make(2.0)]
    for attempt in range(10):
        path = tmp_path / str(attempt)
        outcomes: list[Outcome] = []
        save = partial(save_at_once, path, threading.Barrier(2), outcomes)
        threads = [threading.Thread(target=save, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        assert sorted(outcome.error for outcome in outcomes) == ["", "CheckpointError"]
        assert all(str(path) in outcome.message for outcome in outcomes if outcome.error)
        verify_checkpoint(path)
    assert len(list(tmp_path.iterdir())) == 10
    for _, optimizer in jobs:
        optimizer.close()


def save_as_one_of_two_jobs(rank: int, world_size: int, folder: str) -> Outcome:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model, optimizer = make(
        rank // 2, gradient_reduction="optimizer", process_group=groups[rank // 2]
    )
    dist.barrier()
    outcome = outcome_of(lambda: save_checkpoint(f"{folder}/c", model=model, optimizer=optimizer))
    dist.barrier()
    optimizer.close()
    return outcome


def test_of_two_jobs_of_two_ranks_one_succeeds(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run(save_as_one_of_two_jobs, 4, str(tmp_path))
    errors = [outcome.error for outcome in outcomes]
    assert errors[0] == errors[1] != errors[2] == errors[3]
    assert set(errors) == {"", "CheckpointError"}
    assert all(f"{tmp_path}/c" in outcome.message for outcome in outcomes if outcome.error)
    assert verify_checkpoint(tmp_path / "c").world_size == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_only_leftovers_of_ended_processes_of_this_node_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = max(psutil.pids()) + 100_000
    ours = partial_name("c")
    node = ours.split(".")[1].split("-")[0]
    names = {
        "ended": f"c.{node}-{ended}-00000000.partial",
        "alive": f"c.{node}-{os.getppid()}-00000000.partial",
        "ours, in progress": ours,
        "ours, given up": f"c.{node}-{os.getpid()}-00000000.partial",
        "another node's": f"c.00000000-{ended}-00000000.partial",
        "another checkpoint's": f"cc.{node}-{ended}-00000000.partial",
        "a user's": "c.notes.partial",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    model, optimizer = make(1.0)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"c", *names.values()} - {names["ended"], names["ours, given up"]}
    monkeypatch.setattr(commit, "_in_progress", set())
    optimizer.close()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_replaces_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """As of two exports to one name; also where the file system has no hard links."""

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
    one, other, target = tmp_path / "one", tmp_path / "other", tmp_path / "target"
    one.write_text("one")
    other.write_text("other")
    publish(one, target)
    with pytest.raises(CheckpointError, match="was written by another process in the meantime"):
        publish(other, target)
    assert target.read_text() == "one"
    assert not one.exists()
