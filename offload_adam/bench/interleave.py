"""Time several pieces of work in turns, so that what drifts on the machine reaches all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

Clock = Callable[[], float]

WARMUP_ROUNDS = 2
REST_S = 0.01
"""Between two turns: the threads of torch's and Numba's pools spin for a while after their work,
and would take the next one's cores."""


class Turn(NamedTuple):
    """One piece of work in every round.

    prepare: called before each turn, outside the timing.
    """

    name: str
    run: Callable[[], None]
    prepare: Callable[[], None] | None = None


def interleave(
    turns: Sequence[Turn], num_rounds: int, *, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Return the milliseconds of every turn, one for each round; warmup rounds are left out.

    Every second round goes backwards, so that no turn always follows the same other one.
    """
    timings: dict[str, list[float]] = {turn.name: [] for turn in turns}
    if len(timings) != len(turns):
        raise AssertionError("two turns have the same name")
    for number in range(WARMUP_ROUNDS + num_rounds):
        for turn in turns if number % 2 == 0 else reversed(turns):
            elapsed_s = _timed(turn, clock)
            if number >= WARMUP_ROUNDS:
                timings[turn.name].append(elapsed_s * 1e3)
    return timings


def _timed(turn: Turn, clock: Clock) -> float:
    if turn.prepare is not None:
        turn.prepare()
    time.sleep(REST_S)
    start_s = clock()
    turn.run()
    return clock() - start_s
