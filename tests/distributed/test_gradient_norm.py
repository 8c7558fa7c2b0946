"""The global norm over ranks, and gradients that others have averaged."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from offload_adam import OffloadAdam
from tests.distributed.reference import (
    Outcome,
    Weights,
    adam_in_float64,
    bits,
    exact_gradients,
    mean_of,
    outcome_of,
)
from tests.ranks import RankPool

SHAPES: list[tuple[int, ...]] = [(200,), (3, 50), (), (700,)]
MAX_NORM = 0.75
LR = 1e-2
NUM_STEPS = 3


def make(model: Weights, *, streams: bool, max_grad_norm: float | None = None) -> OffloadAdam:
    return OffloadAdam(
        model.parameters(),
        lr=LR,
        max_grad_norm=max_grad_norm,
        module=model if streams else None,
        gradient_reduction="optimizer",
        bucket_nbytes=1024,
        num_threads=1,
    )


class Clipped(NamedTuple):
    """The norms that one rank was told, and its weights at the end."""

    returned: list[float]
    reported: list[float]
    weights: list[torch.Tensor]


def clip_by_call(rank: int, world_size: int, streams: bool) -> Clipped:
    """Clip by a call before each step, and once more in vain: it holds for one step alone."""
    model = Weights(SHAPES)
    optimizer = make(model, streams=streams)
    returned, reported = [], []
    for step in range(NUM_STEPS):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        returned.append(float(optimizer.clip_grad_norm_(1e-3)))
        returned.append(float(optimizer.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
        assert optimizer.last_step is not None
        reported.append(optimizer.last_step.total_norm)
        optimizer.zero_grad()
    result = Clipped(returned, reported, [p.detach().clone() for p in model.all])
    optimizer.close()
    return result


def clip_by_option(rank: int, world_size: int, streams: bool) -> list[bytes]:
    model = Weights(SHAPES)
    optimizer = make(model, streams=streams, max_grad_norm=MAX_NORM)
    for step in range(NUM_STEPS):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    result = bits(model.all)
    optimizer.close()
    return result


def test_the_norm_is_that_of_the_mean_gradient_on_every_rank(ranks: RankPool) -> None:
    world_size = 3
    model = Weights(SHAPES)
    steps = [
        mean_of([exact_gradients(model.all, 10 * s + r, world_size) for r in range(world_size)])
        for s in range(NUM_STEPS)
    ]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in s if g is not None)) for s in steps]
    assert min(norms) > MAX_NORM
    exact = adam_in_float64(model.all, steps, lr=LR, max_grad_norm=MAX_NORM)
    for streams in (False, True):
        by_option = ranks.run(clip_by_option, world_size, streams)
        for rank, clipped in enumerate(ranks.run(clip_by_call, world_size, streams)):
            # Squares of these gradients and their sums are exact in float64.
            assert clipped.reported == norms
            assert clipped.returned == [norm for norm in norms for _ in range(2)]
            assert bits(clipped.weights) == by_option[rank]
            for weight, expected in zip(clipped.weights, exact, strict=True):
                # Three fp32 roundings of a weight below 4, and of updates of at most LR each.
                assert torch.allclose(weight.double(), expected, rtol=0.0, atol=1e-6)


def step_on_partial_averages(rank: int, world_size: int) -> tuple[Outcome, list[bytes], bool]:
    """Give averaged gradients with one missing on rank 2, then give it there too."""
    model = Weights(SHAPES)
    optimizer = OffloadAdam(
        model.named_parameters(),
        lr=LR,
        gradient_reduction="external",
        bucket_nbytes=1024,
        num_threads=1,
    )
    gradients = exact_gradients(model.all, 0, world_size)
    for position, (parameter, gradient) in enumerate(zip(model.all, gradients, strict=True)):
        parameter.grad = None if (rank, position) == (2, 1) else gradient
    before = bits(model.all)
    outcome = outcome_of(optimizer.step)
    unchanged = bits(model.all) == before
    model.w1.grad = gradients[1]
    optimizer.step()
    result = outcome, bits(model.all), unchanged
    optimizer.close()
    return result


def test_averages_that_are_not_on_all_ranks_are_refused(ranks: RankPool) -> None:
    results = ranks.run(step_on_partial_averages, 3)
    for outcome, end, unchanged in results:
        assert outcome.error == "RankDisagreementError"
        assert "'w1' has a gradient on 2 of 3 ranks" in outcome.message
        assert unchanged
        assert end == results[0][1]
