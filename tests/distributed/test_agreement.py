"""Values that the all-reduce of a step carries besides the norm."""

from __future__ import annotations

import pytest

from offload_adam import OffloadAdam
from offload_adam.coordinator.agreement import Notice
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, Weights, exact_gradients, outcome_of

pytestmark = pytest.mark.distributed


def notify(rank: int, world_size: int) -> list[Notice]:
    """Return the steps' agreements; only rank 1 asks to stop, and it is the slowest to write."""
    model = Weights([(300,)])
    optimizer = OffloadAdam(model.parameters(), gradient_reduction="optimizer", num_threads=1)
    agreed = []
    lock = optimizer._alive().snapshot_lock
    for stop, num_saved in ((False, 0), (rank == 1, 7 - rank), (False, 7)):
        optimizer.notice = Notice(stop)
        while lock.num_finished < num_saved:
            lock.acquire_buckets([])
            lock.finish_reading()
            lock.close_snapshot()
        model(exact_gradients(model.all, rank, world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        agreed.append(optimizer.last_step.notice)
    assert optimizer.num_steps == 3
    optimizer.close()
    return agreed


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_rank_stops_all_and_the_slowest_rank_decides_what_is_saved(
    ranks: RankPool, world_size: int
) -> None:
    slowest = 7 if world_size == 1 else 5
    expected = [Notice(), Notice(world_size > 1, slowest), Notice(saved=7)]
    for agreed in ranks.run(notify, world_size):
        assert agreed == expected


def part(rank: int, world_size: int) -> Outcome:
    model = Weights([(300,)])
    optimizer = OffloadAdam(model.parameters(), gradient_reduction="optimizer", num_threads=1)
    before = model.w0.detach().clone()
    model(exact_gradients(model.all, rank, world_size)).backward()
    optimizer.num_steps = 40 if rank == 1 else 50
    outcome = outcome_of(optimizer.step)
    assert bool((model.w0 == before).all())
    assert optimizer.num_steps == (40 if rank == 1 else 50)
    optimizer.close()
    return outcome


def test_ranks_at_different_steps_are_rejected(ranks: RankPool) -> None:
    first, second, third = ranks.run(part, 3)
    assert first == second == third
    assert first.error == "RankDisagreementError"
    assert "Ranks are at different steps: [51, 41, 51]" in first.message
