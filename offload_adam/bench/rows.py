"""`bench rows`: the lazy update of a table's touched rows against the dense update of all of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_adam.bench.comparison import use_threads
from offload_adam.bench.contender import ADAMW
from offload_adam.bench.interleave import Clock, Turn, interleave
from offload_adam.bench.machine import describe_machine
from offload_adam.bench.planes import HUGE_PAGES, Planes, make_planes, require_memory
from offload_adam.bench.results import median_ratio, pair_up
from offload_adam.bench.update_contenders import OffloadUpdate
from offload_adam.kernels import sparse, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row

LAZY, DENSE = "lazy", "dense"
DEFINITIONS = {
    "lazy_ms": "one update of touched rows alone: a tenth of ten in a row, each of other random "
    "rows; median",
    "dense_ms": "the update of every row, whose gradient is 0 where none is touched; median",
    "ratio": "the lazy update's time / the dense one's, median over the pairs",
    "pairs": "one for each round, in milliseconds",
}

NUM_UPDATES = 10
"""Lazy updates in one turn: a single one is shorter than it takes to wake the threads."""


@dataclass(frozen=True)
class RowPair:
    """One round, in milliseconds; `ratio` is lazy_ms / dense_ms."""

    lazy_ms: float
    dense_ms: float
    ratio: float


class LazyUpdate:
    """Launches the row kernel on rows that are drawn anew before each run."""

    def __init__(self, planes: Planes, width: int, num_touched: int, num_threads: int) -> None:
        sparse.compile_kernel(FloatFormat.FLOAT32, None)
        self._planes = planes
        self._width = width
        self._num_threads = num_threads
        self._num_steps = 0
        self._rng = np.random.default_rng(0)
        self._values = self._rng.normal(0, 0.01, (num_touched, width)).astype(np.float32)
        self._draws: list[npt.NDArray[np.int64]] = []

    def prepare(self) -> None:
        """Draw distinct rows for each update, which is not timed."""
        num_rows, num_touched = self._planes.numel // self._width, len(self._values)
        self._draws = [
            self._rng.choice(num_rows, num_touched, replace=False) for _ in range(NUM_UPDATES)
        ]

    def run(self) -> None:
        """Apply `NUM_UPDATES` updates."""
        for draw in self._draws:
            self._update(draw)

    def _update(self, touched: npt.NDArray[np.int64]) -> None:
        self._num_steps += 1
        threads.use_threads(self._num_threads)
        sparse.update_rows(
            FloatFormat.FLOAT32,
            touched,
            self._values,
            self._width,
            scalar_row(ADAMW, self._num_steps, 1.0),
            self._planes.master_weight.numpy(),
            self._planes.exp_avg.numpy(),
            self._planes.exp_avg_sq.numpy(),
            None,
            self._num_threads,
        )


def measure_rows(
    num_rows: int,
    width: int,
    num_touched: int,
    num_threads: int,
    num_pairs: int,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Return the report of `bench rows`, a JSON object.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    require_memory(num_rows * width * 16)
    use_threads(num_threads)
    machine = describe_machine(num_threads)
    planes = make_planes(num_rows * width, HUGE_PAGES)
    # Both work on one table, so that the dense update leaves none of the rows in a cache.
    planes.gradient[num_touched * width :] = 0.0
    lazy = LazyUpdate(planes, width, num_touched, num_threads)
    dense = OffloadUpdate(planes, num_threads)
    turns = [Turn(LAZY, lazy.run, lazy.prepare), Turn(DENSE, dense.run)]
    return {
        "benchmark": "rows",
        "num_pairs": num_pairs,
        "num_rows": num_rows,
        "width": width,
        "touched": num_touched,
        "machine": machine,
        **compare_rows(interleave(turns, num_pairs, clock=clock)),
        "definitions": DEFINITIONS,
    }


def compare_rows(timings: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return medians and pairs of one update's milliseconds, from those of the turns."""
    lazy_ms = [turn_ms / NUM_UPDATES for turn_ms in timings[LAZY]]
    pairs = pair_up(timings[DENSE], lazy_ms)
    return {
        "lazy_ms": median(lazy_ms),
        "dense_ms": median(timings[DENSE]),
        "ratio": median_ratio(pairs),
        "pairs": [asdict(RowPair(pair.ms, pair.this_ms, pair.ratio)) for pair in pairs],
    }
