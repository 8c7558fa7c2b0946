"""Measure contenders against the machine's limit and each other, in one interleaved run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload_adam.bench.contender import Contender
from offload_adam.bench.interleave import Clock, Turn, interleave
from offload_adam.bench.limit import (
    Limit,
    LimitRefusedError,
    NumbaLimit,
    PlainCopy,
    TorchLimit,
    choose_limit,
)
from offload_adam.bench.planes import Planes
from offload_adam.bench.results import BASELINE, Result, median_ratio, pair_up, summarise
from offload_adam.kernels import threads

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 3


@dataclass(frozen=True)
class Comparison:
    """What one run found.

    limit_ratio: the limit's time over this package's, median over the pairs.
    """

    limit: Limit
    limit_ratio: float
    results: list[Result]


@dataclass(frozen=True)
class Yardsticks:
    """The passes that compete for the limit, and the copies that judge it."""

    passes: Sequence[Contender]
    copies: Sequence[Contender]


def yardsticks(every_planes: Sequence[Planes], num_threads: int) -> Yardsticks:
    """Return Numba's and torch's pass and a copy for each kind of memory."""
    passes: list[Contender] = []
    for planes in every_planes:
        passes += [NumbaLimit(planes, num_threads), TorchLimit(planes)]
    return Yardsticks(passes, [PlainCopy(planes) for planes in every_planes])


def use_threads(num_threads: int) -> None:
    """Give torch and Numba that many threads."""
    torch.set_num_threads(num_threads)
    threads.plan_threads(num_threads)


def compare(
    contenders: Sequence[Contender],
    measures: Yardsticks,
    numel: int,
    num_pairs: int,
    *,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Time everything in turns; where the limit is refused, all of it once more.

    Raises:
        LimitRefusedError: it was refused every time.
    """
    everything = [*measures.passes, *measures.copies, *contenders]
    turns = [Turn(contender.name, contender.run) for contender in everything]
    for attempt in range(1, NUM_ATTEMPTS + 1):
        timings = interleave(turns, num_pairs, clock=clock)
        try:
            limit = choose_limit(timings, measures.passes, measures.copies, numel)
        except LimitRefusedError as refusal:
            logger.warning("attempt %d of %d: %s", attempt, NUM_ATTEMPTS, refusal)
            if attempt == NUM_ATTEMPTS:
                raise
            continue
        ratio = median_ratio(pair_up(timings[BASELINE], limit.pairs_ms))
        return Comparison(limit, ratio, summarise(timings, contenders, numel))
    raise AssertionError("the last attempt returns or raises")
