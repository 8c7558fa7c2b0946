"""Saves that fail at any place leave the earlier checkpoint unchanged, and training continues."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam import (
    FailurePolicy,
    OffloadAdam,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.checkpoint.rank_file import _SummedFile
from offload_adam.checkpoint.save import Save
from offload_adam.errors import CheckpointError
from tests.distributed.test_checkpoints import assert_same, make, train, whole_state
from tests.support.models import Model
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of
from tests.support.updates import running_first

MODES = ("sync", "async")


def save(mode: str, path: Path, model: Any, optimizer: Any) -> None:
    if mode == "sync":
        save_checkpoint(path, model=model, optimizer=optimizer)
    else:
        begin_checkpoint(path, model=model, optimizer=optimizer).wait()


def at_call(number: int, action: Callable[[], None], original: Callable[..., Any]) -> Any:
    """Return a function that does something before its n-th call, and is the original's else."""
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            action()
        return original(*args, **kwargs)

    return counted


def broken() -> None:
    raise OSError(errno.EIO, "Input/output error")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_goes_on(model: Any, optimizer: Any) -> None:
    """Three steps have been taken, of which no failed save has changed anything."""
    train(model, optimizer, 2, 3)
    other_model, other = make("bf16", seed=1)
    train(other_model, other, 0, 3)
    assert_same(whole_state(model, optimizer), whole_state(other_model, other))


PLACES = {
    "header": (_SummedFile, "write", 1),
    "middle of the file": (_SummedFile, "write", 9),
    "file's flush": (os, "fsync", 1),
    "manifest's flush": (os, "fsync", 2),
    "folder's flush": (os, "fsync", 3),
    "rename": (Path, "rename", 1),
    "flush after the rename": (os, "fsync", 4),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", list(PLACES))
def test_a_disk_that_breaks_costs_no_more_than_that_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, place: str
) -> None:
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path / "one", model=model, optimizer=optimizer)
    before = contents(tmp_path / "one")
    train(model, optimizer, 1, 2)
    owner, name, number = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(number, broken, getattr(owner, name)))
        with pytest.raises(OSError, match="Input/output error"):
            save(mode, tmp_path / "two", model, optimizer)
    assert contents(tmp_path / "one") == before
    if place == "flush after the rename":  # it is one already, though a crash may undo that
        verify_checkpoint(tmp_path / "two")
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["one"]
        save(mode, tmp_path / "two", model, optimizer)
    assert verify_checkpoint(tmp_path / "two").step == 2
    assert_goes_on(model, optimizer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["file", "folder", "parent"])
def test_what_is_removed_under_the_writer_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, what: str
) -> None:
    """The open file takes every byte, and is nowhere."""
    folder = tmp_path / "disk"
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path / "elsewhere" / "one", model=model, optimizer=optimizer)
    train(model, optimizer, 1, 2)

    def remove() -> None:
        if what == "file":
            next(folder.glob("two.*.partial/*.safetensors")).unlink()
        else:
            shutil.rmtree(next(folder.glob("two.*.partial")) if what == "folder" else folder)

    with monkeypatch.context() as patch:
        patch.setattr(_SummedFile, "write", at_call(9, remove, _SummedFile.write))
        with pytest.raises((CheckpointError, OSError), match=r"No such file|cannot be opened"):
            save(mode, folder / "two", model, optimizer)
    assert not list(folder.glob("*"))
    verify_checkpoint(tmp_path / "elsewhere" / "one")
    save(mode, folder / "two", model, optimizer)
    assert verify_checkpoint(folder / "two").step == 2
    assert_goes_on(model, optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_goes_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The place is a link to it: in the middle of a save it leads nowhere, and then it does."""
    disk, away, place = tmp_path / "disk", tmp_path / "away", tmp_path / "place"
    disk.mkdir()
    place.symlink_to(disk)
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 1)
    save(mode, place / "one", model, optimizer)
    before = contents(disk / "one")
    train(model, optimizer, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            _SummedFile, "write", at_call(9, lambda: os.rename(disk, away), _SummedFile.write)
        )
        with pytest.raises((CheckpointError, OSError), match=r"No such file|cannot be opened"):
            save(mode, place / "two", model, optimizer)
    with pytest.raises(OSError, match=r"File exists: '.*place'"):  # a link to nothing
        save(mode, place / "two", model, optimizer)
    os.rename(away, disk)
    assert contents(disk / "one") == before
    save(mode, place / "two", model, optimizer)
    assert sorted(path.name for path in disk.iterdir()) == ["one", "two"]
    other_model, other = make("bf16", seed=9)
    load_checkpoint(place / "two", model=other_model, optimizer=other)
    assert_same(whole_state(model, optimizer), whole_state(other_model, other))
    assert_goes_on(model, optimizer)


def lose_own_file(rank: int, world_size: int, folder: str) -> Outcome:
    """Rank 1's bytes go where nobody else sees them, after it has been asked to look."""
    commit = Save.commit

    def losing(save: Save, entry: Any) -> None:
        if rank == 1:
            next(Path(folder).glob(f"two.*.partial/{entry.name}")).unlink()
        commit(save, entry)

    model, optimizer = make("bf16", seed=1)
    save_checkpoint(f"{folder}/one", model=model, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Save, "commit", losing)
        outcome = outcome_of(
            lambda: save_checkpoint(f"{folder}/two", model=model, optimizer=optimizer)
        )
    save_checkpoint(f"{folder}/three", model=model, optimizer=optimizer)
    optimizer.close()
    return outcome


def test_a_rank_whose_disk_has_gone_commits_nothing(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(lose_own_file, 2, str(tmp_path))
    assert first.error == "CheckpointError"
    assert "rank-00001-of-00002.safetensors cannot be opened" in first.message
    assert (second.error, "cannot be opened" in second.message) == ("CheckpointError", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]
    for name in ("one", "three"):
        verify_checkpoint(tmp_path / name)


def save_edited_state(rank: int, world_size: int, path: str, mode: str) -> list[Outcome]:
    """Put an invalid entry into one rank's `optimizer.state` before a save."""
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 1)
    parameter = next(iter(optimizer.state))
    own = optimizer.state[parameter]["exp_avg"]
    if rank == 1:
        optimizer.state[parameter]["exp_avg"] = "gone"
    failed = outcome_of(lambda: save(mode, Path(path) / "one", model, optimizer))
    optimizer.state[parameter]["exp_avg"] = own
    second = outcome_of(lambda: save(mode, Path(path) / "two", model, optimizer))
    train(model, optimizer, 1, 3)
    optimizer.close()
    return [failed, second]


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_that_is_invalid_on_one_rank_fails_the_save_on_all(
    ranks: RankPool, tmp_path: Path, mode: str
) -> None:
    (first, saved), (second, _) = ranks.run(save_edited_state, 2, str(tmp_path), mode)
    assert (second.error, "exp_avg in optimizer.state" in second.message) == ("TypeError", True)
    assert (first.error, "exp_avg in optimizer.state" in first.message) == ("TypeError", True)
    assert saved.error == ""
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    verify_checkpoint(tmp_path / "two")


def save_after_a_failed_update(rank: int, world_size: int, path: str) -> Outcome:
    """Let an update of one rank fail beside the other's, whose gathers are still to be issued."""
    torch.manual_seed(1)
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OffloadAdam(
        trained, module=model, overlap=True, failures=FailurePolicy(dead_after=3.0)
    )
    if rank == 1:

        def fail() -> None:
            raise MemoryError("no memory for an update")

        update = optimizer._alive().tasks.updates[0]
        update.prepare = running_first(update.prepare, fail)  # type: ignore[method-assign]
    model(torch.ones(4, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    outcome = outcome_of(lambda: save("sync", Path(path) / "one", model, optimizer))
    outcome_of(optimizer.close)
    return outcome


def test_a_failed_update_ends_the_save_with_its_own_error(
    own_ranks: RankPool, tmp_path: Path
) -> None:
    first, second = own_ranks.run(save_after_a_failed_update, 2, str(tmp_path), timeout=60.0)
    assert (second.error, second.message) == ("MemoryError", "no memory for an update")
    assert (first.error, "Rank 1 exited" in first.message) == ("PeerFailedError", True)
    assert not list(tmp_path.iterdir())


def save_after_close(rank: int, world_size: int, path: str) -> list[Outcome]:
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 1)
    ranks = optimizer.ranks
    optimizer.close()
    return [
        outcome_of(lambda: save("sync", Path(path) / "one", model, optimizer)),
        outcome_of(lambda: save("async", Path(path) / "one", model, optimizer)),
        outcome_of(lambda: load_checkpoint(Path(path) / "one", model=model, optimizer=optimizer)),
        outcome_of(optimizer.full_state_dict),
        outcome_of(lambda: ranks.all_gather(torch.zeros(1))),
    ]


def test_a_closed_optimizer_runs_no_collective_on_another_group(
    ranks: RankPool, tmp_path: Path
) -> None:
    for outcomes in ranks.run(save_after_close, 2, str(tmp_path)):
        assert {outcome.error for outcome in outcomes} == {"RuntimeError"}
        assert all("closed" in outcome.message for outcome in outcomes)


def test_an_interrupted_wait_stops_the_writer_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 2)
    go_on = threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        hold = at_call(1, lambda: assert_set(go_on), Save.copy_bucket)
        patch.setattr(Save, "copy_bucket", hold)
        pending = begin_checkpoint(tmp_path / "one", model=model, optimizer=optimizer)
        patch.setattr(pending._writer, "result", interrupt)
        threading.Timer(0.3, go_on.set).start()
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "two", model=model, optimizer=optimizer)
    assert verify_checkpoint(tmp_path / "two").step == 2
    assert_goes_on(model, optimizer)


def assert_set(event: threading.Event) -> None:
    assert event.wait(60.0)


def test_a_writer_that_cannot_be_started_holds_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 2)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            begin_checkpoint(tmp_path / "one", model=model, optimizer=optimizer)
    assert not list(tmp_path.iterdir())
    assert_goes_on(model, optimizer)
    save_checkpoint(tmp_path / "two", model=model, optimizer=optimizer)
    assert verify_checkpoint(tmp_path / "two").step == 3
