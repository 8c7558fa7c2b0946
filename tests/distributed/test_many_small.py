"""A bucket of many small parameters, whose gradients are delivered a few at a time, over ranks."""

from __future__ import annotations

import pytest
import torch

from offload_adam import OffloadAdam
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed

NUM_PARAMETERS = 200


def used_by(rank: int) -> list[int]:
    """Return which parameters a rank uses: all, backwards, or a few, so that orders differ."""
    return [
        list(range(NUM_PARAMETERS)),
        list(range(NUM_PARAMETERS - 1, -1, -1)),
        list(range(25, 31)),
    ][rank]


def first_moments(rank: int, world_size: int) -> list[list[float]]:
    """Take one step and return every exp_avg as rank 0 sees it: 0.1 of the mean gradient."""
    model = torch.nn.ParameterList(
        torch.nn.Parameter(torch.zeros(2)) for _ in range(NUM_PARAMETERS)
    )
    optimizer = OffloadAdam(model.parameters(), module=model)
    terms = [model[i].sum() * float((i + 1) * (rank + 1)) for i in used_by(rank)]
    torch.stack(terms).sum().backward()
    optimizer.step()
    full = optimizer.full_state_dict()
    optimizer.close()
    return [entry["exp_avg"].tolist() for entry in full["state"].values()] if full else []


def test_ranks_with_different_orders_and_parts_have_the_mean(ranks: RankPool) -> None:
    found = torch.tensor(ranks.run(first_moments, 3)[0], dtype=torch.float64)
    expected = torch.zeros(NUM_PARAMETERS, 2, dtype=torch.float64)
    for rank in range(3):
        for i in used_by(rank):
            expected[i] += 0.1 * (i + 1) * (rank + 1) / 3
    assert (found - expected).abs().max() <= 2.0**-22 * expected.max()
