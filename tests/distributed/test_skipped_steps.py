"""Invariant 3: a step that one rank skips changes no bit on any rank, and training continues."""

from __future__ import annotations

import logging
import math
from logging.handlers import BufferingHandler
from typing import Any, NamedTuple

import pytest
import torch
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from offload_adam import Adam, OffloadAdam, OffloadPolicy
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

SHAPES: list[tuple[int, ...]] = [(200,), (3, 50), (), (500,)]
BAD_STEP = 1
BAD_RANK = 2
AdamType = type[OffloadAdam] | type[Adam]


class Skipped(NamedTuple):
    """One rank's bits before and after the bad step of a run, and at the end."""

    before: list[bytes]
    after: list[bytes]
    names: tuple[str, ...]
    num_skipped: int
    bad_rank_owns_it: bool
    end: list[bytes]


def everything(model: Weights, optimizer: OffloadAdam) -> list[bytes]:
    """Return the bits of all parameters, moments, master weights and step counters held here."""
    held = [model.w0.new_zeros(0)]
    for parameter in model.all:
        held += [parameter, *optimizer.state[parameter].values()]
    return bits(held)


def make(model: Weights, *, streams: bool) -> OffloadAdam:
    return OffloadAdam(
        model.named_parameters(),
        lr=1e-2,
        max_grad_norm=1.0,
        module=model if streams else None,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
    )


def train_with_a_bad_step(
    rank: int, world_size: int, dtype: torch.dtype, bad: float, streams: bool
) -> Skipped:
    model = Weights(SHAPES, dtype)
    optimizer = make(model, streams=streams)
    for step in (0, BAD_STEP, 2):
        gradients = exact_gradients(model.all, 10 * step + rank, world_size)
        if step == BAD_STEP:
            before = everything(model, optimizer)
            if rank == BAD_RANK:
                gradients[3][0] = bad
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == BAD_STEP:
            assert optimizer.last_step is not None
            assert optimizer.last_step.skipped
            assert math.isnan(optimizer.last_step.total_norm)
            after = everything(model, optimizer)
            names = optimizer.last_step.non_finite
    owned = optimizer.state[model.w3]["exp_avg"].numel() > 0 and rank == BAD_RANK
    result = (before, after, names, optimizer.skipped_steps, owned, everything(model, optimizer))
    optimizer.close()
    return Skipped(*result)


def train_without_it(rank: int, world_size: int, dtype: torch.dtype) -> list[bytes]:
    model = Weights(SHAPES, dtype)
    optimizer = make(model, streams=False)
    for step in (0, 2):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = everything(model, optimizer)
    optimizer.close()
    return end


def train_each_way(
    rank: int, world_size: int, dtype: torch.dtype
) -> tuple[list[Skipped], list[bytes]]:
    ways = [(math.nan, True), (math.inf, False), (-math.inf, True)]
    runs = [train_with_a_bad_step(rank, world_size, dtype, *way) for way in ways]
    return runs, train_without_it(rank, world_size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(
    ranks: RankPool, dtype: torch.dtype
) -> None:
    for runs, expected in ranks.run(train_each_way, 3, dtype):
        for run in runs:
            assert not run.bad_rank_owns_it
            assert run.after == run.before
            assert run.names == ("w3",)
            assert run.num_skipped == 1
            assert run.end == expected


def scale_and_skip(rank: int, world_size: int, streams: bool) -> tuple[list[bytes], list[Outcome]]:
    """Train with scaled gradients, skip where rank 1 alone says so, refuse unequal scales."""
    model = Weights(SHAPES)
    optimizer = make(model, streams=streams)
    outcomes = []
    for step in range(3):
        scale = 2.0 ** (5 + step)
        gradients = exact_gradients(model.all, 10 * step + rank, world_size)
        scaled = [gradient * scale for gradient in gradients]
        optimizer.grad_scale = scale
        if step == 1:
            before = everything(model, optimizer)
            optimizer.found_inf = torch.tensor(2.0 if rank == 1 else 0.0)
            model(scaled).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.last_step is not None
            assert optimizer.last_step.skipped
            assert optimizer.last_step.non_finite == ()
            optimizer.found_inf = 0.0
            optimizer.grad_scale = scale * (1 + rank)
            model(scaled).backward()
            outcomes.append(outcome_of(optimizer.step))
            optimizer.grad_scale = math.nan if rank == 1 else scale
            outcomes.append(outcome_of(optimizer.step))
            assert everything(model, optimizer) == before
            # What was refused can be mended: these gradients are still there.
            optimizer.grad_scale = torch.tensor(scale)
        else:
            model(scaled).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    result = bits(model.all), outcomes
    optimizer.close()
    return result


def overflow_on_one_rank(
    rank: int, world_size: int, sharded: bool, unscales: bool, adam: AdamType
) -> tuple[list[float], list[bytes]]:
    """Return the scale after each step and the weights; step `BAD_STEP` overflows on rank 1."""
    model = Weights(SHAPES)
    optimizer: Any = adam(model.parameters(), 1e-2, gradient_reduction="optimizer")
    options: dict[str, Any] = {"init_scale": 256.0, "growth_interval": 2}
    scaler = ShardedGradScaler("cpu", **options) if sharded else GradScaler("cpu", **options)
    scales = []
    for step in range(4):
        loss = model(exact_gradients(model.all, 10 * step + rank, world_size))
        bad = rank == 1 and step == BAD_STEP
        scaler.scale(loss * math.inf if bad else loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    result = scales, bits(model.all)
    optimizer.close()
    return result


def train_unscaled_without(rank: int, world_size: int, adam: AdamType) -> list[bytes]:
    """Return the weights after the same steps but `BAD_STEP`, without a scaler."""
    model = Weights(SHAPES)
    optimizer: Any = adam(model.parameters(), 1e-2, gradient_reduction="optimizer")
    for step in range(4):
        if step != BAD_STEP:
            model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
            optimizer.step()
            optimizer.zero_grad()
    result = bits(model.all)
    optimizer.close()
    return result


@pytest.mark.parametrize(
    ("sharded", "unscales", "adam"),
    [
        (False, False, OffloadAdam),
        (False, True, OffloadAdam),
        (True, False, OffloadAdam),
        (False, False, Adam),
    ],
)
def test_an_overflow_on_one_rank_lowers_the_scale_on_all(
    ranks: RankPool, sharded: bool, unscales: bool, adam: AdamType
) -> None:
    expected = ranks.run(train_unscaled_without, 2, adam)
    results = ranks.run(overflow_on_one_rank, 2, sharded, unscales, adam)
    for rank, (scales, weights) in enumerate(results):
        assert scales == [256.0, 128.0, 128.0, 256.0]
        assert weights == expected[rank]


def overflow_in_the_sum(rank: int, world_size: int) -> tuple[list[float], int]:
    """Return the scale after each step; first gradients are finite on each rank, their sum not."""
    model = Weights([(200,)])
    optimizer = OffloadAdam(model.parameters(), gradient_reduction="optimizer")
    scaler = GradScaler("cpu", init_scale=2.0, growth_interval=2)
    scales = []
    for value in (2.0**126, 1.0, 1.0):
        scaler.scale(model([torch.full((200,), value)])).backward()
        assert model.w0.grad is not None
        assert model.w0.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    result = scales, optimizer.skipped_steps
    optimizer.close()
    return result


def test_an_overflow_in_the_sum_over_ranks_lowers_the_scale(ranks: RankPool) -> None:
    # Two ranks' gradients of 2**127 add up to 2**128, which is above fp32's range.
    for scales, num_skipped in ranks.run(overflow_in_the_sum, 2):
        assert scales == [1.0, 1.0, 2.0]
        assert num_skipped == 1


def train_unscaled(rank: int, world_size: int) -> tuple[list[bytes], list[torch.Tensor]]:
    model = Weights(SHAPES)
    optimizer = make(model, streams=False)
    for step in range(3):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    result = bits(model.all), [weight.detach().clone() for weight in model.all]
    optimizer.close()
    return result


def test_scaling_by_a_power_of_two_changes_no_bit(ranks: RankPool) -> None:
    world_size = 2
    unscaled = ranks.run(train_unscaled, world_size)
    for streams in (False, True):
        for rank, (end, outcomes) in enumerate(ranks.run(scale_and_skip, world_size, streams)):
            assert end == unscaled[rank][0]
            assert outcomes[0].error == "RankDisagreementError"
            assert "grad_scale differs between ranks: [64.0, 128.0]" in outcomes[0].message
            assert outcomes[1].error == ("ValueError" if rank == 1 else "PeerError")

    model = Weights(SHAPES)
    steps = [
        mean_of([exact_gradients(model.all, 10 * s + r, world_size) for r in range(world_size)])
        for s in range(3)
    ]
    expected = adam_in_float64(model.all, steps, lr=1e-2, max_grad_norm=1.0)
    for weight, exact in zip(unscaled[0][1], expected, strict=True):
        # Three fp32 roundings of a weight below 4, and of updates of at most lr each.
        assert torch.allclose(weight.double(), exact, rtol=0.0, atol=1e-6)


def warnings_of_two_bad_steps(rank: int, world_size: int) -> list[str]:
    """Return what this rank logs about a step that is skipped and one without gradients."""
    collected = BufferingHandler(capacity=100)
    logger = logging.getLogger("offload_adam")
    logger.addHandler(collected)
    model = Weights(SHAPES)
    optimizer = make(model, streams=False)
    gradients = exact_gradients(model.all, rank, world_size)
    if rank == BAD_RANK:
        gradients[3][0] = math.nan
    model(gradients).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.close()
    logger.removeHandler(collected)
    warned = [record for record in collected.buffer if record.levelno >= logging.WARNING]
    return [record.getMessage().partition(" (")[0].partition(".")[0] for record in warned]


def test_what_happens_on_all_ranks_is_logged_on_rank_0_only(ranks: RankPool) -> None:
    logged = ranks.run(warnings_of_two_bad_steps, 3)
    assert logged == [["Skipped step", "step() found no gradient on any parameter"], [], []]


def test_of_many_skipped_steps_in_a_row_some_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = OffloadAdam([parameter])

    def step(gradient: float) -> None:
        parameter.grad = torch.full((3,), gradient)
        optimizer.step()

    for _ in range(40):
        step(math.inf)
    step(1.0)
    step(math.nan)
    optimizer.close()
    skips = [text for text in caplog.messages if text.startswith("Skipped step")]
    expected = [f"({n} so far, {n} in a row)" for n in (*range(1, 11), 16, 32)]
    expected.append("(41 so far, 1 in a row)")
    assert [text.partition("step ")[2].partition(":")[0] for text in skips] == expected
    assert optimizer.skipped_steps == 41
