"""The fused Adam update over a table of gradient segments, in one pass over the state.

A segment is a contiguous range of one parameter's elements that this rank owns. Each segment's
gradient has its own address. Master weight, moments and 16-bit parameter are flat arrays, in which
the segment has one offset:

    gradients    [segment 0]      [segment 1]    [segment 2]     anywhere in memory
    flat state   [segment 0 | segment 1 | segment 2 | padding]   one array for each plane
    threads      |---- piece 0 ----|---- piece 1 ---|            cut at whole blocks
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels import adam_ir, adam_plain
from offload_adam.kernels import scalars as at
from offload_adam.kernels.adam_ir import finish_stores
from offload_adam.kernels.compilation import compile_now, jit, jit_inlined, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import pointer_to, window
from offload_adam.layout.flat import BLOCK_NUMEL

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
ElementArray = npt.NDArray[Any]


update_range = jit_inlined((adam_ir if adam_ir.supports_ir() else adam_plain).update_range)
"""The loop over one range of elements. Both choices compute the same bits."""


def _build() -> Any:
    fingerprint = source_fingerprint()

    def update_segments(
        tag: Any,
        addresses: Any,
        starts: Any,
        work_starts: Any,
        rows: Any,
        scalars: Any,
        master: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        max_exp_avg_sq: Any,
        param_out: Any,
        num_pieces: Any,
    ) -> int:
        total = work_starts[work_starts.size - 1]
        for piece in numba.prange(num_pieces):
            # Pieces are cut at whole blocks, not at segments, so all threads get equal work. Each
            # thread walks the segments that its piece overlaps.
            position = total * piece // num_pieces // BLOCK_NUMEL * BLOCK_NUMEL
            end = total
            if piece + 1 < num_pieces:
                end = total * (piece + 1) // num_pieces // BLOCK_NUMEL * BLOCK_NUMEL
            segment = np.searchsorted(work_starts, position, side="right") - 1
            while position < end:
                skipped = position - work_starts[segment]
                numel = min(work_starts[segment + 1], end) - position
                low = starts[segment] + skipped
                high = low + numel
                pointer = pointer_to(addresses[segment], tag)
                gradient = numba.carray(pointer, skipped + numel)[skipped:]
                update_range(
                    gradient,
                    master[low:high],
                    exp_avg[low:high],
                    exp_avg_sq[low:high],
                    window(max_exp_avg_sq, low, high),
                    window(param_out, low, high),
                    scalars[rows[segment]],
                )
                position += numel
                segment += 1
            finish_stores()  # each thread fences its own nontemporal stores
        return fingerprint  # makes the fingerprint part of Numba's cache key

    return jit(update_segments, parallel=True)


_update_segments = _build()


def update(
    gradient_format: FloatFormat,
    addresses: Int64Array,
    starts: Int64Array,
    work_starts: Int64Array,
    rows: Int64Array,
    scalars: Float32Array,
    master: Float32Array,
    exp_avg: Float32Array,
    exp_avg_sq: Float32Array,
    max_exp_avg_sq: Float32Array | None,
    param_out: ElementArray | None,
    num_pieces: int,
) -> None:
    """Apply one Adam update to every segment of the table.

    Bit-identical for any `num_pieces`, any split into segments and any alignment.

    Args:
        gradient_format: format of all gradients of the table.
        addresses: (n,) address of each segment's first gradient element.
        starts: (n,) offset of each segment in the flat state arrays.
        work_starts: (n + 1,) running sum of the segments' lengths, from 0.
        rows: (n,) row of `scalars` for each segment.
        scalars: (r, NUM_SCALARS) float32, see `scalar_row`.
        master: float32 weights, updated in place.
        exp_avg, exp_avg_sq: float32 moments, updated in place.
        max_exp_avg_sq: float32, updated in place; None without amsgrad.
        param_out: the 16-bit parameter, written in its own format; None if `master` is the
            parameter.
        num_pieces: number of threads that share the work.

    Cost: memory traffic per element: 24 bytes of state (32 with amsgrad), 2 or 4 of gradient, and
    2 for a 16-bit parameter.
    Threads: `num_pieces` pieces under the thread mask of the calling thread.
    """
    _update_segments(
        gradient_format.dtype_tag(),
        addresses,
        starts,
        work_starts,
        rows,
        scalars,
        master,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        param_out,
        num_pieces,
    )


def compile_kernel(
    gradient_format: FloatFormat, param_format: FloatFormat | None, amsgrad: bool
) -> None:
    """Compile, or load from the disk cache, the specialisation that `update` will need."""
    table = np.zeros(0, dtype=np.int64)
    state = np.zeros(0, dtype=np.float32)
    arguments = (
        gradient_format.dtype_tag(),
        table,
        table,
        table,
        table,
        np.zeros((0, at.NUM_SCALARS), dtype=np.float32),
        state,
        state,
        state,
        state if amsgrad else None,
        None if param_format is None else param_format.dtype_tag(),
        1,
    )
    target = "the master itself" if param_format is None else param_format.value
    compile_now(_update_segments, arguments, f"update ({gradient_format.value} -> {target})")
