"""Checkpoints that are written during training: they hold the bytes of one step."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam import (
    Adam,
    CheckpointError,
    OffloadAdam,
    OffloadPolicy,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.format import RankEntry
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.checkpoint.save import Save
from offload_adam.state.state_shard import shards_of
from tests.distributed.test_checkpoints import KINDS, assert_same, make, train, whole_state
from tests.support.devices import HOST_AS_DEVICE
from tests.support.models import Model
from tests.support.ranks import RankPool
from tests.support.reference import outcome_of

WAIT_S = 60.0


class Held:
    """Lets the writer thread take its first bucket at once, and the others when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()
        write = Save.write_bucket

        def write_bucket(save: Save, bucket: int, *rest: Callable[[], None]) -> None:
            if bucket != save.buckets[0] and threading.current_thread().name == "checkpoint":
                self.reached.set()
                assert self.go.wait(WAIT_S)
            write(save, bucket, *rest)

        monkeypatch.setattr(Save, "write_bucket", write_bucket)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_one_step(tmp_path: Path, held: Held, kind: str) -> None:
    """An update that begins while half is written waits; the file equals that of a plain save."""
    model, optimizer = make(kind, seed=1)
    train(model, optimizer, 0, 3)
    save_checkpoint(tmp_path / "plain", model=model, optimizer=optimizer)
    pending = begin_checkpoint(tmp_path / "beside", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    step = threading.Thread(target=train, args=(model, optimizer, 3, 4))
    step.start()
    step.join(0.1)
    assert step.is_alive()  # in an update of a bucket that is not written yet
    assert not (tmp_path / "beside").exists()
    held.go.set()
    step.join(WAIT_S)
    assert not step.is_alive()
    after = [parameter.detach().clone() for parameter in model.parameters()]
    for number in range(4, 30):
        train(model, optimizer, number, number + 1)
        if pending.commit_if_written():
            break
    assert files(tmp_path / "beside") == files(tmp_path / "plain")
    assert verify_checkpoint(tmp_path / "beside").step == 3
    assert pending.commit_if_written()  # again it does nothing
    # And training has lost nothing by it.
    other_model, other = make(kind, seed=1)
    train(other_model, other, 0, 4)
    assert all(map(torch.equal, after, other_model.parameters()))


@pytest.mark.parametrize("kind", ["adam_offload", "adam_beside"])
def test_updates_of_a_device_wait_as_well(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Adam, "_backend", HOST_AS_DEVICE)
    test_the_bytes_are_those_of_one_step(tmp_path, held, kind)


def test_updates_that_overlap_with_the_forward_wait_as_well(tmp_path: Path, held: Held) -> None:
    """`step()` returns, and the forward waits for updates that wait for the writer."""
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Model())
        trained = [p for p in models[-1].parameters() if p.requires_grad]
        optimizers.append(
            OffloadAdam(
                trained,
                lr=0.05,
                module=models[-1],
                overlap=True,
                offload=OffloadPolicy(bucket_nbytes=512),
            )
        )
        train(models[-1], optimizers[-1], 0, 2)
    (model, _), (optimizer, other) = models, optimizers
    save_checkpoint(tmp_path / "plain", model=model, optimizer=optimizer)
    pending = begin_checkpoint(tmp_path / "beside", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    train(model, optimizer, 2, 3)
    assert not pending.commit_if_written()
    threading.Timer(0.2, held.go.set).start()
    train(model, optimizer, 3, 5)
    pending.wait()
    assert files(tmp_path / "beside") == files(tmp_path / "plain")
    train(models[1], other, 2, 5)
    assert_same(whole_state(model, optimizer), whole_state(models[1], other))
    optimizer.close()
    other.close()


def test_close_releases_updates_that_overlap_with_the_forward(tmp_path: Path, held: Held) -> None:
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OffloadAdam(
        trained, module=model, overlap=True, offload=OffloadPolicy(bucket_nbytes=512)
    )
    begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    train(model, optimizer, 0, 1)
    threading.Timer(0.2, held.go.set).start()
    optimizer.close()
    assert not list(tmp_path.glob("*/*"))


def test_a_bucket_can_be_updated_once_it_is_written(held: Held, tmp_path: Path) -> None:
    """The bucket that is updated first is written first: its update need not wait for the rest."""
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 1)
    begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    lock = optimizer._alive().snapshot_lock
    last = max(shard.bucket for shard in shards_of(optimizer._settled().states))
    assert last > 0
    lock.wait_until_free(last)
    assert lock._held == set(range(last))
    held.go.set()
    lock.wait_until_free(0)
    optimizer.close()


def commit_together(rank: int, world_size: int, folder: str) -> tuple[int, dict[str, Any], Any]:
    """Commit when both ranks have written, rank 1 slowly; return the step after which they did."""
    go = threading.Event()
    finish = Save.finish

    def slow(save: Save) -> RankEntry:
        if rank == 1:
            assert go.wait(WAIT_S)
        return finish(save)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Save, "finish", slow)
        model, optimizer = make("bf16", seed=1)
        train(model, optimizer, 0, 2)
        before = whole_state(model, optimizer)
        pending = begin_checkpoint(folder, model=model, optimizer=optimizer, extra={"at": 2})
        for step in range(2, 6):  # training goes on while rank 1 is not done
            assert not committed(model, optimizer, pending, step)
        go.set()
        at = next(step for step in range(6, 10**6) if committed(model, optimizer, pending, step))
    load_checkpoint(folder, model=model, optimizer=optimizer)
    after = whole_state(model, optimizer)
    optimizer.close()
    return at, before, after


def committed(model: Any, optimizer: Any, pending: Any, step: int) -> bool:
    assert not pending.commit_if_written()
    train(model, optimizer, step, step + 1)
    return bool(pending.commit_if_written())


def test_all_ranks_commit_after_the_same_step(ranks: RankPool, tmp_path: Path) -> None:
    (one, before, after), (two, _, _) = ranks.run(commit_together, 2, str(tmp_path / "c"))
    assert one == two
    assert_same(before, after)
    assert not list(tmp_path.glob("*.partial"))


def fail_on_one(rank: int, world_size: int, folder: str) -> list[Any]:
    """Fill up the disk of rank 1 during training."""
    write = Save.write_bucket

    def failing(save: Save, bucket: int, *rest: Callable[[], None]) -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(save, bucket, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Save, "write_bucket", failing)
        model, optimizer = make("fp32", seed=1)
        pending = begin_checkpoint(f"{folder}/c", model=model, optimizer=optimizer)
        found = []
        for step in range(10**6):
            train(model, optimizer, step, step + 1)
            outcome = outcome_of(pending.commit_if_written)
            if outcome.error:
                found += [step, outcome]
                break
        assert pending.commit_if_written()
    # It is over: the next one is written, and the failed one has left nothing.
    begin_checkpoint(f"{folder}/d", model=model, optimizer=optimizer).wait()
    optimizer.close()
    return found


def test_a_failed_write_is_reported_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    (step, first), (other_step, second) = ranks.run(fail_on_one, 2, str(tmp_path))
    assert step == other_step
    assert first.error == "PeerError"
    assert "No space left on device" in first.message
    assert (second.error, "No space left" in second.message) == ("OSError", True)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    verify_checkpoint(tmp_path / "d")


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, held: Held) -> None:
    model, optimizer = make("fp32", seed=1)
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    for begin in (begin_checkpoint, save_checkpoint):
        with pytest.raises(CheckpointError, match="Wait for it first"):
            begin(tmp_path / "d", model=model, optimizer=optimizer)
    held.go.set()
    pending.wait()
    pending.wait()
    save_checkpoint(tmp_path / "d", model=model, optimizer=optimizer)
    assert files(tmp_path / "c") == files(tmp_path / "d")


def test_close_abandons_an_unfinished_checkpoint(tmp_path: Path, held: Held) -> None:
    model, optimizer = make("fp32", seed=1)
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    threading.Timer(0.2, held.go.set).start()
    optimizer.close()
    with pytest.raises(CheckpointError, match="closed before"):
        pending.wait()
    assert not list(tmp_path.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.mark.parametrize("how", ["clamp", "load", "refresh"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_an_external_edit_during_the_write_spoils_the_checkpoint(
    tmp_path: Path, held: Held, how: str, kind: str
) -> None:
    model, optimizer = make(kind, seed=1)
    train(model, optimizer, 0, 1)
    with torch.no_grad():
        model.scale.mul_(0.5)  # before it begins: part of it
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    threading.Timer(0.2, held.go.set).start()
    with torch.no_grad():
        if how == "clamp":
            model.head.bias.clamp_(-0.01, 0.01)
        elif how == "load":
            model.load_state_dict(model.state_dict())
        else:
            model.scale.data.mul_(2.0)
            optimizer.refresh_master()
    with pytest.raises(CheckpointError, match="modified outside the optimizer"):
        pending.wait()
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)


def test_external_edits_before_and_after_the_write_do_not_spoil_it(
    tmp_path: Path, held: Held
) -> None:
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 1)
    with torch.no_grad():
        model.scale.mul_(0.5)
    save_checkpoint(tmp_path / "plain", model=model, optimizer=optimizer)
    held.go.set()
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    optimizer._alive().external_edits.wait_for_snapshot()
    with torch.no_grad():
        model.scale.mul_(0.5)
    train(model, optimizer, 1, 2)
    pending.wait()
    assert files(tmp_path / "c") == files(tmp_path / "plain")


def test_loading_waits_until_the_checkpoint_has_read_the_state(tmp_path: Path, held: Held) -> None:
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path / "one", model=model, optimizer=optimizer)
    train(model, optimizer, 1, 2)
    save_checkpoint(tmp_path / "two", model=model, optimizer=optimizer)
    pending = begin_checkpoint(tmp_path / "beside", model=model, optimizer=optimizer)
    start_s = time.monotonic()
    threading.Timer(0.3, held.go.set).start()
    load_checkpoint(tmp_path / "one", model=model, optimizer=optimizer)
    assert time.monotonic() - start_s > 0.3
    pending.wait()
    assert files(tmp_path / "beside") == files(tmp_path / "two")


def test_a_disk_too_full_for_the_header_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("offload_adam.checkpoint.rank_file._SummedFile.write", full)
    model, optimizer = make("fp32", seed=1)
    for begin in (begin_checkpoint, save_checkpoint):
        with pytest.raises(OSError, match="No space left"):
            begin(tmp_path / "c", model=model, optimizer=optimizer)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)


def test_data_that_are_replaced_wait_for_the_bytes_of_one_step(tmp_path: Path, held: Held) -> None:
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 3)
    save_checkpoint(tmp_path / "plain", model=model, optimizer=optimizer)
    pending = begin_checkpoint(tmp_path / "beside", model=model, optimizer=optimizer)
    assert held.reached.wait(WAIT_S)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    settle = threading.Thread(target=optimizer.synchronize)
    settle.start()
    settle.join(0.1)  # it must not write to buckets that are not read yet
    held.go.set()
    settle.join(WAIT_S)
    assert not settle.is_alive()
    pending.wait()
    assert files(tmp_path / "beside") == files(tmp_path / "plain")
    assert all(map(torch.equal, expected, model.parameters()))
