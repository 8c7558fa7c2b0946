"""A process's place among the ranks, and what joining leaves behind."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from offload_adam.coordinator.startup import World, joined_world


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
    assert World.from_environment({"RANK": "5", "LOCAL_RANK": "1"}) == World(0, 1, 0, 1)
