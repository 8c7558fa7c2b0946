"""The first write to fresh memory, which decides the NUMA node of each page."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels import threads
from offload_adam.kernels.compilation import jit

# The smallest page of Linux. A huge page is then written more often than needed, which is harmless.
PAGE_NBYTES = 4096


def _write_pages(memory: Any, num_pieces: Any) -> None:
    total = memory.size
    for piece in numba.prange(num_pieces):
        # One piece per thread, in the order of the update's pieces: Linux places a page on the NUMA
        # node of the thread that writes it first.
        part = memory[total * piece // num_pieces : total * (piece + 1) // num_pieces]
        for at in range(0, part.size, PAGE_NBYTES):
            part[at] = 0
        if part.size > 0:  # the last page, if the piece does not start at a page
            part[part.size - 1] = 0


_kernel = jit(_write_pages, parallel=True)


def touch(memory: npt.NDArray[np.uint8], num_threads: int) -> None:
    """Write a zero to every page of fresh memory, each from the thread that will update it.

    Memory is divided between threads as `kernels.adam` divides a shard. The cuts may differ by a
    block of 128 elements and by the padding between parameters.

    Cost: one write per page of 4 KiB.
    Threads: `num_threads`, each over one contiguous piece.
    """
    threads.use_threads(num_threads)
    _kernel(memory, num_threads)
