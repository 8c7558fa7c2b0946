"""Launches of the kernels on tensors: which specialisation, which memory, how many threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels import threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.parameters.families import float_format
from offload_adam.parameters.rows import GradientRows
from offload_adam.step.bucket_state import BucketState, carrier
from offload_adam.step.gradients import SegmentTable
from offload_adam.step.prepared import Segment

# Numba's workqueue layer ends the process when two threads launch at once, as those of two
# optimizers would.
_launching = threading.Lock()

MIN_PIECE_NUMEL = 32 * 1024
"""Elements below which another thread costs more to wake than it saves; no bit depends on it."""


_FLOAT32_NBYTES = 4


class Kernels:
    """The kernels on this rank's threads.

    Lifecycle: the `prepare_*` compile what the launches of the same name will need; they are called
    at construction, or before anything of a step is changed.
    """

    def __init__(self, num_threads: int | None) -> None:
        # Numba's OpenMP pool sets torch's thread count to its own size when it starts.
        num_torch_threads = torch.get_num_threads()
        self._num_threads = threads.plan_threads(num_threads)
        threads.use_threads(self._num_threads)
        torch.set_num_threads(num_torch_threads)
        # Numba takes longer to import than the rest of the package: it is loaded with the first
        # optimizer, not with `import offload_adam`.
        from offload_adam.kernels import adam, first_touch, norm, sparse

        self._norm = norm
        self._rows = sparse
        self._touch = first_touch
        self._update = adam

    def prepare_sum(self, gradient_format: FloatFormat) -> None:
        """Compile for `sum_blocks`."""
        self._norm.prepare(gradient_format)

    def prepare_update(self, state: BucketState, gradient_format: FloatFormat) -> None:
        """Compile for `update`."""
        amsgrad = state.planes.max_exp_avg_sq is not None
        self._update.prepare(gradient_format, rounded_format(state), amsgrad)

    def prepare_rows(self, state: BucketState) -> None:
        """Compile for `update_rows`."""
        self._rows.prepare(FloatFormat.FLOAT32, rounded_format(state))

    def touch(self, memory: torch.Tensor) -> None:
        """Write to every page of (n,) uint8, each from the thread that updates float32 there."""
        self._touch.touch(memory.numpy(), self._use_threads(memory.numel() // _FLOAT32_NBYTES))

    def sum_blocks(self, table: SegmentTable, sums: npt.NDArray[np.float64]) -> None:
        """Add the sum of squares of each block of the table's segments."""
        with _launching:
            self._norm.block_sums(
                table.gradient_format,
                table.addresses,
                table.starts,
                table.numels,
                sums,
                self._use_threads(int(table.numels.sum())),
            )

    def update(
        self,
        state: BucketState,
        table: SegmentTable,
        rows: npt.NDArray[np.int64],
        scalars: npt.NDArray[np.float32],
        rounded: torch.Tensor | None,
    ) -> None:
        """Update the table's segments.

        Args:
            rows: the row of `scalars` for each segment.
            rounded: where the 16-bit parameter shard is written, None where the master is it.
        """
        planes = state.planes
        largest = planes.max_exp_avg_sq
        with _launching:
            self._update.update(
                table.gradient_format,
                table.addresses,
                table.starts,
                table.work_starts(),
                rows,
                scalars,
                _float32(planes.master_weight),
                _float32(planes.exp_avg),
                _float32(planes.exp_avg_sq),
                None if largest is None else _float32(largest),
                None if rounded is None else carrier(rounded),
                self._use_threads(int(table.numels.sum())),
            )

    def update_rows(
        self,
        state: BucketState,
        segment: Segment,
        touched: GradientRows,
        scalars: npt.NDArray[np.float32],
        rounded: torch.Tensor | None,
    ) -> None:
        """Update the touched rows, each given once, of a parameter that this rank holds whole."""
        planes = state.planes
        with _launching:
            self._rows.update_rows(
                FloatFormat.FLOAT32,
                touched.rows.contiguous().numpy(),
                touched.values.contiguous().numpy(),
                touched.values.shape[1],
                scalars,
                _float32(segment.of(planes.master_weight)),
                _float32(segment.of(planes.exp_avg)),
                _float32(segment.of(planes.exp_avg_sq)),
                None if rounded is None else carrier(segment.of(rounded)),
                self._use_threads(touched.values.numel()),
            )

    def _use_threads(self, numel: int) -> int:
        """Set the thread mask for a launch over so many elements; return its number of pieces."""
        useful = -(-numel // MIN_PIECE_NUMEL)
        num_pieces = max(1, min(self._num_threads, useful))
        threads.use_threads(num_pieces)
        return num_pieces


def rounded_format(state: BucketState) -> FloatFormat | None:
    """Return the format in which the kernel writes the parameter, None for an fp32 one."""
    return None if state.dtype == torch.float32 else float_format(state.dtype)


def _float32(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().numpy()
    return array
