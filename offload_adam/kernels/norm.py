"""Block sums of squares of the gradients: for their norm, and to find non-finite elements."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels.compilation import compile_now, jit, jit_inlined, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import block_sum_of_squares, pointer_to
from offload_adam.layout.flat import BLOCK_NUMEL


def _sum_range(gradient: Any, sums: Any, first: Any) -> None:
    """Write the block sums of one range; a last partial block is padded with zeros."""
    whole = gradient.size // BLOCK_NUMEL
    for block in range(whole):
        sums[first + block] = block_sum_of_squares(gradient, block * BLOCK_NUMEL)
    rest = gradient.size - whole * BLOCK_NUMEL
    if rest > 0:  # zeros add nothing, so the sum has the same bits as in a longer block
        padded = np.zeros(BLOCK_NUMEL, dtype=gradient.dtype)
        padded[:rest] = gradient[whole * BLOCK_NUMEL :]
        sums[first + whole] = block_sum_of_squares(padded, 0)


sum_range = jit_inlined(_sum_range)


def _build() -> Any:
    fingerprint = source_fingerprint()

    def sum_segments(
        tag: Any,
        addresses: Any,
        sum_starts: Any,
        numels: Any,
        work_starts: Any,
        sums: Any,
        pieces: Any,
    ) -> int:
        total = work_starts[work_starts.size - 1]
        for piece in numba.prange(pieces):
            # Work is counted in blocks, so that no two threads write the same sum.
            position = total * piece // pieces
            end = total * (piece + 1) // pieces
            segment = np.searchsorted(work_starts, position, side="right") - 1
            while position < end:
                skipped = (position - work_starts[segment]) * BLOCK_NUMEL
                blocks = min(work_starts[segment + 1], end) - position
                high = min(skipped + blocks * BLOCK_NUMEL, numels[segment])
                pointer = pointer_to(addresses[segment], tag)
                gradient = numba.carray(pointer, high)[skipped:]
                sum_range(gradient, sums, sum_starts[segment] + skipped // BLOCK_NUMEL)
                position += blocks
                segment += 1
        return fingerprint

    return jit(sum_segments, parallel=True)


_sum_segments = _build()


def block_sums(
    gradient_format: FloatFormat,
    addresses: npt.NDArray[np.int64],
    sum_starts: npt.NDArray[np.int64],
    numels: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
    num_pieces: int,
) -> None:
    """Write the sum of squares of every 128 elements of each segment.

    A block's sum is non-finite exactly if one of its elements is: the square of the largest float32
    is far below the largest float64. Bit-identical for any `num_pieces` and alignment.

    Args:
        gradient_format: format of all gradients of the table.
        addresses: (n,) address of each segment's first gradient element.
        sum_starts: (n,) index in `sums` of each segment's first sum.
        numels: (n,) number of elements of each segment.
        sums: float64; those of no segment in the table keep their values.
        num_pieces: number of threads that share the work.

    Cost: reads the gradient once, and writes 1/16 byte per element.
    Threads: `num_pieces` pieces under the thread mask of the calling thread.
    """
    blocks = (numels + (BLOCK_NUMEL - 1)) // BLOCK_NUMEL
    work_starts = np.zeros(blocks.size + 1, dtype=np.int64)
    np.cumsum(blocks, out=work_starts[1:])
    _sum_segments(
        gradient_format.dtype_tag(), addresses, sum_starts, numels, work_starts, sums, num_pieces
    )


def compile_kernel(gradient_format: FloatFormat) -> None:
    """Compile, or load from the disk cache, the specialisation that `block_sums` will need."""
    table = np.zeros(0, dtype=np.int64)
    arguments = (gradient_format.dtype_tag(), table, table, table, table, np.zeros(0), 1)
    compile_now(_sum_segments, arguments, f"norm ({gradient_format.value})")
