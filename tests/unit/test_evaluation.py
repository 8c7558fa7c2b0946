"""The validation loss, against sequences cut by hand and on different numbers of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from offload_adam.config.sections import ModelSizes, TrainSection
from offload_adam.coordinator.ranks import open_rank_group
from offload_adam.coordinator.startup import World
from offload_adam.train.model import GPT, evaluate
from tests.support.ranks import RankPool

TOKENS = np.random.default_rng(0).integers(256, size=201).astype(np.uint8)
TRAIN = TrainSection(batch_size=3, sequence_length=20, eval_sequences=100)


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelSizes(num_layers=1, width=16, num_heads=2), max_length=20)


def by_hand() -> float:
    """Return the mean loss of all 200 targets: ten sequences of twenty cover the whole text."""
    model, losses = make_model(), []
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    for start in range(0, 200, 20):
        logits = model(tokens[None, start : start + 20])
        losses.append(F.cross_entropy(logits[0], tokens[start + 1 : start + 21]).item())
    return sum(losses) / 10


def test_it_is_the_mean_over_the_whole_split() -> None:
    model = make_model()
    assert evaluate(model, TOKENS, TRAIN, World()) == pytest.approx(by_hand(), rel=1e-6)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def evaluate_on_rank(rank: int, world_size: int) -> float:
    ranks = open_rank_group(None)
    world = World(rank, world_size, rank, world_size, ranks)
    loss = evaluate(make_model(), TOKENS, TRAIN, world)
    ranks.release()
    return loss


@pytest.mark.parametrize("world_size", [2, 3])
def test_it_is_the_same_on_any_number_of_ranks(ranks: RankPool, world_size: int) -> None:
    losses = ranks.run(evaluate_on_rank, world_size)
    assert losses == [pytest.approx(by_hand(), rel=1e-6)] * world_size
    assert len(set(losses)) == 1
