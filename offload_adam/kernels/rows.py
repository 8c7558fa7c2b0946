"""The lazy update of a table: the fused update on the rows that a sparse gradient touches."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from offload_adam.kernels.bits import window
from offload_adam.kernels.compilation import compile_now, jit, source_fingerprint
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import NUM_SCALARS
from offload_adam.kernels.update import update_range


def _build() -> Any:
    fingerprint = source_fingerprint()

    def update_touched_rows(
        rows: Any,
        values: Any,
        scalars: Any,
        master: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        rounded: Any,
        num_pieces: Any,
    ) -> int:
        num_rows, width = values.shape
        for piece in numba.prange(num_pieces):
            for place in range(
                num_rows * piece // num_pieces, num_rows * (piece + 1) // num_pieces
            ):
                low = rows[place] * width
                high = low + width
                update_range(
                    values[place],
                    master[low:high],
                    exp_avg[low:high],
                    exp_avg_sq[low:high],
                    None,
                    window(rounded, low, high),
                    scalars,
                )
        return fingerprint

    return jit(update_touched_rows, parallel=True)


_update_touched_rows = _build()


def update_rows(
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    scalars: npt.NDArray[np.float32],
    master: npt.NDArray[np.float32],
    exp_avg: npt.NDArray[np.float32],
    exp_avg_sq: npt.NDArray[np.float32],
    rounded: npt.NDArray[Any] | None,
    num_pieces: int,
) -> None:
    """Apply one Adam update to some rows of a table, and touch no other byte of it.

    A row gets the same bits as from `update.update`, for any `num_pieces`. Indices are taken as
    they are: the caller has checked them, and given each row once, since pieces run at one time.

    Args:
        rows: (k,) places in the table, in [0, n), no two the same.
        values: (k, width) float32 gradient of each row, contiguous.
        scalars: (NUM_SCALARS,) float32, see `scalar_row`.
        master, exp_avg, exp_avg_sq: (n * width,) float32, updated in place.
        rounded: (n * width,) where the parameter's own 16-bit format is written, or None.
        num_pieces: how many threads share the rows.

    Cost: as `update.update` for each touched element, and nothing for the others.
    """
    _update_touched_rows(rows, values, scalars, master, exp_avg, exp_avg_sq, rounded, num_pieces)


def prepare(rounded_format: FloatFormat | None) -> None:
    """Compile, or load from the disk cache, the specialisation that `update_rows` will need."""
    state = np.zeros(0, dtype=np.float32)
    arguments = (
        np.zeros(0, dtype=np.int64),
        np.zeros((0, 1), dtype=np.float32),
        np.zeros(NUM_SCALARS, dtype=np.float32),
        state,
        state,
        state,
        None if rounded_format is None else rounded_format.tag(),
        1,
    )
    target = "the master itself" if rounded_format is None else rounded_format.value
    compile_now(_update_touched_rows, arguments, f"rows (-> {target})")
