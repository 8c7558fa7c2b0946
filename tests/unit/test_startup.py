"""A process's place among the ranks, and what joining leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from offload_adam.coordinator import startup
from offload_adam.coordinator.launcher import launched
from offload_adam.coordinator.startup import World, joined_world
from offload_adam.options import FailurePolicy

MEETING_TIMEOUT = timedelta(seconds=10)


def test_a_process_alone_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.from_environment({}) == World(0, 1, 0, 1)
    with joined_world() as world:
        assert world.world_size == 1
        assert not dist.is_initialized()


def test_the_place_is_read_from_torchruns_variables() -> None:
    values = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert World.from_environment(values) == World(5, 8, 0, 1)
    values |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert World.from_environment(values) == World(5, 8, 1, 4)


def test_a_rank_without_a_world_is_a_process_alone() -> None:
    alone = {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert World.from_environment(alone) == World(0, 1, 0, 1)
    assert launched("LOCAL_WORLD_SIZE", alone) == 1


@pytest.mark.parametrize("text", ["", "x", "-1", "1.0", "2147483648", "9" * 5000])
def test_an_invalid_number_counts_as_absent_and_is_rejected(text: str) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert launched("RANK", values | {"RANK": text}) == 0
    with pytest.raises(ValueError, match="RANK") as error:
        World.from_environment(values | {"RANK": text})
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE=0 must be at least 1"):
        World.from_environment(values | {"LOCAL_WORLD_SIZE": "0"})


@dataclass
class FakeGpus:
    """A host's GPUs, of which each rank, a thread, sees its own list."""

    monkeypatch: pytest.MonkeyPatch
    has_uuid: bool = True
    chosen: list[str] = field(default_factory=list)
    opened: list[torch.device | None] = field(default_factory=list)
    rank: Any = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: len(self.rank.visible),
            "set_device": lambda device: self.chosen.append(self.rank.visible[device.index]),
            "get_device_properties": self.properties,
        }.items():
            self.monkeypatch.setattr(torch.cuda, name, value)

    def properties(self, device: torch.device) -> SimpleNamespace:
        uuid = {"uuid": self.rank.visible[device.index]} if self.has_uuid else {}
        return SimpleNamespace(name="Fast GPU", **uuid)

    def see(self, *visible: str) -> None:
        self.rank.visible = visible

    def join(self, seen: Sequence[Sequence[str]]) -> list[BaseException | None]:
        """Let ranks that see these GPUs meet; return each one's error."""
        store = dist.HashStore()
        self.monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))
        self.monkeypatch.setattr(
            dist, "init_process_group", lambda *_, device_id, **__: self.opened.append(device_id)
        )

        def join(rank: int) -> BaseException | None:
            self.see(*seen[rank])
            world = World(rank, len(seen), local_rank=rank, local_world_size=len(seen))
            try:
                startup._use_own_gpu(world)
                startup._open_default_group(world, MEETING_TIMEOUT, FailurePolicy())
            except Exception as error:
                return error
            return None

        with ThreadPoolExecutor(len(seen)) as ranks:
            return list(ranks.map(join, range(len(seen))))


def test_the_only_visible_gpu_is_a_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpus(monkeypatch)
    assert gpus.join([["a"], ["b"]]) == [None, None]
    assert sorted(gpus.chosen) == ["a", "b"]
    assert gpus.opened == [torch.device("cuda", 0)] * 2


def test_of_several_gpus_a_rank_has_that_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpus(monkeypatch)
    assert gpus.join([["a", "b", "c"]] * 2) == [None, None]
    assert sorted(gpus.chosen) == ["a", "b"]
    gpus.see("a", "b")
    with pytest.raises(RuntimeError, match=r"Local rank 2 .*2 GPU\(s\).*--nproc-per-node=2"):
        startup._use_own_gpu(World(2, 3, local_rank=2))


def test_every_rank_is_told_which_two_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = FakeGpus(monkeypatch)
    errors = gpus.join([["a"], ["b"], ["a"]])
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(
        RuntimeError,
        match=r"Ranks (0 and 2|2 and 0) use .*Fast GPU with UUID a.*a different one visible",
    ):
        raise errors[0] or AssertionError
    assert gpus.opened == []


def test_a_gpu_without_an_identity_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FakeGpus(monkeypatch, has_uuid=False).join([["a"], ["b"]]) == [None, None]
