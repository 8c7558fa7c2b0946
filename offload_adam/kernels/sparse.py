"""The lazy update of a table: reads and changes only the rows that have a gradient.

It serves the sparse gradients of embeddings. The arithmetic is the dense kernel's, so a touched row
gets the bits that the dense update would give it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from offload_adam.kernels import scalars as at
from offload_adam.kernels.adam import (
    ElementArray,
    Float32Array,
    Int64Array,
    RemainderArray,
    describe_formats,
    state_tags,
    update_range,
)
from offload_adam.kernels.adam_ir import finish_stores
from offload_adam.kernels.compilation import compile_now, jit, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import prefetch, window
from offload_adam.kernels.ir_vectors import LINE_NBYTES
from offload_adam.kernels.random_keys import NUM_COLUMNS

if TYPE_CHECKING:
    from offload_adam.options import StateFormat

# Rows to prefetch ahead. They can be anywhere in the table, so no hardware prefetcher finds them.
_ROWS_AHEAD = 4
_LINE_NUMEL = LINE_NBYTES // 4  # float32 elements in a cache line
# Elements of a row to prefetch; the hardware prefetcher continues in a longer row.
_PREFETCH_NUMEL = 256


def _build() -> Any:
    fingerprint = source_fingerprint()

    def update_touched(
        rows: Any,
        values: Any,
        width: Any,
        scalars: Any,
        master: Any,
        remainder: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        param_out: Any,
        place: Any,
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
                        if remainder is not None:
                            prefetch(remainder, position)
                        prefetch(exp_avg, position)
                        prefetch(exp_avg_sq, position)
                low = rows[touched] * width
                high = low + width
                update_range(
                    values[touched * width : (touched + 1) * width],
                    master[low:high],
                    window(remainder, low, high),
                    exp_avg[low:high],
                    exp_avg_sq[low:high],
                    None,
                    window(param_out, low, high),
                    None,
                    place,
                    low,
                    scalars,
                    None,
                    low,
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
    master: ElementArray,
    remainder: RemainderArray | None,
    exp_avg: ElementArray,
    exp_avg_sq: ElementArray,
    param_out: ElementArray | None,
    place: Int64Array | None,
    num_pieces: int,
) -> None:
    """Apply one Adam update to the touched rows of a table of n rows; no other row changes.

    Bit-identical for any `num_pieces` and any order of the rows, and equal to `update` on the same
    elements. The caller must check the rows. A row outside [0, n) makes the kernel write outside
    the arrays. A row that occurs twice may be updated by two threads at the same time.

    Args:
        gradient_format: format of the gradient.
        rows: (k,) contiguous, distinct row numbers, in any order; k may be 0.
        values: (k, width) contiguous, the rows' gradient as `gradient_format.bits_dtype`.
        width: elements in a row.
        scalars: (NUM_SCALARS,) float32, see `scalar_row`.
        master: (n * width,) weights, updated in place; in a format of `adam.update`, but without
            8-bit codes.
        remainder: (n * width,) updated in place; None if `master` is float32.
        exp_avg, exp_avg_sq: (n * width,) moments, updated in place.
        param_out: (n * width,) the 16-bit parameter, written in its own format; None if `master` is
            the parameter.
        place: (NUM_COLUMNS,) int64, a row of `places` of `adam.update`; None for float32 moments.
            Its local_start is that of row 0 of the table.
        num_pieces: number of threads that share the work.

    Cost: for an element of a touched row what `update` costs, and nothing for the other rows.
    Threads: `num_pieces` pieces under the thread mask of the calling thread.
    """
    _update_touched(
        rows,
        values.reshape(-1).view(gradient_format.bits_dtype),
        width,
        scalars,
        master,
        remainder,
        exp_avg,
        exp_avg_sq,
        param_out,
        place,
        num_pieces,
    )


def compile_kernel(
    gradient_format: FloatFormat,
    param_format: FloatFormat | None,
    state_format: StateFormat = "fp32",
    split_master: bool = False,
) -> None:
    """Compile, or load from the disk cache, the specialisation that `update_rows` will need.

    Args:
        state_format: "fp32" or "bf16".
        gradient_format, param_format, split_master: see `adam.compile_kernel`.
    """
    master, remainder, exp_avg, exp_avg_sq = state_tags(state_format, split_master)
    arguments = (
        np.zeros(0, dtype=np.int64),
        gradient_format.dtype_tag(),
        1,
        np.zeros(at.NUM_SCALARS, dtype=np.float32),
        master,
        remainder,
        exp_avg,
        exp_avg_sq,
        None if param_format is None else param_format.dtype_tag(),
        None if state_format == "fp32" else np.zeros(NUM_COLUMNS, dtype=np.int64),
        1,
    )
    formats = describe_formats(gradient_format, param_format, state_format, split_master)
    compile_now(_update_touched, arguments, f"row update ({formats})")
