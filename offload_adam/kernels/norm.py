"""Block sums of squares of the gradients: for their norm, and to find non-finite elements.

The same pass can copy the gradients to their shard, which then costs no second read.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels.adam_ir import finish_stores
from offload_adam.kernels.compilation import compile_now, jit, jit_inlined, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import block_sum_of_squares, pointer_to, stream_block
from offload_adam.kernels.ir_vectors import LINE_NBYTES
from offload_adam.layout.flat import BLOCK_NUMEL


def _sum_range(gradient: Any, target: Any, sums: Any, first: Any) -> None:
    """Write the block sums of one range; a last partial block is padded with zeros.

    Args:
        target: receives a copy of the gradient, None for no copy.
    """
    whole = gradient.size // BLOCK_NUMEL
    for block in range(whole):
        sums[first + block] = block_sum_of_squares(gradient, block * BLOCK_NUMEL)
        if target is not None:
            stream_block(target, gradient, block * BLOCK_NUMEL)
    rest = gradient.size - whole * BLOCK_NUMEL
    if rest > 0:  # zeros add nothing, so the sum has the same bits as in a longer block
        padded = np.zeros(BLOCK_NUMEL, dtype=gradient.dtype)
        padded[:rest] = gradient[whole * BLOCK_NUMEL :]
        sums[first + whole] = block_sum_of_squares(padded, 0)
        if target is not None:
            target[whole * BLOCK_NUMEL :] = padded[:rest]


sum_range = jit_inlined(_sum_range)


def _build() -> Any:
    fingerprint = source_fingerprint()

    def sum_segments(
        tag: Any,
        addresses: Any,
        targets: Any,
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
                gradient = numba.carray(pointer_to(addresses[segment], tag), high)[skipped:]
                first = sum_starts[segment] + skipped // BLOCK_NUMEL
                if targets is None:
                    sum_range(gradient, None, sums, first)
                else:
                    target = numba.carray(pointer_to(targets[segment], tag), high)[skipped:]
                    sum_range(gradient, target, sums, first)
                position += blocks
                segment += 1
            if targets is not None:
                finish_stores()  # each thread fences its own nontemporal stores
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
    targets: npt.NDArray[np.int64] | None = None,
) -> None:
    """Write the sum of squares of every 128 elements of each segment, and maybe copy them.

    A block's sum is non-finite exactly if one of its elements is: the square of the largest float32
    is far below the largest float64. Bit-identical for any `num_pieces` and alignment.

    Args:
        gradient_format: format of all gradients of the table.
        addresses: (n,) address of each segment's first gradient element.
        sum_starts: (n,) index in `sums` of each segment's first sum.
        numels: (n,) number of elements of each segment.
        sums: float64; those of no segment in the table keep their values.
        num_pieces: number of threads that share the work.
        targets: (n,) address to which each segment is copied; None for no copy. Segments of 128
            elements or more need one that is aligned to 64 bytes.

    Cost: reads the gradient once, and writes 1/16 byte per element. The copy bypasses the caches.
    Threads: `num_pieces` pieces under the thread mask of the calling thread.
    """
    blocks = (numels + (BLOCK_NUMEL - 1)) // BLOCK_NUMEL
    if targets is not None:
        assert not np.any(targets[numels >= BLOCK_NUMEL] % LINE_NBYTES), "stores would fault"
    work_starts = np.zeros(blocks.size + 1, dtype=np.int64)
    np.cumsum(blocks, out=work_starts[1:])
    tag = gradient_format.dtype_tag()
    _sum_segments(tag, addresses, targets, sum_starts, numels, work_starts, sums, num_pieces)


def compile_kernel(gradient_format: FloatFormat, *, copies: bool = False) -> None:
    """Compile, or load from the disk cache, the specialisation that `block_sums` will need.

    Args:
        copies: `block_sums` gets targets.
    """
    tag, table = gradient_format.dtype_tag(), np.zeros(0, dtype=np.int64)
    targets = table if copies else None
    arguments = (tag, table, targets, table, table, table, np.zeros(0), 1)
    what = f"norm ({gradient_format.value}{', copy' if copies else ''})"
    compile_now(_sum_segments, arguments, what)
