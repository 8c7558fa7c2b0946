"""The pool of ranks itself: what it returns, and that no rank makes it wait for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankDied, RankError, RankPool, RanksFailedError

pytestmark = pytest.mark.distributed

HANG_S = 60.0
"""More than this nothing takes that goes on at all, however busy the machine is."""


@pytest.fixture(scope="module")
def own_ranks() -> Iterator[RankPool]:
    """Return a pool for the tests that kill its processes, so that the others keep theirs."""
    with RankPool() as pool:
        yield pool


def sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, int, float]:
    value = torch.tensor(float(rank + offset))
    dist.all_reduce(value)
    return rank, dist.get_world_size(), value.item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_in_rank_order(ranks: RankPool, world_size: int) -> None:
    total = float(sum(range(world_size)) + 10 * world_size)
    expected = [(rank, world_size, total) for rank in range(world_size)]
    assert ranks.run(sum_of_ranks, world_size, 10) == expected


def leave_objects_behind(rank: int, world_size: int) -> int:
    group = dist.new_group(list(range(world_size)))
    holder: list[object] = [group]
    holder.append(holder)  # a cycle, which only the garbage collector ends
    dist.barrier(group)
    return os.getpid()


def test_a_call_is_quick_and_keeps_the_processes(ranks: RankPool) -> None:
    pids = ranks.run(leave_objects_behind, 2)
    start_s = time.monotonic()
    for _ in range(5):
        assert ranks.run(leave_objects_behind, 2) == pids
    assert time.monotonic() - start_s < HANG_S


def double(rank: int, world_size: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def test_tensors_go_both_ways(ranks: RankPool) -> None:
    tensor = torch.arange(5, dtype=torch.bfloat16)
    for result in ranks.run(double, 2, tensor):
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, tensor * 2)


def read_environment(rank: int, world_size: int) -> tuple[str | None, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "EXTRA")
    values = tuple(os.environ.get(name) for name in names)
    os.environ["EXTRA"] = "left behind"
    return values


def test_the_environment_is_each_calls_own(ranks: RankPool) -> None:
    plain = [(str(rank), str(rank), "2", "2", None) for rank in range(2)]
    assert ranks.run(read_environment, 2) == plain
    given = ranks.run(read_environment, 2, env={"EXTRA": "here", "LOCAL_RANK": None})
    assert given == [(str(rank), None, "2", "2", "here") for rank in range(2)]
    assert ranks.run(read_environment, 2) == plain


class LocalError(ValueError):
    pass


def raise_on(rank: int, world_size: int, raising: tuple[int, ...]) -> str:
    if rank in raising:
        raise LocalError(f"no luck on {rank}")
    return "fine"


def test_a_raise_names_the_rank_and_shows_its_traceback(ranks: RankPool) -> None:
    with pytest.raises(RanksFailedError, match=r"rank 1: LocalError: no luck on 1") as caught:
        ranks.run(raise_on, 3, (1,))
    assert 'raise LocalError(f"no luck on {rank}")' in str(caught.value)
    assert [error.rank for error in caught.value.errors] == [1]


def test_expected_errors_are_returned_by_rank(ranks: RankPool) -> None:
    first, second, third = ranks.run(raise_on, 3, (0, 2), expect_errors=True)
    assert isinstance(first, RankError)
    assert isinstance(third, RankError)
    assert second == "fine"
    assert [first[:3], third[:3]] == [
        (LocalError, "no luck on 0", 0),
        (LocalError, "no luck on 2", 2),
    ]


def raise_beside_a_collective(rank: int, world_size: int) -> None:
    if rank == 1:
        raise LocalError("one rank only")
    dist.barrier()


def test_a_raise_on_one_rank_ends_the_collective_of_the_others(ranks: RankPool) -> None:
    with pytest.raises(RanksFailedError) as caught:
        ranks.run(raise_beside_a_collective, 2)
    first, second = caught.value.errors
    assert (first.rank, second.rank) == (1, 0)
    assert second.type is not TimeoutError  # its collective broke, nobody had to end it
    assert ranks.run(raise_on, 2, ()) == ["fine", "fine"]


def return_a_function(rank: int, world_size: int) -> object:
    return lambda: rank


def test_a_result_that_cannot_be_pickled_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RanksFailedError, match="pickle"):
        ranks.run(return_a_function, 1)


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600.0)


def test_a_hang_on_one_rank_is_ended_and_located(own_ranks: RankPool) -> None:
    own_ranks.run(raise_on, 2, ())  # so that the time of starting processes does not count
    start_s = time.monotonic()
    with pytest.raises(RanksFailedError, match="rank 1: TimeoutError") as caught:
        own_ranks.run(hang_on_one, 2, timeout=3.0)
    assert time.monotonic() - start_s < HANG_S
    assert "hang_on_one" in caught.value.errors[0].traceback
    assert own_ranks.run(raise_on, 2, ()) == ["fine", "fine"]


def kill_on_one(rank: int, world_size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_process_is_reported_and_replaced(own_ranks: RankPool) -> None:
    first, second = own_ranks.run(kill_on_one, 2, expect_errors=True)
    assert isinstance(first, RankError)
    assert first.type is RankDied
    assert "SIGKILL" in first.message
    assert isinstance(second, RankError)  # its collective lost the peer
    assert second.type is not TimeoutError
    assert own_ranks.run(raise_on, 2, ()) == ["fine", "fine"]


def test_close_ends_the_processes() -> None:
    pool = RankPool()
    (pid,) = pool.run(leave_objects_behind, 1)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
