"""Background checkpoints that copy buckets before their update, so that no step waits."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import (
    Adam,
    OffloadAdam,
    OffloadPolicy,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint import save
from offload_adam.checkpoint.format import read_manifest
from offload_adam.checkpoint.rank_file import Part, _SummedFile
from offload_adam.coordinator import node_memory
from offload_adam.errors import HostMemoryError
from offload_adam.layout.flat import ParameterSpec
from offload_adam.params.selection import bucket_key_of
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import predict
from offload_adam.state.state_shard import shards_of
from tests.distributed.test_checkpoints import assert_same, train, whole_state
from tests.support.devices import HOST_AS_DEVICE
from tests.support.models import Model
from tests.support.ranks import RankPool

WAIT_S = 30.0
BUCKET_NBYTES = 512
PLENTY = 2**20
KINDS = ("fp32", "bf16", "streaming", "adam_beside", "adam_offload")


def make(kind: str, seed: int, buffer_nbytes: int) -> tuple[Model, Any]:
    torch.manual_seed(seed)
    model = Model()
    if kind in ("bf16", "streaming"):
        model = model.to(torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared: dict[str, Any] = {
        "gradient_reduction": "optimizer",
        "offload": OffloadPolicy(bucket_nbytes=BUCKET_NBYTES, snapshot_buffer_nbytes=buffer_nbytes),
    }
    if kind.startswith("adam"):
        return model, Adam(trained, 0.05, use_offload=kind == "adam_offload", **shared)
    return model, OffloadAdam(
        trained, lr=0.05, module=model if kind == "streaming" else None, **shared
    )


class Disk:
    """Stands still under the thread that writes, until it is told to go, and may then be full.

    num_writes: what that thread has written since.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()
        self.full_at = -1
        self.delay_s = 0.0
        self.num_writes = 0
        write = _SummedFile.write

        def slow(file: _SummedFile, data: memoryview) -> None:
            if threading.current_thread().name == "checkpoint":
                self.reached.set()
                assert self.go.wait(WAIT_S)
                time.sleep(self.delay_s)
                if self.num_writes == self.full_at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.num_writes += 1
            write(file, data)

        monkeypatch.setattr(_SummedFile, "write", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def assert_holds(path: Path, kind: str, expected: dict[str, Any]) -> None:
    """Load it elsewhere, every byte verified."""
    model, optimizer = make(kind, seed=7, buffer_nbytes=0)
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert_same(whole_state(model, optimizer), expected)
    optimizer.close()


def assert_trained(kind: str, end: int, found: dict[str, Any]) -> None:
    """It is where a run is that has never saved."""
    model, optimizer = make(kind, seed=1, buffer_nbytes=0)
    train(model, optimizer, 0, end)
    assert_same(whole_state(model, optimizer), found)
    optimizer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_buffer_no_step_waits_for_a_disk_that_hangs(
    tmp_path: Path, disk: Disk, kind: str
) -> None:
    model, optimizer = make(kind, seed=1, buffer_nbytes=PLENTY)
    train(model, optimizer, 0, 3)
    before = whole_state(model, optimizer)
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert disk.reached.wait(WAIT_S)  # all is copied, and not a byte of it written
    train(model, optimizer, 3, 6)
    assert optimizer._alive().snapshot_lock.num_waits == 0
    assert disk.num_writes == 0
    disk.go.set()
    pending.wait()
    assert (pending.num_waits, pending.waited_s) == (0, 0.0)
    assert_holds(tmp_path / "c", kind, before)
    assert_trained(kind, 6, whole_state(model, optimizer))
    optimizer.close()


@pytest.mark.parametrize("kind", ["adam_offload", "adam_beside"])
def test_what_a_device_updates_is_copied_as_well(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Adam, "_backend", HOST_AS_DEVICE)
    test_with_a_buffer_no_step_waits_for_a_disk_that_hangs(tmp_path, disk, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_with_too_small_a_buffer_a_step_waits_and_nothing_is_lost(
    tmp_path: Path, disk: Disk, kind: str, share: float
) -> None:
    model, optimizer = make(kind, seed=1, buffer_nbytes=PLENTY)
    buffer_nbytes = int(share * optimizer.host_nbytes["snapshot buffer"])
    optimizer.close()
    model, optimizer = make(kind, seed=1, buffer_nbytes=buffer_nbytes)
    train(model, optimizer, 0, 3)
    before = whole_state(model, optimizer)
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert disk.reached.wait(WAIT_S)
    lock = optimizer._alive().snapshot_lock
    num_buckets = len({shard.bucket for shard in shards_of(optimizer._settled().states)})
    assert 0 < len(lock._held) < num_buckets  # those that are updated first have been copied
    assert num_buckets - 1 not in lock._held
    step = threading.Thread(target=train, args=(model, optimizer, 3, 4))
    step.start()
    end_s = time.monotonic() + WAIT_S
    while lock.num_waits == 0 and time.monotonic() < end_s:
        time.sleep(0.001)
    assert lock.num_waits == 1
    assert step.is_alive()
    disk.delay_s = 0.002
    disk.go.set()
    step.join(WAIT_S)
    train(model, optimizer, 4, 6)
    pending.wait()
    assert pending.num_waits >= 1
    assert pending.waited_s > 0.0
    assert_holds(tmp_path / "c", kind, before)
    assert_trained(kind, 6, whole_state(model, optimizer))
    optimizer.close()


def test_a_bucket_is_held_until_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make("bf16", seed=1, buffer_nbytes=PLENTY)
    lock = optimizer._alive().snapshot_lock
    held: list[bool] = []
    copy = save.copy_bytes

    def watched(part: Part, target: Part) -> None:
        copy(part, target)
        held.append(part.bucket in lock._held)

    monkeypatch.setattr(save, "copy_bytes", watched)
    begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer).wait()
    num_parts = sum(1 + len(s.planes) for s in shards_of(optimizer._settled().states))
    assert held == [True] * num_parts
    optimizer.close()


@pytest.mark.parametrize("full_at", [0, 4, 9])
def test_a_failed_save_gives_its_buffer_back(tmp_path: Path, disk: Disk, full_at: int) -> None:
    """Whatever it was writing: the next one has all of the buffer again."""
    model, optimizer = make("bf16", seed=1, buffer_nbytes=PLENTY)
    train(model, optimizer, 0, 1)
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    disk.full_at = full_at
    disk.go.set()
    with pytest.raises(OSError, match="No space left"):
        pending.wait()
    assert not list(tmp_path.iterdir())
    disk.go.clear()
    disk.reached.clear()
    disk.full_at = -1
    train(model, optimizer, 1, 2)
    before = whole_state(model, optimizer)
    held = dict(optimizer.host_nbytes)
    again = begin_checkpoint(tmp_path / "d", model=model, optimizer=optimizer)
    assert disk.reached.wait(WAIT_S)
    train(model, optimizer, 2, 4)
    disk.go.set()
    again.wait()
    assert again.num_waits == 0
    assert dict(optimizer.host_nbytes) == held
    assert_holds(tmp_path / "d", "bf16", before)
    optimizer.close()


def test_close_abandons_buckets_that_have_only_been_copied(tmp_path: Path, disk: Disk) -> None:
    model, optimizer = make("fp32", seed=1, buffer_nbytes=PLENTY)
    begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert disk.reached.wait(WAIT_S)
    threading.Timer(0.2, disk.go.set).start()
    optimizer.close()
    assert disk.num_writes == 1  # that of the part it was at
    assert not list(tmp_path.glob("*/*"))


def test_a_blocking_checkpoint_copies_nothing(tmp_path: Path) -> None:
    """In one that training waits for, buckets come in the order of their updates."""
    files = []
    for buffer_nbytes in (0, PLENTY):
        model, optimizer = make("fp32", seed=1, buffer_nbytes=buffer_nbytes)
        path = tmp_path / str(buffer_nbytes)
        save_checkpoint(path, model=model, optimizer=optimizer)
        files.append((path / "rank-00000-of-00001.safetensors").read_bytes())
        optimizer.close()
    assert files[0] == files[1]


def specs_of(model: nn.Module) -> list[ParameterSpec]:
    return [
        ParameterSpec(i, p.numel(), p.element_size(), bucket_key_of(p))
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad)
    ]


def nbytes_of_state(optimizer: Any) -> int:
    """Count what a rank's shards take, each plane as it is held."""
    planes = ("parameters", "master_weight", "exp_avg", "exp_avg_sq")
    entries = [entry for entry in optimizer.memory_ledger() if entry.category in planes]
    assert len(entries) > 3
    world_size = optimizer._alive().partition[1]
    return sum(e.nbytes // (world_size if e.category == "parameters" else 1) for e in entries)


def buffer_of(rank: int, world_size: int, kind: str, limit_nbytes: int) -> dict[str, int]:
    model, optimizer = make(kind, seed=1, buffer_nbytes=limit_nbytes)
    held = optimizer.host_nbytes["snapshot buffer"]
    (entry,) = (e for e in optimizer.memory_ledger() if e.category == "snapshot buffer")
    training = Training(
        world_size=world_size,
        on_device=False,
        replicated=kind == "adam_beside",
        offload=OffloadPolicy(bucket_nbytes=BUCKET_NBYTES, snapshot_buffer_nbytes=limit_nbytes),
    )
    found = {
        "held": held,
        "ledger": entry.nbytes,
        "mapped": sum(each.nbytes for each in optimizer._alive().snapshot_lock.buffers),
        "planned": predict(specs_of(model), training).host.get("snapshot buffer", 0),
        "state": nbytes_of_state(optimizer),
    }
    optimizer.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit_nbytes", [0, 1000, PLENTY])
def test_the_bytes_of_the_buffer_are_exact(kind: str, limit_nbytes: int) -> None:
    found = buffer_of(0, 1, kind, limit_nbytes)
    expected = {0: 0, 1000: 896, PLENTY: found["state"]}[limit_nbytes]  # 896 is 7 times 128
    assert [found[key] for key in ("held", "ledger", "mapped", "planned")] == [expected] * 4


@pytest.mark.parametrize("kind", ["bf16", "adam_beside"])
def test_each_rank_has_a_buffer_for_what_it_writes(ranks: RankPool, kind: str) -> None:
    found = ranks.run(buffer_of, 2, kind, PLENTY)
    for rank, of_rank in enumerate(found):
        # What all ranks have whole, rank 0 writes.
        expected = 0 if kind == "adam_beside" and rank == 1 else of_rank["state"]
        assert [of_rank[key] for key in ("held", "ledger", "mapped")] == [expected] * 3
    assert found[0]["planned"] == found[0]["state"]


def save_beside(rank: int, world_size: int, folder: str) -> tuple[dict[str, Any], int, int]:
    model, optimizer = make("bf16", seed=1, buffer_nbytes=PLENTY)
    train(model, optimizer, 0, 2)
    before = whole_state(model, optimizer)
    pending = begin_checkpoint(folder, model=model, optimizer=optimizer)
    optimizer._alive().external_edits.wait_for_snapshot()  # all is copied
    train(model, optimizer, 2, 4)
    pending.wait()
    load_checkpoint(folder, model=model, optimizer=optimizer)
    assert_same(before, whole_state(model, optimizer))
    optimizer.close()
    return before, pending.num_waits, len(read_manifest(Path(folder)).files)


def test_every_rank_copies_its_own(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(save_beside, 3, str(tmp_path / "c"))
    assert [rest for _, *rest in found] == [[0, 3]] * 3
    assert_holds(tmp_path / "c", "bf16", found[0][0])


def test_later_groups_share_what_is_left_of_the_limit(tmp_path: Path, disk: Disk) -> None:
    model = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
    limits = {2**20: (3072, 3072), 3600: (3072, 512)}  # 3 planes of twice 128 elements
    for limit_nbytes, expected in limits.items():
        optimizer = OffloadAdam(
            model[0].parameters(), offload=OffloadPolicy(snapshot_buffer_nbytes=limit_nbytes)
        )
        optimizer.add_param_group({"params": list(model[1].parameters())})
        assert tuple(each.nbytes for each in optimizer._alive().snapshot_lock.buffers) == expected
        assert optimizer.host_nbytes["snapshot buffer"] == sum(expected)
        optimizer.close()
    optimizer = OffloadAdam(
        model[0].parameters(), offload=OffloadPolicy(snapshot_buffer_nbytes=2**20)
    )
    optimizer.add_param_group({"params": list(model[1].parameters())})
    pending = begin_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert disk.reached.wait(WAIT_S)
    (model[0](torch.ones(2, 16)) + model[1](torch.ones(2, 16))).sum().backward()
    optimizer.step()
    disk.go.set()
    pending.wait()
    assert pending.num_waits == 0
    optimizer.close()


def test_a_buffer_that_does_not_fit_is_rejected_with_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_memory, "available_memory", lambda: (10_000, "of a small machine"))
    OffloadAdam([nn.Parameter(torch.zeros(512))]).close()  # 4 KiB of moments, and no buffer
    with pytest.raises(HostMemoryError, match=r"snapshot buffer +6.00 KiB\n +total +10.00 KiB"):
        OffloadAdam(
            [nn.Parameter(torch.zeros(512))], offload=OffloadPolicy(snapshot_buffer_nbytes=PLENTY)
        )


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_an_invalid_buffer_size_is_rejected(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="snapshot_buffer_nbytes must be"):
        OffloadAdam(
            [nn.Parameter(torch.zeros(3))], offload=OffloadPolicy(snapshot_buffer_nbytes=value)
        )
