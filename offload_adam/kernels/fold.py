"""Copy or add gradients to an array, cast to the format of this array."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels.compilation import compile_now, jit, jit_inlined, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import cast_for, round_for, widen


def _copy_range(target: Any, source: Any) -> None:
    for i in range(target.size):
        target[i] = cast_for(target, source[i])


def _add_range(target: Any, source: Any) -> None:
    for i in range(target.size):
        target[i] = round_for(target, widen(target[i]) + widen(source[i]))


copy_range = jit_inlined(_copy_range)
add_range = jit_inlined(_add_range)


def _build() -> Any:
    fingerprint = source_fingerprint()

    def fold_pieces(target: Any, source: Any, adds: Any, num_pieces: Any) -> int:
        for piece in numba.prange(num_pieces):
            low = target.size * piece // num_pieces
            high = target.size * (piece + 1) // num_pieces
            if adds:
                add_range(target[low:high], source[low:high])
            else:
                copy_range(target[low:high], source[low:high])
        return fingerprint

    return jit(fold_pieces, parallel=True)


_fold_pieces = _build()


def fold(
    target: npt.NDArray[np.generic],
    source: npt.NDArray[np.generic],
    num_pieces: int,
    *,
    adds: bool,
) -> None:
    """Copy `source` to `target`, or add it, with one rounding to the format of `target`.

    Bit-identical to torch, for any `num_pieces`. Only the bits of a NaN that is cast or added may
    differ.

    Args:
        target: (n,) contiguous, written in place; its NumPy dtype is a `FloatFormat.bits_dtype`.
        source: (n,) contiguous, in any of the formats; must not overlap `target`.
        num_pieces: number of threads that share the work.
        adds: add to `target` instead of writing over it.

    Cost: reads `source`, writes `target`, and reads `target` if it adds.
    Threads: `num_pieces` pieces under the thread mask of the calling thread.
    """
    _fold_pieces(target, source, adds, num_pieces)


def compile_kernel(target_format: FloatFormat, source_format: FloatFormat) -> None:
    """Compile, or load from the disk cache, the specialisation for these two formats."""
    arguments = (target_format.dtype_tag(), source_format.dtype_tag(), False, 1)
    compile_now(
        _fold_pieces, arguments, f"gradient fold ({source_format.value} -> {target_format.value})"
    )
