"""The global norm over ranks, and gradients that were averaged outside the optimizer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import (
    Outcome,
    Weights,
    adam_in_float64,
    bits,
    exact_gradients,
    mean_of,
    outcome_of,
)

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
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
    )


class Clipped(NamedTuple):
    """The norms that one rank reported, and its final weights."""

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


def clip_with_torch(rank: int, world_size: int, foreach: bool | None) -> Clipped:
    """Clip with torch's own function, which finds stand-ins in `.grad`."""
    model = Weights(SHAPES)
    optimizer = make(model, streams=True)
    returned, reported = [], []
    for step in range(NUM_STEPS):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=foreach)
        returned.append(float(found))
        optimizer.step()
        assert optimizer.last_step is not None
        reported.append(optimizer.last_step.total_norm)
    result = Clipped(returned, reported, [p.detach().clone() for p in model.all])
    optimizer.close()
    return result


@pytest.mark.parametrize(("world_size", "foreach"), [(1, None), (2, None), (2, True)])
def test_torchs_own_clipping_of_streamed_gradients_is_that_of_the_mean(
    ranks: RankPool, world_size: int, foreach: bool | None
) -> None:
    model = Weights(SHAPES)
    steps = [
        mean_of([exact_gradients(model.all, 10 * s + r, world_size) for r in range(world_size)])
        for s in range(NUM_STEPS)
    ]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in s if g is not None)) for s in steps]
    assert min(norms) > MAX_NORM
    exact = adam_in_float64(model.all, steps, lr=LR, max_grad_norm=MAX_NORM)
    results = ranks.run(clip_with_torch, world_size, foreach)
    for clipped in results:
        # torch adds up four norms, and divides, in fp32: less than eight roundings of 2**-24.
        assert clipped.returned == pytest.approx(norms, rel=8 * 2**-24)
        assert clipped.reported == pytest.approx([MAX_NORM] * NUM_STEPS, rel=1e-5)
        assert bits(clipped.weights) == bits(results[0].weights)
        for weight, expected in zip(clipped.weights, exact, strict=True):
            # Three fp32 roundings of a weight below 4, and of updates of at most LR each.
            assert torch.allclose(weight.double(), expected, rtol=0.0, atol=1e-6)


def take_a_norm_on_one_rank(rank: int, world_size: int) -> Outcome:
    model = Weights(SHAPES)
    optimizer = make(model, streams=True)
    model(exact_gradients(model.all, rank, world_size)).backward()
    gradient = model.w0.grad
    assert gradient is not None
    outcome = outcome_of(gradient.norm if rank == 0 else optimizer.step)
    optimizer.close()
    return outcome


def multiply_on_one_rank(rank: int, world_size: int) -> Outcome:
    model = Weights(SHAPES)
    optimizer = make(model, streams=True)
    model(exact_gradients(model.all, rank, world_size)).backward()
    if rank == 0:
        for parameter in model.all:
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
    outcome = outcome_of(optimizer.step)
    optimizer.close()
    return outcome


def test_ranks_that_clip_differently_raise_an_error(ranks: RankPool) -> None:
    for outcome in ranks.run(take_a_norm_on_one_rank, 2):
        assert outcome.error == "RankDisagreementError"
        assert "the norm of a gradient in .grad" in outcome.message
    for outcome in ranks.run(multiply_on_one_rank, 2):
        assert outcome.error == "RankDisagreementError"
        assert "the factor of the gradients in .grad" in outcome.message


def clip_as_one_rank_cannot(rank: int, world_size: int, streams: bool) -> list[Outcome]:
    """Clip with a NaN, with a wrong argument, and with other arguments, on rank 1 alone."""
    model = Weights(SHAPES)
    optimizer = make(model, streams=streams)

    def clip(*args: Any) -> Outcome:
        model(exact_gradients(model.all, rank, world_size)).backward()
        outcome = outcome_of(lambda: optimizer.clip_grad_norm_(*args))
        optimizer.zero_grad()
        return outcome

    outcomes = [clip(1.0, 3.0 if rank == 1 else 2.0), clip(1.0, 2.0, rank == 1)]
    gradients = exact_gradients(model.all, rank, world_size)
    if rank == 1:
        assert gradients[0] is not None
        gradients[0][7] = math.nan
    model(gradients).backward()
    outcomes.append(outcome_of(lambda: optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)))
    before = bits(model.all)
    optimizer.step()  # of the same gradients: all ranks go on together, and skip
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert bits(model.all) == before
    optimizer.close()
    return outcomes


@pytest.mark.parametrize("streams", [False, True])
def test_clipping_that_one_rank_cannot_do_raises_on_all(ranks: RankPool, streams: bool) -> None:
    for rank, outcomes in enumerate(ranks.run(clip_as_one_rank_cannot, 2, streams)):
        wrong, different, non_finite = outcomes
        assert wrong.error == ("PeerError", "ValueError")[rank]
        assert ("norm_type must be 2.0, not 3.0" in wrong.message) is (rank == 1)
        assert different.error == "RankDisagreementError"
        assert "clip_grad_norm_(error_if_nonfinite=True)" in different.message
        assert non_finite.error == "RuntimeError"
        assert "The norm of the gradients is nan" in non_finite.message


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
        offload=OffloadPolicy(bucket_nbytes=1024),
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


def test_averaged_gradients_that_some_ranks_lack_are_rejected(ranks: RankPool) -> None:
    results = ranks.run(step_on_partial_averages, 3)
    for outcome, end, unchanged in results:
        assert outcome.error == "RankDisagreementError"
        assert "'w1' has a gradient on 2 of 3 ranks" in outcome.message
        assert unchanged
        assert end == results[0][1]
