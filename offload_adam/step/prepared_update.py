"""The update of parameters whose gradient is prepared whole: centralized or sparse ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row
from offload_adam.parameters.rows import sum_duplicates
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.gradients import BucketGradients, SegmentTable
from offload_adam.step.launch import Kernels
from offload_adam.step.masks import UpdateMasks
from offload_adam.step.prepared import (
    Preparation,
    Segment,
    once_prepared,
    preparation_of,
    prepare_dense,
    prepare_rows,
    prepare_whole_rows,
    segment_of,
)


class PreparedUpdate:
    """Prepares one parameter's gradient after the other and launches the kernel on it.

    Owns: room for the largest of them, fp32, reused by all.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._room = torch.zeros(0, dtype=torch.float32, device="cpu")

    @property
    def nbytes(self) -> int:
        """Host bytes of the room."""
        return self._room.nbytes

    def reserve(self, state: BucketState, prepared: npt.NDArray[np.bool_]) -> None:
        """Compile and make room for these parameters of a bucket."""
        numels = state.segments.numels[prepared[state.segments.positions]]
        largest = int(numels.max(initial=0))
        if largest > 0:
            self._kernels.prepare_update(state, FloatFormat.FLOAT32)
        if largest > self._room.numel():
            self._room = torch.zeros(largest, dtype=torch.float32, device="cpu")

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        position: int,
        step: int,
        masks: UpdateMasks,
        rounded: torch.Tensor | None,
    ) -> None:
        """Update this rank's part of one parameter."""
        segment = segment_of(state, position)
        if segment is None:
            return
        hyper = masks.hyperparameters[state.groups[position]]
        how = preparation_of(state, position, hyper, masks.gradient_scale)
        scalars = scalar_row(once_prepared(hyper), step, 1.0)
        if masks.lazy and position in gradients.rows:
            weight = segment.of(state.planes.master_weight)
            entries = prepare_whole_rows(gradients.rows[position], weight, how)
            touched = sum_duplicates(entries)
            self._kernels.update_rows(state, segment, touched, scalars, rounded)
            return
        self._fill(state, gradients, segment, how)
        self._kernels.update(
            state, self._table(segment), np.zeros(1, dtype=np.int64), scalars[None], rounded
        )

    def _fill(
        self,
        state: BucketState,
        gradients: BucketGradients,
        segment: Segment,
        how: Preparation,
    ) -> None:
        """Write the prepared gradient of a segment into the room."""
        out = self._room[: segment.numel]
        weight = segment.of(state.planes.master_weight)
        entries = gradients.rows.get(segment.position)
        if entries is None:
            dense = gradients.segment_of(state, segment.row)
            prepare_dense(dense, weight, state.parameters[segment.position], how, out)
            return
        if state.layout.world_size == 1:
            entries = prepare_whole_rows(entries, weight, how)
        else:
            entries = prepare_rows(entries, weight, segment, how)
        table = out.zero_().view(-1, entries.values.shape[1])
        table.index_put_((entries.rows,), entries.values, accumulate=True)

    def _table(self, segment: Segment) -> SegmentTable:
        columns = (
            self._room.data_ptr(),
            segment.shard_start,
            segment.numel,
            segment.position,
        )
        return SegmentTable(
            FloatFormat.FLOAT32, *(np.array([column], dtype=np.int64) for column in columns)
        )
