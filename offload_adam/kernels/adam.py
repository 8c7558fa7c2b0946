"""The fused Adam update over a table of gradient segments, in one pass over the state.

A segment is a contiguous range of one parameter's elements that this rank owns. Each segment's
gradient has its own address. Master weight, moments and 16-bit parameter are flat arrays, in which
the segment has one offset:

    gradients    [segment 0]      [segment 1]    [segment 2]     anywhere in memory
    flat state   [segment 0 | segment 1 | segment 2 | padding]   one array for each plane
    threads      |---- piece 0 ----|---- piece 1 ---|            cut at whole blocks
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels import (
    adam_8bit_ir,
    adam_8bit_plain,
    adam_bf16_ir,
    adam_ir,
    adam_plain,
)
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
    SCALE,
    SHIFT,
)
from offload_adam.kernels.undo import UndoLog
from offload_adam.kernels.undo_ir import area_of, begin_piece, finish_piece
from offload_adam.layout.flat import BLOCK_NUMEL

if TYPE_CHECKING:
    from offload_adam.options import StateFormat

Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
RemainderArray = npt.NDArray[np.int16] | npt.NDArray[np.int8]
Float32Array = npt.NDArray[np.float32]
ElementArray = npt.NDArray[Any]


if adam_ir.supports_ir():
    _float32_range = jit_inlined(adam_ir.update_range)
    _bfloat16_range = jit_inlined(adam_bf16_ir.update_range)
    _8bit_range = jit_inlined(adam_8bit_ir.update_range)
else:
    _float32_range = _bfloat16_range = jit_inlined(adam_plain.update_range)
    _8bit_range = jit_inlined(adam_8bit_plain.update_range)


def _update_range(
    gradient: Any,
    master: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    param_out: Any,
    exponents: Any,
    place: Any,
    skipped: Any,
    scalars: Any,
    area: Any,
    start: Any,
) -> None:
    """Update one range of elements, with the loop for the format of its state.

    Args:
        exponents: rows of the range's blocks, see `update`; None if there are no 8-bit codes.
        place: (NUM_COLUMNS,) row of `places`, see `update`; None if the moments are float32.
        skipped: number of elements of the segment before this range; a multiple of 128 if there are
            exponents.
        area: area of the piece in the undo log; None without a log.
        start: offset of the range in the flat arrays; used only with a log.
    """
    if place is None:
        _float32_range(
            gradient,
            master,
            None,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            param_out,
            0,
            0,
            scalars,
            area,
            start,
        )
    elif exponents is not None:
        run, pitch = place[RUN], place[PITCH]
        local = place[LOCAL_START] + skipped
        row, column = place[FIRST] + local // run * pitch, local % run
        _8bit_range(
            gradient,
            master,
            remainder,
            exp_avg,
            exp_avg_sq,
            param_out,
            exponents,
            place[KEY],
            row,
            column,
            run,
            pitch,
            place[SCALE],
            place[SHIFT],
            scalars,
            area,
            start,
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
                area,
                start + low,
            )
            local += high - low
            low = high


update_range = jit_inlined(_update_range)
"""The loop over one range of elements. The IR kernels and `adam_plain` compute the same bits."""


@jit_inlined
def _cut(position: Any, work_starts: Any) -> Any:
    """Return the start of the block that has this position; blocks start at those of segments."""
    segment = np.searchsorted(work_starts, position, side="right") - 1
    skipped = position - work_starts[segment]
    return work_starts[segment] + skipped // BLOCK_NUMEL * BLOCK_NUMEL


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
        exponents: Any,
        places: Any,
        num_pieces: Any,
        undo: Any,
        launch: Any,
    ) -> int:
        total = work_starts[work_starts.size - 1]
        for piece in numba.prange(num_pieces):
            # Pieces are cut at blocks, not at segments, so all threads get equal work. Each thread
            # walks the segments that its piece overlaps.
            position = _cut(total * piece // num_pieces, work_starts)
            end = total
            if piece + 1 < num_pieces:
                end = _cut(total * (piece + 1) // num_pieces, work_starts)
            area = area_of(undo, piece)
            position = begin_piece(area, launch, position, end, starts, work_starts)
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
                    window(exponents, low // BLOCK_NUMEL, -(-high // BLOCK_NUMEL)),
                    row_of(places, segment),
                    skipped,
                    scalars[rows[segment]],
                    area,
                    low,
                )
                position += numel
                segment += 1
            finish_stores()  # each thread fences its own nontemporal stores
            finish_piece(area)
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
    remainder: RemainderArray | None,
    exp_avg: ElementArray,
    exp_avg_sq: ElementArray,
    max_exp_avg_sq: Float32Array | None,
    param_out: ElementArray | None,
    exponents: UInt8Array | None,
    places: Int64Array | None,
    num_pieces: int,
    undo: UInt8Array | None = None,
    launch: int = 0,
) -> None:
    """Apply one Adam update to every segment of the table.

    Bit-identical for any `num_pieces`, any split into segments and any alignment. With 8-bit codes,
    segments may be split only at multiples of 128 elements.

    The dtypes of moments and `master` select the format of the state:

        format                  master     remainder   exp_avg   exp_avg_sq   param_out
        fp32                    float32    None        float32   float32      None, or 16 bits
        bf16, split master      uint16     int16       uint16    uint16       None
        bf16, float32 master    float32    None        uint16    uint16       None, or float16
        mixed, split master     uint16     int8        uint16    uint8        None
        mixed, float32 master   float32    None        uint16    uint8        None, or float16
        int8, split master      uint16     int8        uint8     uint8        None
        int8, float32 master    float32    None        uint8     uint8        None, or float16

    A split master is the bfloat16 parameter. An int16 `remainder` is the difference between its
    bits and those of the float32 weight, see `Vectors.split`. With an int8 remainder, the master
    weight has the upper 24 bits of a float32 and is rounded stochastically, see `Vectors.split_24`.
    uint8 moments are codes, see `codes`.

    Moments in fewer than 32 bits are converted to float32 and updated. The weight is computed from
    these unrounded moments. Then they are rounded stochastically. Rounding to nearest would discard
    every change below half of the spacing, which are most changes with a beta near 1.

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
        max_exp_avg_sq: float32, updated in place; None without amsgrad and unless moments are
            float32.
        param_out: the 16-bit parameter, written in its own format; None if `master` is the
            parameter.
        exponents: (num_blocks, 2) uint8, C-contiguous, updated in place: the exponents of each
            block of 128 elements of the flat arrays, see `codes`. None without 8-bit codes. With
            them, every segment starts at a multiple of 128 in the flat arrays.
        places: None for float32 moments. For others (n, NUM_COLUMNS), contiguous, with a row (key,
            first, run, pitch, local_start, scale, shift) for each segment. `key` is from
            `segment_keys`. The next columns locate the segment in its unsharded parameter: element
            k has the index first + i // run * pitch + i % run there, where i = local_start + k. See
            `element_index`. An unsharded parameter has first = 0 and run = pitch = its length. The
            last two are used only with 8-bit codes: the float32 bits of the scale D after its decay
            in this update, and the exponent of the power of 2 by which D was multiplied in this
            update. With 8-bit codes, local_start is a multiple of 128.
        num_pieces: number of threads that share the work.
        undo: memory of an `UndoLog` with an area for each piece. With it, a killed update can be
            completed, see `UndoLog.restore`; `starts` must then ascend. None without a log.
        launch: number of this launch, unique for the log and not 0; 0 without a log.

    Raises:
        ValueError: `undo` has too few areas, or this machine has no IR kernel.

    Cost: memory traffic per element: 24 bytes of float32 state (32 with amsgrad), 2 or 4 of
        gradient, and 2 for a 16-bit parameter. With a split master, the state including the
        parameter takes 16 bytes in "bf16", 12 in "mixed" and 10 in "int8".
        The log stays in the caches.
    Threads: `num_pieces` pieces under the thread mask of the calling thread.
    """
    if undo is not None:
        if not adam_ir.supports_ir():
            raise ValueError("The kernel of this machine cannot keep an undo log. Pass undo=None.")
        if undo.size < UndoLog.nbytes(num_pieces):
            raise ValueError(
                f"The undo log has {undo.size} bytes, but {num_pieces} pieces need "
                f"{UndoLog.nbytes(num_pieces)}. Allocate a larger log."
            )
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
        exponents,
        places,
        num_pieces,
        undo,
        launch,
    )


def compile_kernel(
    gradient_format: FloatFormat,
    param_format: FloatFormat | None,
    amsgrad: bool,
    state_format: StateFormat = "fp32",
    split_master: bool = False,
    keeps: bool = False,
) -> None:
    """Compile, or load from the disk cache, the specialisation that `update` will need.

    Args:
        param_format: format of `param_out`; None if `param_out` is None.
        split_master: `master` is the bfloat16 parameter, and there is a remainder.
        keeps: `update` gets an undo log.
    """
    table = np.zeros(0, dtype=np.int64)
    master, remainder, exp_avg, exp_avg_sq = state_tags(state_format, split_master)
    has_codes = exp_avg_sq.dtype == np.uint8
    arguments = (
        gradient_format.dtype_tag(),
        table,
        table,
        table,
        table,
        np.zeros((0, at.NUM_SCALARS), dtype=np.float32),
        master,
        remainder,
        exp_avg,
        exp_avg_sq,
        np.zeros(0, dtype=np.float32) if amsgrad else None,
        None if param_format is None else param_format.dtype_tag(),
        np.zeros((0, 2), dtype=np.uint8) if has_codes else None,
        None if state_format == "fp32" else np.zeros((0, NUM_COLUMNS), dtype=np.int64),
        1,
        np.zeros(0, dtype=np.uint8) if keeps else None,
        0,
    )
    formats = describe_formats(gradient_format, param_format, state_format, split_master)
    if keeps:
        formats += ", undo log"
    compile_now(_update_segments, arguments, f"update ({formats})")


_MOMENT_DTYPES: dict[str, tuple[type[np.generic], type[np.generic]]] = {
    "fp32": (np.float32, np.float32),
    "bf16": (np.uint16, np.uint16),
    "mixed": (np.uint16, np.uint8),
    "int8": (np.uint8, np.uint8),
}


def state_tags(
    state_format: StateFormat, split_master: bool
) -> tuple[ElementArray, ElementArray | None, ElementArray, ElementArray]:
    """Return empty arrays of the dtypes of master, remainder and both moments, for compilation."""
    exp_avg, exp_avg_sq = (np.zeros(0, dtype=dtype) for dtype in _MOMENT_DTYPES[state_format])
    if split_master:
        dtype = np.int16 if state_format == "bf16" else np.int8
        remainder = np.zeros(0, dtype=dtype)
        return FloatFormat.BFLOAT16.dtype_tag(), remainder, exp_avg, exp_avg_sq
    return FloatFormat.FLOAT32.dtype_tag(), None, exp_avg, exp_avg_sq


def describe_formats(
    gradient_format: FloatFormat,
    param_format: FloatFormat | None,
    state_format: StateFormat,
    split_master: bool,
) -> str:
    """Describe the formats of a specialisation, for log lines."""
    gradient = gradient_format.value
    formats = (
        f"in place, {gradient}" if param_format is None else f"{gradient} -> {param_format.value}"
    )
    if state_format != "fp32":
        formats += f", {state_format} state"
    return formats + (", split master" if split_master else "")
