"""`python -m tests.bench.rows`: the lazy update of a few rows against the dense update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_adam.bench.harness import (
    OURS,
    Contender,
    interleave,
    median_ratio,
    pair_up,
    prepare_machine,
)
from offload_adam.bench.kernel import offload_update
from offload_adam.bench.peers import ADAMW
from offload_adam.bench.planes import Planes, make_planes
from offload_adam.bench.report import heading, table
from offload_adam.kernels import sparse, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row
from tests.bench.command import run

LAZY = "lazy"
NUM_UPDATES = 10
"""Lazy updates in one turn: a single one is shorter than it takes to wake the threads."""


def lazy_updates(planes: Planes, width: int, num_touched: int, num_threads: int) -> Contender:
    """Return `NUM_UPDATES` launches of the row kernel, each on other random rows."""
    sparse.compile_kernel(FloatFormat.FLOAT32, None)
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.01, (num_touched, width)).astype(np.float32)
    draws: list[npt.NDArray[np.int64]] = []
    num_steps = 0

    def draw() -> None:
        num_rows = planes.numel // width
        draws[:] = [rng.choice(num_rows, num_touched, replace=False) for _ in range(NUM_UPDATES)]

    def update() -> None:
        nonlocal num_steps
        for rows in draws:
            num_steps += 1
            threads.use_threads(num_threads)
            sparse.update_rows(
                FloatFormat.FLOAT32,
                rows,
                values,
                width,
                scalar_row(ADAMW, num_steps, 1.0),
                master=planes.master_weight.numpy(),
                remainder=None,
                exp_avg=planes.exp_avg.numpy(),
                exp_avg_sq=planes.exp_avg_sq.numpy(),
                param_out=None,
                place=None,
                num_pieces=num_threads,
            )

    return Contender(LAZY, update, prepare=draw)


def measure_rows(
    num_rows: int = 1_000_000,
    width: int = 64,
    touched: int = 1_000,
    num_threads: int = 1,
    num_pairs: int = 7,
) -> dict[str, Any]:
    """Measure the update of `touched` random rows of a table, and of all its rows.

    Raises:
        ValueError: the table has fewer rows than `touched`.
        HostMemoryError: the node does not have enough memory available.
    """
    if touched > num_rows:
        raise ValueError(f"touched ({touched}) is more than the {num_rows} rows of the table")
    machine = prepare_machine(num_rows * width * 16, num_threads)
    planes = make_planes(num_rows * width, huge_pages=True)
    planes.gradient[touched * width :] = 0.0
    # Both work on one table, so that the dense update evicts the rows from the caches.
    lazy = lazy_updates(planes, width, touched, num_threads)
    timings = interleave([lazy, offload_update(planes, num_threads)], num_pairs)
    return {
        "benchmark": "rows",
        "num_pairs": num_pairs,
        "num_rows": num_rows,
        "width": width,
        "touched": touched,
        "machine": machine,
        **compare_rows(timings),
    }


def compare_rows(timings: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return medians and pairs; a lazy update is a part of its turn."""
    lazy_ms = [turn_ms / NUM_UPDATES for turn_ms in timings[LAZY]]
    pairs = pair_up(timings[OURS], lazy_ms)
    return {
        "lazy_ms": median(lazy_ms),
        "dense_ms": median(timings[OURS]),
        "ratio": median_ratio(pairs),
        "pairs": pairs,
    }


def show(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as lines of text."""
    size = f"{report['touched']:,} rows of {report['num_rows']:,} x {report['width']:,}"
    yield from heading(report, size)
    row = (f"{report['lazy_ms']:.3f}", f"{report['dense_ms']:.1f}", f"{report['ratio']:.5f}")
    yield from table(("lazy, ms", "dense, ms", "lazy / dense"), [row])
    yield ""


if __name__ == "__main__":
    run(measure_rows, show)
