"""A memory bandwidth probe: a read-modify-write pass over as many arrays as an update has."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels import threads
from offload_adam.kernels.compilation import jit

STREAM_NBYTES = 28
"""Bytes that a pass moves per element: it reads four float32 arrays and writes three."""


def _read_modify_write(
    gradient: Any, first: Any, second: Any, third: Any, factor: Any, addend: Any, num_pieces: Any
) -> None:
    total = gradient.size
    for piece in numba.prange(num_pieces):
        low = total * piece // num_pieces
        high = total * (piece + 1) // num_pieces
        # Numba vectorises loops over slices, but not loops over a part of a shared array.
        g, a, b, c = gradient[low:high], first[low:high], second[low:high], third[low:high]
        for i in range(g.size):
            a[i] = a[i] * factor
            b[i] = b[i] * factor
            c[i] = c[i] + g[i] * addend


_kernel = jit(_read_modify_write, parallel=True)


def pass_over(
    gradient: npt.NDArray[np.float32],
    first: npt.NDArray[np.float32],
    second: npt.NDArray[np.float32],
    third: npt.NDArray[np.float32],
    num_threads: int,
) -> None:
    """Read four float32 arrays of shape (n,) and write the last three, with unchanged values.

    The pass multiplies by 1 and adds 0.

    Cost: 28 bytes per element.
    Threads: `num_threads`, each over one contiguous piece.
    """
    threads.use_threads(num_threads)
    # 1 and 0 are arguments, so that LLVM cannot omit the arithmetic.
    _kernel(gradient, first, second, third, np.float32(1.0), np.float32(0.0), num_threads)
