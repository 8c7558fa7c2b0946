"""How fast this machine's memory is, by the number of threads that ask for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels.probe import STREAM_NBYTES, pass_over
from offload_adam.memory.arena import HostArena, padded_nbytes

NUM_STREAMS = 4
STREAM_NUMEL = 32_000_000
"""Four streams of 128 MB each: more than the caches that several cores share. Streams that lie a
power of two apart compete for the same lines of the caches, and take twice the time."""
NUM_PASSES = 7


def measure_bandwidth(
    thread_counts: Iterable[int], *, numel: int = STREAM_NUMEL, num_passes: int = NUM_PASSES
) -> dict[int, float]:
    """Return the bandwidth in 1e9 bytes a second by number of threads, medians over the passes.

    The streams lie in memory as the optimizer's own state does, and are read and written as an
    update does it. They are freed on return.

    Raises:
        HostMemoryError: 16 bytes for each of `numel` elements are not available.
    """
    arena = HostArena(NUM_STREAMS * padded_nbytes(numel, torch.float32))
    streams = [arena.take(numel, torch.float32).numpy() for _ in range(NUM_STREAMS)]
    return {
        count: STREAM_NBYTES * numel / _pass_s(streams, count, num_passes) / 1e9
        for count in thread_counts
    }


def _pass_s(streams: list[npt.NDArray[np.float32]], num_threads: int, num_passes: int) -> float:
    """Return the median seconds of a pass; the first, which may compile, is not counted."""
    gradient, first, second, third = streams
    seconds = []
    for _ in range(1 + num_passes):
        start_s = time.perf_counter()
        pass_over(gradient, first, second, third, num_threads)
        seconds.append(time.perf_counter() - start_s)
    return median(seconds[1:])


def counts_to_try(num_cores: int) -> list[int]:
    """Return the powers of two below `num_cores`, and `num_cores`."""
    powers = [1 << exponent for exponent in range(num_cores.bit_length())]
    return [*(power for power in powers if power < num_cores), num_cores]
