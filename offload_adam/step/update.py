"""One bucket's work on the host: block sums before the agreement, the fused update after it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.parameters.families import float_format
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.gradients import BucketGradients
from offload_adam.step.launch import Kernels
from offload_adam.step.masks import UpdateMasks
from offload_adam.step.prepared import needs_preparation
from offload_adam.step.prepared_update import PreparedUpdate
from offload_adam.step.read_gate import ReadGate


class HostUpdate:
    """Runs the kernels over one bucket at a time, on this rank's threads.

    Owns: the array of block sums, reused by every bucket.
    Lifecycle: `prepare` for every set of buckets, at construction, compiles and allocates.
    """

    def __init__(self, num_threads: int | None, gate: ReadGate) -> None:
        self._gate = gate
        self._kernels = Kernels(num_threads)
        self._prepared = PreparedUpdate(self._kernels)
        self._block_sums = np.zeros(0, dtype=np.float64)

    @property
    def nbytes(self) -> dict[str, int]:
        """Host bytes by what they are for."""
        return {"block_sums": self._block_sums.nbytes, "prepared": self._prepared.nbytes}

    def touch(self, memory: torch.Tensor) -> None:
        """Write to every page of one plane, each from the thread that will update it."""
        self._kernels.touch(memory)

    def prepare(self, states: Iterable[BucketState]) -> None:
        """Compile what these buckets will launch, and make room for their block sums."""
        for state in states:
            landed = state.planes.landed_gradient
            gradient_format = float_format(state.dtype if landed is None else landed.dtype)
            self._kernels.prepare_sum(gradient_format)
            self._kernels.prepare_update(state, gradient_format)
            self._prepared.reserve(state, state.centralized)
            if state.layout.num_blocks > self._block_sums.size:
                self._block_sums = np.zeros(state.layout.num_blocks, dtype=np.float64)

    def reserve(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        """Make room for what sparse gradients need, before anything is changed."""
        if gradients.rows and lazy:
            self._kernels.prepare_rows(state)
        elif gradients.rows:
            self._prepared.reserve(state, needs_preparation(state, gradients))

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of this shard's gradients, not finite if one is."""
        return float(np.sum(self._sum_blocks(state, gradients)))

    def squares_by_position(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return the float64 sum of squares of each parameter's gradient in this shard."""
        sums = self._sum_blocks(state, gradients)
        if state.segments.numels.size == 0:
            return np.zeros(len(state.parameters))
        positions = _positions_of(state, np.arange(sums.size))
        squares = np.zeros(len(state.parameters))
        np.add.at(squares, positions, sums)
        return squares

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        """Return the positions of the bucket's parameters with a gradient that is not finite."""
        blocks = np.flatnonzero(~np.isfinite(self._sum_blocks(state, gradients)))
        return np.unique(_positions_of(state, blocks))

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
        rounded: torch.Tensor | None,
    ) -> None:
        """Update the shard's segments of `active` parameters and count the step for them.

        It waits for a checkpoint that is still reading the bucket.

        Args:
            rounded: where the 16-bit parameter shard is written, None where the master is it.
        """
        self._gate.wait_until_free(state.layout.index)
        counts = masks.count(state, active)
        prepared = active & needs_preparation(state, gradients)
        plain = active & ~prepared
        rows, scalars = masks.scalar_rows(state, counts, plain)
        for table in gradients.tables(state, plain):
            self._kernels.update(state, table, rows[table.positions], scalars, rounded)
        for position in np.flatnonzero(prepared).tolist():
            step = int(counts[position])
            self._prepared.update(state, gradients, position, step, masks, rounded)

    def _sum_blocks(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return the sum of squares of each block of the shard, 0 where there is no gradient."""
        sums = self._block_sums[: state.layout.num_blocks]
        sums.fill(0.0)
        for table in gradients.tables(state, gradients.readable):
            self._kernels.sum_blocks(table, sums)
        return sums


def _positions_of(state: BucketState, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the position of the parameter that each block of the shard belongs to."""
    segments = np.searchsorted(state.segments.shard_starts, blocks * BLOCK_NUMEL, side="right")
    positions: npt.NDArray[np.int64] = state.segments.positions[segments - 1]
    return positions
