"""Kernels release the interpreter lock: another thread of this process runs on beside them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from offload_adam.kernels import adam, norm, probe, scalars, sparse, threads
from offload_adam.kernels.formats import FloatFormat

# One stretch of memory over and over: a long launch needs no large arrays.
NUMEL, REPEATS = 1 << 14, 400
MASTER, EXP_AVG, EXP_AVG_SQ = (np.zeros(NUMEL, dtype=np.float32) for _ in range(3))
GRADIENT = np.zeros(NUMEL, dtype=np.float32)
ADDRESSES = np.full(REPEATS, GRADIENT.ctypes.data, dtype=np.int64)
ZEROS = np.zeros(REPEATS, dtype=np.int64)
SCALARS = np.zeros((1, scalars.NUM_SCALARS), dtype=np.float32)
LONG = [np.ones(1 << 22, dtype=np.float32) for _ in range(4)]


def sum_blocks() -> None:
    """Launch the norm."""
    sums, numels = np.zeros(NUMEL // 128), np.full(REPEATS, NUMEL, dtype=np.int64)
    norm.block_sums(FloatFormat.FLOAT32, ADDRESSES, ZEROS, numels, sums, 1)


def update_segments() -> None:
    """Launch the dense update."""
    work_starts = np.arange(REPEATS + 1, dtype=np.int64) * NUMEL
    adam.update(
        FloatFormat.FLOAT32,
        ADDRESSES,
        ZEROS,
        work_starts,
        ZEROS,
        SCALARS,
        MASTER,
        None,
        EXP_AVG,
        EXP_AVG_SQ,
        None,
        None,
        None,
        None,
        1,
    )


def update_rows() -> None:
    """Launch the lazy update."""
    values = np.zeros((REPEATS, NUMEL // 2), dtype=np.float32)
    sparse.update_rows(
        FloatFormat.FLOAT32,
        ZEROS,
        values,
        NUMEL // 2,
        SCALARS[0],
        MASTER,
        None,
        EXP_AVG,
        EXP_AVG_SQ,
        None,
        None,
        1,
    )


def pass_over() -> None:
    """Launch the benchmark's limit."""
    probe.pass_over(LONG[0], LONG[1], LONG[2], LONG[3], 1)


@pytest.fixture
def ticks() -> Iterator[list[float]]:
    """Yield a list that grows while another thread gets the lock, which nobody is made to give.

    With so long a switch interval a thread keeps the lock until it lets go of it by itself.
    """
    seen: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(1e-4):
            seen.append(time.monotonic())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    thread = threading.Thread(target=tick)
    try:
        thread.start()
        yield seen
    finally:
        stop.set()
        thread.join(timeout=60.0)
        sys.setswitchinterval(before)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("module", "dispatcher", "launch"),
    [
        (norm, "_sum_segments", sum_blocks),
        (adam, "_update_segments", update_segments),
        (sparse, "_update_touched", update_rows),
        (probe, "_kernel", pass_over),
    ],
    ids=["norm", "update", "rows", "streams"],
)
def test_another_thread_runs_while_a_kernel_does(
    module: ModuleType,
    dispatcher: str,
    launch: Callable[[], None],
    ticks: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads.use_threads(1)
    launch()  # which compiles
    kernel = getattr(module, dispatcher)
    during: list[int] = []

    def counted(*arguments: Any) -> None:
        # The kernel alone: NumPy and ctypes let go of the lock as well.
        before = len(ticks)
        kernel(*arguments)
        during.append(len(ticks) - before)

    monkeypatch.setattr(module, dispatcher, counted)
    deadline = time.monotonic() + 60.0
    while not any(during) and time.monotonic() < deadline:
        launch()
    assert any(during)
