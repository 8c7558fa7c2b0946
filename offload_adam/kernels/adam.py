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

from offload_adam.kernels import adam_bf16_ir, adam_ir, adam_plain
from offload_adam.kernels import scalars as at
from offload_adam.kernels.adam_ir import finish_stores
from offload_adam.kernels.compilation import compile_now, jit, jit_inlined, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import pointer_to, row_of, window
from offload_adam.kernels.random_keys import (
    FIRST,
    KEY,
    LOCAL_START,
    NUM_COLUMNS,
    PITCH,
    RUN,
)
from offload_adam.layout.flat import BLOCK_NUMEL

Int64Array = npt.NDArray[np.int64]
Int16Array = npt.NDArray[np.int16]
Float32Array = npt.NDArray[np.float32]
ElementArray = npt.NDArray[Any]


if adam_ir.supports_ir():
    _float32_range = jit_inlined(adam_ir.update_range)
    _bfloat16_range = jit_inlined(adam_bf16_ir.update_range)
else:
    _float32_range = _bfloat16_range = jit_inlined(adam_plain.update_range)


def _update_range(
    gradient: Any,
    master: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    param_out: Any,
    place: Any,
    skipped: Any,
    scalars: Any,
) -> None:
    """Update one range of elements, with the loop for the format of its state.

    Args:
        place: (5,) row of `places`, see `update`; None if the moments are float32.
        skipped: number of elements of the segment before this range.
    """
    if place is None:
        _float32_range(
            gradient, master, None, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, 0, 0, scalars
        )
    else:
        first, run, pitch = place[FIRST], place[RUN], place[PITCH]
        local = place[LOCAL_START] + skipped
        # One call per run, because indices are consecutive only within a run.
        low = 0
        while low < gradient.size:
            column = local % run
            high = min(low + run - column, gradient.size)
            _bfloat16_range(
                gradient[low:high],
                master[low:high],
                window(remainder, low, high),
                exp_avg[low:high],
                exp_avg_sq[low:high],
                None,
                window(param_out, low, high),
                place[KEY],
                first + local // run * pitch + column,
                scalars,
            )
            local += high - low
            low = high


update_range = jit_inlined(_update_range)
"""The loop over one range of elements. The IR kernels and `adam_plain` compute the same bits."""


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
        remainder: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        max_exp_avg_sq: Any,
        param_out: Any,
        places: Any,
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
                    window(remainder, low, high),
                    exp_avg[low:high],
                    exp_avg_sq[low:high],
                    window(max_exp_avg_sq, low, high),
                    window(param_out, low, high),
                    row_of(places, segment),
                    skipped,
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
    master: ElementArray,
    remainder: Int16Array | None,
    exp_avg: ElementArray,
    exp_avg_sq: ElementArray,
    max_exp_avg_sq: Float32Array | None,
    param_out: ElementArray | None,
    places: Int64Array | None,
    num_pieces: int,
) -> None:
    """Apply one Adam update to every segment of the table.

    Bit-identical for any `num_pieces`, any split into segments and any alignment.

    The dtypes of `exp_avg` and `master` select the format of the state:

        format                      master     remainder   moments   param_out
        float32                     float32    None        float32   None, or 16 bits
        bf16, split master          uint16     int16       uint16    None
        bf16, float32 master        float32    None        uint16    None, or float16

    A split master is the bfloat16 parameter, and `remainder` is the difference between its bits and
    those of the float32 weight, see `Vectors.split`. bfloat16 moments are converted to float32 and
    updated. The weight is computed from these unrounded moments. Then they are rounded
    stochastically. Rounding to nearest would discard every change below half of bfloat16's spacing,
    which are most changes with a beta near 1.

    Args:
        gradient_format: format of all gradients of the table.
        addresses: (n,) address of each segment's first gradient element.
        starts: (n,) offset of each segment in the flat state arrays.
        work_starts: (n + 1,) running sum of the segments' lengths, from 0.
        rows: (n,) row of `scalars` for each segment.
        scalars: (r, NUM_SCALARS) float32, see `scalar_row`.
        master: flat master weights, updated in place.
        remainder: as long as `master`, updated in place; None if `master` is float32.
        exp_avg, exp_avg_sq: moments, as long as `master`, updated in place.
        max_exp_avg_sq: float32, updated in place; None without amsgrad and for bfloat16 moments.
        param_out: the 16-bit parameter, written in its own format; None if `master` is the
            parameter.
        places: None for float32 moments. For bfloat16 moments (n, 5), contiguous, with a row (key,
            first, run, pitch, local_start) for each segment. `key` is from `segment_keys`. The
            other columns locate the segment in its unsharded parameter: element k has the index
            first + i // run * pitch + i % run there, where i = local_start + k. See
            `element_index`. An unsharded parameter has first = 0 and run = pitch = its length.
        num_pieces: number of threads that share the work.

    Cost: memory traffic per element: 24 bytes of float32 state (32 with amsgrad), 2 or 4 of
        gradient, and 2 for a 16-bit parameter. With bfloat16 moments and a split master, 16 bytes
        of state including the parameter.
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
        remainder,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        param_out,
        places,
        num_pieces,
    )


def compile_kernel(
    gradient_format: FloatFormat,
    param_format: FloatFormat | None,
    amsgrad: bool,
    moment_format: FloatFormat = FloatFormat.FLOAT32,
    split_master: bool = False,
) -> None:
    """Compile, or load from the disk cache, the specialisation that `update` will need.

    Args:
        param_format: format of `param_out`; None if `param_out` is None.
        moment_format: FLOAT32 or BFLOAT16.
        split_master: `master` is the bfloat16 parameter, and there is a remainder.
    """
    table = np.zeros(0, dtype=np.int64)
    master, remainder, moments = state_tags(moment_format, split_master)
    arguments = (
        gradient_format.dtype_tag(),
        table,
        table,
        table,
        table,
        np.zeros((0, at.NUM_SCALARS), dtype=np.float32),
        master,
        remainder,
        moments,
        moments,
        np.zeros(0, dtype=np.float32) if amsgrad else None,
        None if param_format is None else param_format.dtype_tag(),
        None
        if moment_format is FloatFormat.FLOAT32
        else np.zeros((0, NUM_COLUMNS), dtype=np.int64),
        1,
    )
    formats = describe_formats(gradient_format, param_format, moment_format, split_master)
    compile_now(_update_segments, arguments, f"update ({formats})")


def state_tags(
    moment_format: FloatFormat, split_master: bool
) -> tuple[ElementArray, ElementArray | None, ElementArray]:
    """Return empty arrays of the dtypes of master, remainder and moments, for compilation."""
    moments = moment_format.dtype_tag()
    if split_master:
        return FloatFormat.BFLOAT16.dtype_tag(), np.zeros(0, dtype=np.int16), moments
    return FloatFormat.FLOAT32.dtype_tag(), None, moments


def describe_formats(
    gradient_format: FloatFormat,
    param_format: FloatFormat | None,
    moment_format: FloatFormat,
    split_master: bool,
) -> str:
    """Describe the formats of a specialisation, for log lines."""
    target = "the master itself" if param_format is None else param_format.value
    formats = f"{gradient_format.value} -> {target}"
    if moment_format is not FloatFormat.FLOAT32:
        formats += f", moments in {moment_format.value}"
    return formats + (", split master" if split_master else "")
