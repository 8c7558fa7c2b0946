"""What one step adds to the fixed schedule: who is updated, with which scalars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload_adam.kernels.scalars import NUM_SCALARS, Hyperparameters, scalar_row
from offload_adam.step.bucket_state import BucketState


@dataclass(frozen=True, slots=True)
class UpdateMasks:
    """What one step adds to the fixed schedule.

    active: (num parameters,) bool, those with a gradient on any rank.
    hyperparameters: what `BucketState.groups` counts over.
    gradient_scale: unscaling times clip factor.
    step: the step count of every parameter, this update included; None where each has its own.
    lazy: sparse gradients update the rows they touch and no others.
    """

    active: npt.NDArray[np.bool_]
    hyperparameters: Sequence[Hyperparameters]
    gradient_scale: float
    step: int | None = None
    lazy: bool = False

    def count(self, state: BucketState, active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Count the step for the bucket's active parameters and return its step counts."""
        counts = state.step_counts.numpy()
        if self.step is None:
            counts[active] += 1.0
        else:
            counts[:] = self.step
        return counts.astype(np.int64)

    def scalar_rows(
        self,
        state: BucketState,
        counts: npt.NDArray[np.int64],
        active: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return each parameter's row number, and the rows: one for each (group, step) in use.

        Args:
            counts: (n,) completed steps, this one included, of each parameter.
            active: (n,) parameters that are updated; the others' row numbers mean nothing.
        """
        rows = np.zeros(counts.size, dtype=np.int64)
        pairs = np.stack([state.groups[active], counts[active]], axis=1)
        if len(pairs) == 0:
            return rows, np.zeros((0, NUM_SCALARS), dtype=np.float32)
        if (pairs == pairs[0]).all():
            unique = pairs[:1]
        else:
            unique, rows[active] = np.unique(pairs, axis=0, return_inverse=True)
        scalars = [
            scalar_row(self.hyperparameters[group], step, self.gradient_scale)
            for group, step in unique.tolist()
        ]
        return rows, np.stack(scalars)
