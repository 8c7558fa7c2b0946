"""One bucket's work on the host: block sums before the agreement, the fused update after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels import threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import NUM_SCALARS, Hyperparameters, scalar_row
from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.parameters.families import float_format
from offload_adam.step.bucket_state import BucketState, carrier
from offload_adam.step.gradients import BucketGradients, SegmentTable

MIN_PIECE_NUMEL = 32 * 1024
"""Elements below which another thread costs more to wake than it saves; no bit depends on it."""


class HostUpdate:
    """Runs the kernels over one bucket at a time, on this rank's threads.

    Owns: the array of block sums, reused by every bucket.
    Lifecycle: `prepare` for every set of buckets, at construction, compiles and allocates.
    """

    def __init__(self, num_threads: int | None) -> None:
        # Numba's OpenMP pool sets torch's thread count to its own size when it starts.
        num_torch_threads = torch.get_num_threads()
        self._num_threads = threads.plan_threads(num_threads)
        threads.use_threads(self._num_threads)
        torch.set_num_threads(num_torch_threads)
        # Numba takes longer to import than the rest of the package: it is loaded with the first
        # optimizer, not with `import offload_adam`.
        from offload_adam.kernels import norm, update

        self._norm = norm
        self._update = update
        self._block_sums = np.zeros(0, dtype=np.float64)

    @property
    def nbytes(self) -> int:
        """Host bytes of the block sums."""
        return int(self._block_sums.nbytes)

    def prepare(self, states: Iterable[BucketState]) -> None:
        """Compile what these buckets will launch, and make room for their block sums."""
        for state in states:
            landed = state.planes.landed_gradient
            gradient_format = float_format(state.dtype if landed is None else landed.dtype)
            self._norm.prepare(gradient_format)
            self._update.prepare(
                gradient_format, rounded_format(state), state.planes.max_exp_avg_sq is not None
            )
            if state.layout.num_blocks > self._block_sums.size:
                self._block_sums = np.zeros(state.layout.num_blocks, dtype=np.float64)

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of this shard's gradients, not finite if one is."""
        return float(np.sum(self._sum_blocks(state, gradients)))

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        """Return the positions of the bucket's parameters with a gradient that is not finite."""
        blocks = np.flatnonzero(~np.isfinite(self._sum_blocks(state, gradients)))
        segments = np.searchsorted(state.segments.shard_starts, blocks * BLOCK_NUMEL, side="right")
        return np.unique(state.segments.positions[segments - 1])

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        hyperparameters: Sequence[Hyperparameters],
        gradient_scale: float,
        rounded: torch.Tensor | None,
    ) -> None:
        """Update the shard's segments of `active` parameters and count the step for them.

        Args:
            hyperparameters: one for each parameter group.
            gradient_scale: unscaling times clip factor.
            rounded: where the 16-bit parameter shard is written, None where the master is it.
        """
        counts = state.step_counts.numpy()
        counts[active] += 1.0
        rows, scalars = scalar_rows(
            state.groups, counts.astype(np.int64), active, hyperparameters, gradient_scale
        )
        planes = state.planes
        largest = planes.max_exp_avg_sq
        for table in gradients.tables(state, active):
            num_pieces = self._use_threads(table)
            self._update.update(
                table.gradient_format,
                table.addresses,
                table.starts,
                table.work_starts(),
                rows[table.positions],
                scalars,
                _float32(planes.master_weight),
                _float32(planes.exp_avg),
                _float32(planes.exp_avg_sq),
                None if largest is None else _float32(largest),
                None if rounded is None else carrier(rounded),
                num_pieces,
            )

    def _use_threads(self, table: SegmentTable) -> int:
        """Set the thread mask for a launch over this table, and return its number of pieces."""
        useful = -(-int(table.numels.sum()) // MIN_PIECE_NUMEL)
        num_pieces = max(1, min(self._num_threads, useful))
        threads.use_threads(num_pieces)
        return num_pieces

    def _sum_blocks(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return the sum of squares of each block of the shard, 0 where there is no gradient."""
        sums = self._block_sums[: state.layout.num_blocks]
        sums.fill(0.0)
        for table in gradients.tables(state, gradients.readable):
            self._norm.block_sums(
                table.gradient_format,
                table.addresses,
                table.starts,
                table.numels,
                sums,
                self._use_threads(table),
            )
        return sums


def scalar_rows(
    groups: npt.NDArray[np.int64],
    steps: npt.NDArray[np.int64],
    active: npt.NDArray[np.bool_],
    hyperparameters: Sequence[Hyperparameters],
    gradient_scale: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return each parameter's row number, and the rows: one for each (group, step) in use.

    Args:
        groups, steps: (n,) group and completed steps, this one included, of each parameter.
        active: (n,) parameters that are updated; the others' row numbers mean nothing.
    """
    rows = np.zeros(groups.size, dtype=np.int64)
    pairs = np.stack([groups[active], steps[active]], axis=1)
    if len(pairs) == 0:
        return rows, np.zeros((0, NUM_SCALARS), dtype=np.float32)
    if (pairs == pairs[0]).all():
        unique = pairs[:1]
    else:
        unique, rows[active] = np.unique(pairs, axis=0, return_inverse=True)
    scalars = [
        scalar_row(hyperparameters[group], step, gradient_scale) for group, step in unique.tolist()
    ]
    return rows, np.stack(scalars)


def rounded_format(state: BucketState) -> FloatFormat | None:
    """Return the format in which the kernel writes the parameter, None for an fp32 one."""
    return None if state.dtype == torch.float32 else float_format(state.dtype)


def _float32(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().numpy()
    return array
