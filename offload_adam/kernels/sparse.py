"""The lazy update of a table: only rows that have a gradient change, and no other one is read.

This is what an embedding's sparse gradient asks for. The arithmetic is the dense kernel's own, so a
touched row gets the bits that the dense update would have given it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from offload_adam.kernels import scalars as at
from offload_adam.kernels.adam import ElementArray, Float32Array, Int64Array, update_range
from offload_adam.kernels.adam_ir import finish_stores
from offload_adam.kernels.compilation import compile_now, jit, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import prefetch, window

_ROWS_AHEAD = 4
"""Rows lie anywhere in the table, where no processor foresees them: so many are asked for early."""

_LINE_NUMEL = 16  # float32 in a cache line of 64 bytes
_PREFETCH_NUMEL = 256  # of a longer row the processor itself foresees the rest


def _build() -> Any:
    fingerprint = source_fingerprint()

    def update_touched(
        rows: Any,
        values: Any,
        width: Any,
        scalars: Any,
        master: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        rounded: Any,
        num_pieces: Any,
    ) -> int:
        for piece in numba.prange(num_pieces):
            first = rows.size * piece // num_pieces
            last = rows.size * (piece + 1) // num_pieces
            for touched in range(first, last):
                if touched + _ROWS_AHEAD < last:
                    ahead = rows[touched + _ROWS_AHEAD] * width
                    for position in range(ahead, ahead + min(width, _PREFETCH_NUMEL), _LINE_NUMEL):
                        prefetch(master, position)
                        prefetch(exp_avg, position)
                        prefetch(exp_avg_sq, position)
                low = rows[touched] * width
                high = low + width
                update_range(
                    values[touched * width : (touched + 1) * width],
                    master[low:high],
                    exp_avg[low:high],
                    exp_avg_sq[low:high],
                    None,
                    window(rounded, low, high),
                    scalars,
                )
            finish_stores()
        return fingerprint

    return jit(update_touched, parallel=True)


_update_touched = _build()


def update_rows(
    gradient_format: FloatFormat,
    rows: Int64Array,
    values: ElementArray,
    width: int,
    scalars: Float32Array,
    master: Float32Array,
    exp_avg: Float32Array,
    exp_avg_sq: Float32Array,
    rounded: ElementArray | None,
    num_pieces: int,
) -> None:
    """Apply one Adam update to the touched rows of a table of n rows; no other row changes.

    Bit-identical for any `num_pieces` and any order of the rows, and equal to `update` on the same
    elements. Nothing is checked here: a row outside [0, n) writes outside the arrays, and a row
    that occurs twice is updated twice, by two threads at once. The caller refuses the one and sums
    the other.

    Args:
        gradient_format: format of the gradient.
        rows: (k,) contiguous, distinct row numbers, in any order; k may be 0.
        values: (k, width) contiguous, the rows' gradient as `gradient_format.carrier`.
        width: elements in a row.
        scalars: (NUM_SCALARS,) float32, see `scalar_row`.
        master: (n * width,) float32 weights, updated in place.
        exp_avg, exp_avg_sq: (n * width,) float32 moments, updated in place.
        rounded: (n * width,) where the parameter's own 16-bit format is written, or None where
            `master` is it.
        num_pieces: how many threads share the work.

    Cost: for an element of a touched row what `update` costs, and nothing for the other rows.
    Threads: `num_pieces` pieces on the mask that the calling thread has set.
    """
    _update_touched(
        rows,
        values.reshape(-1).view(gradient_format.carrier),
        width,
        scalars,
        master,
        exp_avg,
        exp_avg_sq,
        rounded,
        num_pieces,
    )


def prepare(gradient_format: FloatFormat, rounded_format: FloatFormat | None) -> None:
    """Compile, or load from the disk cache, the specialisation that `update_rows` will need."""
    state = np.zeros(0, dtype=np.float32)
    arguments = (
        np.zeros(0, dtype=np.int64),
        gradient_format.tag(),
        1,
        np.zeros(at.NUM_SCALARS, dtype=np.float32),
        state,
        state,
        state,
        None if rounded_format is None else rounded_format.tag(),
        1,
    )
    target = "the master itself" if rounded_format is None else rounded_format.value
    compile_now(_update_touched, arguments, f"row update ({gradient_format.value} -> {target})")
