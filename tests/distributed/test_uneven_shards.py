"""Fewer elements than ranks, groups that are added later, and optimizers on some of the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import (
    Weights,
    adam_in_float64,
    bits,
    exact_gradients,
    mean_of,
)

NUM_STEPS = 3
LR = 1e-2
# Roundings to fp32 of weights below 4, once a step, and of updates of at most LR each.
ATOL = 1e-6


def train(model: Weights, optimizer: OffloadAdam, steps: range, rank: int, world_size: int) -> None:
    for step in steps:
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_trained(weights: list[torch.Tensor], shapes: list[tuple[int, ...]], ranks: int) -> None:
    """Compare weights with torch's Adam on the mean gradient, in float64."""
    model = Weights(shapes)
    steps = [
        mean_of([exact_gradients(model.all, 10 * step + rank, ranks) for rank in range(ranks)])
        for step in range(NUM_STEPS)
    ]
    expected = adam_in_float64(model.all, steps, lr=LR, weight_decay=0.1)
    for weight, exact in zip(weights, expected, strict=True):
        assert torch.allclose(weight.double(), exact, rtol=0.0, atol=ATOL)


def make(model: Weights, params: Any = None, **options: Any) -> OffloadAdam:
    return OffloadAdam(
        model.parameters() if params is None else params,
        lr=LR,
        weight_decay=0.1,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
        **options,
    )


def train_shapes(
    rank: int, world_size: int, worlds: list[list[tuple[int, ...]]]
) -> list[tuple[list[torch.Tensor], list[int]]]:
    """Train each set of shapes; return its weights and the elements of state held here."""
    results = []
    for shapes in worlds:
        model = Weights(shapes)
        optimizer = make(model, module=model)
        train(model, optimizer, range(NUM_STEPS), rank, world_size)
        numels = [optimizer.state[parameter]["exp_avg"].numel() for parameter in model.all]
        results.append(([parameter.detach().clone() for parameter in model.all], numels))
        optimizer.close()
    return results


def test_fewer_elements_than_ranks(ranks: RankPool) -> None:
    worlds: list[list[tuple[int, ...]]] = [
        [(1,)],
        [(3,), (), (0, 5)],
        [(129,), (2, 2)],
        [(0,)],
        [(513,)],
    ]
    results = ranks.run(train_shapes, 4, worlds)
    for number, shapes in enumerate(worlds):
        for weights, _ in (result[number] for result in results):
            assert_trained(weights, shapes, 4)
        # The ranks' parts tile every parameter.
        held = zip(*(result[number][1] for result in results), strict=True)
        assert [sum(parts) for parts in held] == [torch.Size(shape).numel() for shape in shapes]
    assert [result[0][1] for result in results] == [[1], [0], [0], [0]]


def add_groups(rank: int, world_size: int, streams: bool) -> tuple[list[torch.Tensor], list[bytes]]:
    """Start with one parameter and take two more in: after a step, and between backward and step.

    One optimizer that had all three from the start goes beside it.
    """
    shapes = [(300,), (7, 30), (2000,)]
    model, together = Weights(shapes), Weights(shapes)
    optimizer = make(model, [model.w0], module=model if streams else None)
    whole = make(together)

    def backward(seed: int, used: int) -> None:
        gradients: list[torch.Tensor | None] = []
        gradients += exact_gradients(model.all, seed + rank, world_size)
        gradients[used:] = [None] * (len(shapes) - used)
        model(gradients).backward()
        together(gradients).backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        whole.step()
        whole.zero_grad()

    backward(0, 1)
    step()
    if rank == 1:  # rank 0's values count, as at construction
        with torch.no_grad():
            model.w1.zero_()
    optimizer.add_param_group({"params": [model.w1]})
    backward(10, 2)
    optimizer.add_param_group({"params": [model.w2]})
    step()
    backward(20, 3)
    step()
    result = [parameter.detach().clone() for parameter in model.all], bits(together.all)
    optimizer.close()
    whole.close()
    return result


def test_groups_may_come_later_also_between_backward_and_step(ranks: RankPool) -> None:
    for streams in (False, True):
        for weights, expected in ranks.run(add_groups, 3, streams):
            assert bits(weights) == expected


PAIRS: list[list[tuple[int, ...]]] = [[(300,), (5,)], [(70, 3)]]


def train_in_pairs(rank: int, world_size: int) -> tuple[list[torch.Tensor], int]:
    """Ranks 0 and 2, and 1 and 3, each train a model of their own; the second pair longer."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    # Ranks of one pair need not be in as many groups, nor is this their first optimizer.
    dist.new_group([0, 1])
    make(Weights([(7,)]), process_group=groups[rank % 2]).close()
    model = Weights(PAIRS[rank % 2], seed=1 + rank // 2)
    optimizer = make(model, process_group=groups[rank % 2])
    for _ in range(rank % 2):
        # A step of this pair alone, which moves nothing.
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = LR
    train(model, optimizer, range(NUM_STEPS), rank // 2, 2)
    full = optimizer.full_state_dict()
    optimizer.close()
    return [parameter.detach().clone() for parameter in model.all], len(full)


def test_pairs_of_ranks_train_on_their_own(ranks: RankPool) -> None:
    results = ranks.run(train_in_pairs, 4)
    for rank, (weights, _) in enumerate(results):
        assert_trained(weights, PAIRS[rank % 2], 2)
    assert [size > 0 for _, size in results] == [True, True, False, False]
