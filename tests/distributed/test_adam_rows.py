"""Sparse gradients that differ between the ranks: in rows, in their number, or missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offload_adam import Adam
from tests.support.ranks import RankPool
from tests.unit.adam.reference import Parameter, ReferenceAdam, Sparse

SHAPE = (7, 3)
RATE, DECAY = 0.05, 0.1
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lazy": {"use_lazy": True},
    "offload": {"use_offload": True},
}
# The rows of each rank in each step; None is no gradient at all.
ROWS: list[list[list[int] | None]] = [
    [[0, 0, 6], [6, 1], [2]],
    [None, [3, 3, 3], [4]],
    [[], [], [5, 0]],
    [None, None, []],
    [[1], None, [1, 1]],
]


def initial() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def values_of(rank: int, step: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn((count, SHAPE[1]), generator=generator).to(dtype)


def gradient_of(rank: int, step: int, dtype: torch.dtype) -> torch.Tensor | None:
    rows = ROWS[step][rank]
    if rows is None:
        return None
    indices = torch.tensor([rows], dtype=torch.int64)
    values = values_of(rank, step, len(rows), dtype)
    return torch.sparse_coo_tensor(indices, values, SHAPE, check_invariants=True)


def run_rank(
    rank: int, world_size: int, name: str, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    table = nn.Parameter(initial().to(dtype))
    optimizer = Adam(
        [{"params": [("table", table)]}],
        RATE,
        weight_decay=DECAY,
        gradient_reduction="optimizer",
        **OPTIONS[name],
    )
    for step in range(len(ROWS)):
        optimizer((gradient_of(rank, step, dtype),))
    full = optimizer.full_state_dict()  # of rank 0; empty elsewhere
    found = {**full["state"][0], "master_weight": table.detach()} if full else {}
    if full and dtype != torch.float32:
        found["master_weight"] = full["offload_adam"]["master_weight"][0]
    copies = {key: value.clone() for key, value in found.items()}
    weight = table.detach().clone()
    optimizer.close()
    return copies, weight


def run_reference(name: str, world_size: int, dtype: torch.dtype) -> ReferenceAdam:
    """Give one rank all entries, each divided by the number of ranks."""
    start = initial().to(dtype).double().numpy()
    reference = ReferenceAdam([Parameter(start, RATE, DECAY)], lazy=name == "lazy")
    for step in range(len(ROWS)):
        rows: list[int] = []
        values: list[np.ndarray[Any, Any]] = [np.zeros((0, SHAPE[1]))]
        for rank in range(world_size):
            mine = ROWS[step][rank] or []
            rows += mine
            values.append(values_of(rank, step, len(mine), dtype).double().numpy())
        given = any(ROWS[step][rank] is not None for rank in range(world_size))
        entries = Sparse(np.array(rows, dtype=np.int64), np.concatenate(values) / world_size)
        assert reference.update([entries if given else None])
    return reference


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_entries_of_all_ranks_are_combined(
    ranks: RankPool, name: str, dtype: torch.dtype, world_size: int
) -> None:
    found = ranks.run(run_rank, world_size, name, dtype, timeout=60.0)
    (expected,) = run_reference(name, world_size, dtype).parameters
    # Gradients are of size one and moments smaller: eight roundings, each 2**-24 of its terms. A
    # direction is at most about ten, its error that many 2**-24 of the learning rate, every step.
    moment, weight = 8 * 2.0**-24, len(ROWS) * 2.0**-24 * (4.0 + 80 * RATE)
    state, parameter = found[0]
    assert int(state["step"]) == len(ROWS)
    assert np.abs(state["exp_avg"].double().numpy() - expected.m).max() <= moment
    assert np.abs(state["exp_avg_sq"].double().numpy() - expected.v).max() <= moment
    master = state["master_weight"]
    assert np.abs(master.double().numpy() - expected.weight).max() <= weight
    assert torch.equal(parameter, master.to(dtype))
    assert all(torch.equal(other, parameter) for _, other in found)


def run_with_nan(rank: int, world_size: int, name: str) -> list[Any]:
    table = nn.Parameter(initial())
    rates = [0.5, 0.25]
    optimizer = Adam([("table", table)], rates, gradient_reduction="optimizer", **OPTIONS[name])
    rows = torch.tensor([[rank]])
    good = torch.sparse_coo_tensor(rows, torch.ones(1, SHAPE[1]), SHAPE)
    bad = torch.sparse_coo_tensor(rows, torch.full((1, SHAPE[1]), float("nan")), SHAPE)
    seen: list[Any] = []
    for given in (good, bad if rank == 1 else good, good):
        before = table.detach().clone()
        optimizer((given,))
        assert optimizer.last_step is not None
        moved = not torch.equal(before, table)
        seen.append((optimizer.last_step.skipped, optimizer.global_step, moved))
    optimizer.close()
    return seen


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_nan_in_the_rows_of_one_rank_skips_the_step_of_all(ranks: RankPool, name: str) -> None:
    for seen in ranks.run(run_with_nan, 3, name, timeout=60.0):
        # Two rates are enough for three calls: the skipped one used none.
        assert seen == [(False, 1, True), (True, 1, False), (False, 2, True)]
