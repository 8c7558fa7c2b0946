"""Ranks construct an optimizer of the same parameters again, wherever each left the older one."""

from __future__ import annotations

import gc
import time
import warnings
from typing import Any, NamedTuple

import pytest
import torch

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, Weights, bits, exact_gradients, outcome_of

SHAPES: list[tuple[int, ...]] = [(200,), (3, 50), (90,), (700,)]
HALF_UPDATED = "Its last step did not finish: some weights are updated and others are not."


def make(model: Weights, *, overlap: bool = True, **options: Any) -> OffloadAdam:
    return OffloadAdam(
        model.named_parameters(),
        lr=1e-2,
        module=model,
        overlap=overlap,
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
        **options,
    )


def train(model: Weights, optimizer: OffloadAdam, rank: int, world_size: int, seed: int) -> None:
    optimizer.zero_grad()
    model(exact_gradients(model.all, 10 * seed + rank, world_size)).backward()
    optimizer.step()


class Result(NamedTuple):
    """What one rank saw.

    warnings: of the construction of the newer optimizer.
    start, end: the weights after the construction, and after two more steps.
    seconds: that the construction took.
    """

    warnings: list[str]
    start: list[bytes]
    end: list[bytes]
    seconds: float


def again(model: Weights, rank: int, world_size: int, *, overlap: bool) -> Result:
    """Construct another optimizer of the model, and take two steps with it."""
    began_s = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        newer = make(model, overlap=overlap)
    took_s = time.monotonic() - began_s
    start = bits(model.all)
    for seed in (7, 8):
        train(model, newer, rank, world_size, seed)
    newer.close()
    return Result([str(w.message) for w in caught], start, bits(model.all), took_s)


def leave_pending(rank: int, world_size: int, how: str) -> Result:
    """Leave an optimizer whose last updates are not gathered yet.

    how: "closed" on all ranks, "open" on all ranks, or "dropped" on rank 1 alone.
    """
    model = Weights(SHAPES)
    older: Any = make(model)
    for seed in range(2):
        train(model, older, rank, world_size, seed)
    assert older._core.executor.to_gather
    if how == "closed":
        older.close()
    if how == "dropped" and rank == 1:
        del older
        gc.collect()
    return again(model, rank, world_size, overlap=True)


def test_all_ranks_finish_the_older_step(ranks: RankPool) -> None:
    expected = ranks.run(leave_pending, 2, "closed")
    found = ranks.run(leave_pending, 2, "open")
    for before, after in zip(expected, found, strict=True):
        assert before.warnings == []
        (warning,) = after.warnings
        assert "an older OffloadAdam, which is closed. Call close()" in warning
        assert (after.start, after.end) == (before.start, before.end)


def test_an_optimizer_that_one_rank_has_dropped_is_not_waited_for(ranks: RankPool) -> None:
    first, second = ranks.run(leave_pending, 2, "dropped")
    (warning,) = first.warnings
    assert HALF_UPDATED in warning
    assert second.warnings == []
    assert max(first.seconds, second.seconds) < 20.0
    # Construction gives all ranks the weights of rank 0.
    assert (first.start, first.end) == (second.start, second.end)


def leave_finished(rank: int, world_size: int) -> Result:
    """Leave an optimizer whose updates are complete; rank 1 has dropped it."""
    model = Weights(SHAPES)
    older: Any = make(model, overlap=False)
    for seed in range(2):
        train(model, older, rank, world_size, seed)
    if rank == 1:
        older.close()
    return again(model, rank, world_size, overlap=False)


def test_a_finished_optimizer_may_be_open_on_one_rank(ranks: RankPool) -> None:
    first, second = ranks.run(leave_finished, 2)
    expected = ranks.run(leave_pending, 2, "closed")[0]
    assert [len(first.warnings), len(second.warnings)] == [1, 0]
    assert HALF_UPDATED not in first.warnings[0]
    for found in (first, second):
        assert (found.start, found.end) == (expected.start, expected.end)


def interrupt(rank: int, world_size: int, where: str, overlap: bool) -> Result:
    """Interrupt rank 1 in its second backward or step, while rank 0 goes on."""
    model = Weights(SHAPES)
    older = make(model, overlap=overlap)
    train(model, older, rank, world_size, 0)
    older.synchronize()
    if where == "backward":

        def stop(gradient: torch.Tensor) -> None:
            raise KeyboardInterrupt

        handle = model.w2.register_hook(stop) if rank == 1 else None
        try:
            model(exact_gradients(model.all, 10 + rank, world_size)).backward()
        except KeyboardInterrupt:
            assert rank == 1
        if handle is not None:
            handle.remove()
    else:
        train(model, older, rank, world_size, 1)
        older.synchronize()
        core = older._core
        assert core is not None
        core.is_half_applied = rank == 1
    return again(model, rank, world_size, overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_that_stopped_apart_in_a_backward_go_on(ranks: RankPool, overlap: bool) -> None:
    first, second = ranks.run(interrupt, 2, "backward", overlap)
    for found in (first, second):
        (warning,) = found.warnings
        assert "The gradients of its last backward are dropped." in warning
        assert HALF_UPDATED not in warning
        assert found.seconds < 20.0
    assert (first.start, first.end) == (second.start, second.end)


def test_all_ranks_hear_of_a_step_that_one_did_not_finish(ranks: RankPool) -> None:
    first, second = ranks.run(interrupt, 2, "step", False)
    for found in (first, second):
        assert HALF_UPDATED in found.warnings[0]
    assert (first.start, first.end) == (second.start, second.end)


def reject_on_one_rank(rank: int, world_size: int) -> tuple[Outcome, Outcome, list[bytes]]:
    """Construct an optimizer that rank 1 alone cannot construct; then train the older one."""
    model = Weights(SHAPES)
    older = make(model)
    wrong = outcome_of(lambda: make(model, max_grad_norm=-1.0 if rank == 1 else 1.0))
    different = outcome_of(lambda: make(model, max_grad_norm=float(rank + 1)))
    for seed in range(2):
        train(model, older, rank, world_size, seed)
    older.close()
    return wrong, different, bits(model.all)


def test_an_optimizer_that_one_rank_rejects_takes_nothing_over(ranks: RankPool) -> None:
    expected = ranks.run(leave_pending, 2, "closed")[0].start
    for wrong, different, end in ranks.run(reject_on_one_rank, 2):
        assert wrong.error == "ValueError"
        assert "max_grad_norm must be above 0" in wrong.message
        assert different.error == "RankDisagreementError"
        assert end == expected
