"""Ranks that stop, hang, exit or never start: errors name the rank, its phase and a remedy."""

from __future__ import annotations

import os
import signal
import time

import pytest

from offload_adam import FailurePolicy, OffloadAdam, OffloadPolicy, PeerFailedError
from offload_adam.coordinator.progress import PROGRESS
from tests.support.ranks import RankError, RankPool
from tests.support.reference import Weights, exact_gradients

pytestmark = [pytest.mark.distributed, pytest.mark.fault]

PATIENCE_S = 3.0
BOUND_S = 30.0


def stumble(rank: int, world_size: int, how: str) -> float:
    """Take steps until rank 1 fails; return the seconds that the failing step took elsewhere."""
    model = Weights([(300,), (2000,)])
    optimizer = OffloadAdam(
        model.parameters(),
        module=model,
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
        # On a busy machine a heartbeat may be late: only where one is to be missed is it short.
        failures=FailurePolicy(
            dead_after=PATIENCE_S if how == "stop" else 20.0, stuck_after=PATIENCE_S
        ),
    )
    for step in range(3):
        model(exact_gradients(model.all, 10 * step + rank, world_size)).backward()
        if step == 2 and rank == 1:
            if how == "busy":
                with optimizer.long_running("evaluation"):
                    time.sleep(2 * PATIENCE_S)
            _stumble(how)
            if how == "leave":
                optimizer.close()
                return 0.0
        start_s = time.monotonic()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return time.monotonic() - start_s


def _stumble(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "hang":
        time.sleep(15)
    elif how == "evaluate":
        for _ in range(16):
            time.sleep(PATIENCE_S / 8)
            PROGRESS.move()
    elif how == "compile":
        with PROGRESS.at("compilation", long_running=True):
            time.sleep(2 * PATIENCE_S)


def start(rank: int, world_size: int) -> None:
    """Start the processes, so that the time limit does not include their start."""


def failures(pool: RankPool, how: str) -> list[RankError]:
    """Return how ranks 0 and 2 failed, within the bound."""
    pool.run(start, 3)
    outcomes = pool.run(stumble, 3, how, timeout=BOUND_S, expect_errors=True)
    others = [outcomes[0], outcomes[2]]
    for other in others:
        assert isinstance(other, RankError)
        assert other.type is PeerFailedError, other.traceback
    return [other for other in others if isinstance(other, RankError)]


def test_a_stopped_rank_is_dead(own_ranks: RankPool) -> None:
    for error in failures(own_ranks, "stop"):
        assert "Rank 1 is dead: process " in error.message
        assert "has sent no heartbeat for " in error.message
        assert "last seen in " in error.message


def test_a_rank_that_hangs_is_named_although_it_sends_heartbeats(own_ranks: RankPool) -> None:
    for error in failures(own_ranks, "hang"):
        assert "Hung while other ranks waited for more than 3 s: rank 1 (process " in error.message
        assert "step 3" in error.message


def test_a_rank_that_exits_is_named(own_ranks: RankPool) -> None:
    for error in failures(own_ranks, "leave"):
        assert "Rank 1 exited: process " in error.message
        assert "All ranks must take the same steps" in error.message


@pytest.mark.parametrize("how", ["evaluate", "compile", "busy"])
def test_long_running_work_is_no_failure(own_ranks: RankPool, how: str) -> None:
    waited_s = own_ranks.run(stumble, 3, how)
    assert waited_s[0] > 1.5 * PATIENCE_S


def never_come(rank: int, world_size: int) -> str:
    model = Weights([(3,)])
    if rank == 1:
        time.sleep(6)
        return ""
    with pytest.raises(PeerFailedError) as caught:
        OffloadAdam(
            model.parameters(),
            gradient_reduction="optimizer",
            failures=FailurePolicy(stuck_after=1.0),
            num_threads=1,
        )
    assert caught.value.ranks == (1,)
    return str(caught.value)


def test_a_rank_that_never_starts_is_named(own_ranks: RankPool) -> None:
    messages = own_ranks.run(never_come, 3)
    for message in (messages[0], messages[2]):
        assert message.startswith(
            "Timed out after 1 s waiting for rank(s) [1] to construct the optimizer."
        )


def differ(rank: int, world_size: int, name: str, value: object) -> str:
    model = Weights([(3,)])
    failures = FailurePolicy(**{name: value if rank == 1 else 5.0})  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError)) as caught:
        OffloadAdam(model.parameters(), gradient_reduction="optimizer", failures=failures)
    return str(caught.value)


@pytest.mark.parametrize("name", ["dead_after", "stuck_after"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "long", True])
def test_the_failure_policy_is_checked_on_every_rank(
    ranks: RankPool, name: str, value: object
) -> None:
    for message in ranks.run(differ, 2, name, value):
        assert f"{name} must be a" in message
        assert repr(value) in message
