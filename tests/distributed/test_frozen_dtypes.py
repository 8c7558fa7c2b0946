"""Frozen tensors of every dtype go from world to world; what cannot be saved fails on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from offload_adam import OffloadAdam, begin_checkpoint, load_checkpoint, save_checkpoint
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of
from tests.unit.checkpoint.test_dtypes import contents, make


def save(rank: int, world_size: int, path: str) -> dict[str, list[Any]]:
    model, optimizer = make(1)
    begin_checkpoint(path, model=model, optimizer=optimizer).wait()
    optimizer.close()
    return contents(model)


def load(rank: int, world_size: int, path: str) -> dict[str, list[Any]]:
    model, optimizer = make(2 + rank)
    load_checkpoint(path, model=model, optimizer=optimizer)
    optimizer.close()
    return contents(model)


def test_every_dtype_in_other_worlds(ranks: RankPool, tmp_path: Path) -> None:
    original = ranks.run(save, 2, str(tmp_path / "c"), timeout=60.0)[0]
    expected = contents(make(1)[0])
    assert original == expected
    for world_size in (1, 2):
        for found in ranks.run(load, world_size, str(tmp_path / "c"), timeout=60.0):
            assert found == expected


def reject(rank: int, world_size: int, path: str) -> list[Outcome]:
    mesh = init_device_mesh("cpu", (world_size,))
    sharded = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    model = nn.Linear(2, 2)
    optimizer = OffloadAdam(model.parameters(), gradient_reduction="optimizer")
    outcomes = []
    for table in (torch.ones(2, device="meta"), sharded):
        model.register_buffer("table", table if rank == 1 else torch.ones(2))
        outcomes += [
            outcome_of(lambda: save_checkpoint(path, model=model, optimizer=optimizer)),
            outcome_of(lambda: begin_checkpoint(path, model=model, optimizer=optimizer).wait()),
        ]
    optimizer.close()
    return outcomes


def test_a_rank_that_cannot_save_a_tensor_stops_all(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(reject, 2, str(tmp_path / "c"), timeout=60.0)
    # The second table is a whole tensor on rank 0, but a part of a larger one on rank 1.
    words = [
        ("Rank(s) [1] failed in preparing a checkpoint", "model/table is on the meta device"),
        ("Rank(s) [0] failed in committing a checkpoint", "'model/table' is F32 [2] on some ranks"),
    ]
    expected = [words[0], words[0], words[1], words[1]]
    for outcome, (phase, problem) in zip(found[0] + found[1], 2 * expected, strict=True):
        assert outcome.error == "CheckpointError"
        assert phase in outcome.message
        assert problem in outcome.message
    assert list(tmp_path.iterdir()) == []
