"""Norm and update of one bucket with state on a device.

On a GPU, `fused_update` does what torch's fused kernel can. `foreach_update` does the rest:
Nesterov momentum, sparse and centralized gradients, and scalars or gradients out of range.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.sparse import GradientRows
from offload_adam.gradients.whole import (
    needs_preparation,
    prepare_gradient,
)
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.layout.flat import Segment
from offload_adam.params.bucket import BucketState
from offload_adam.step.device_norm import DeviceNorms, start_norms, wait_for_squares
from offload_adam.step.foreach_update import LARGEST, DeviceSegments, foreach_update
from offload_adam.step.fused_update import fused_scalars, fused_update
from offload_adam.step.messages import Launches, UpdateInputs, UpdatePart, count_step

# On a CPU, the bits of torch's fused kernel depend on how buckets are cut.
FUSED_DEVICES = {"cuda"}


class DeviceUpdate:
    """Has the methods of `HostUpdate`, but runs torch's operations on the device.

    With replicated state every parameter is one segment. With sharded state the segments are those
    of this rank's shard.
    """

    def compile_for_accumulator(self, state: BucketState) -> None:
        """Do nothing: torch's operations read any dtype."""

    def allocate_for(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        """Do nothing: torch's caching allocator provides the temporaries."""

    def start_norms(self, state: BucketState, gradients: BucketGradients) -> DeviceNorms:
        """Launch the kernels for the norms of the dense gradients; `owners` are segments."""
        return start_norms([g for _, g in _dense(state, gradients, gradients.readable)])

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of the dense gradients, non-finite if one is.

        Waits for the device; `UpdateTasks.sum_on_devices` waits once for all buckets.
        """
        (squares,) = wait_for_squares([self.start_norms(state, gradients)])
        return float(squares.sum())

    def squares_by_position(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return the float64 sum of squares of each parameter's dense gradient."""
        found = np.zeros(len(state.parameters))
        positions, squares = self._squares(state, gradients)
        np.add.at(found, positions, squares)
        return found

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        """Return the positions of the bucket's parameters with a non-finite gradient."""
        positions, squares = self._squares(state, gradients)
        return np.unique(positions[~np.isfinite(squares)])

    def _squares(
        self, state: BucketState, gradients: BucketGradients
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the positions and sums of squares of the pieces of the dense gradients."""
        dense = _dense(state, gradients, gradients.readable)
        started = start_norms([gradient for _, gradient in dense])
        (squares,) = wait_for_squares([started])
        positions = np.array([segment.position for segment, _ in dense], dtype=np.int64)
        return positions[started.owners], squares

    def prepare(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        inputs: UpdateInputs,
        param_out: torch.Tensor | None,
    ) -> Launches:
        """Return the update of the `active` parameters as one part, without running it.

        Args:
            active: (n,) bool, by position in the bucket.
            param_out: receives the 16-bit parameters; None if the master is the parameter.
        """
        counts = inputs.counts_after(state, active)
        update = partial(self._update, state, gradients, active, counts, inputs, param_out)
        part = UpdatePart(0, state.layout.shard_numel, update)
        return Launches([part], partial(count_step, state, counts))

    def _update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        counts: npt.NDArray[np.int64],
        inputs: UpdateInputs,
        param_out: torch.Tensor | None,
    ) -> None:
        prepared = active & needs_preparation(state, gradients)
        # Parameters of one group and step count share their scalars, and so one call.
        alike: dict[tuple[int, int], list[tuple[Segment, torch.Tensor]]] = defaultdict(list)
        for segment, gradient in _dense(state, gradients, active & ~prepared):
            key = int(state.groups[segment.position]), int(counts[segment.position])
            alike[key].append((segment, gradient))
        is_limited = False
        for (group, step), members in alike.items():
            segments = _segments_of(state, members, param_out)
            hyper, scale = inputs.hyperparameters[group], inputs.gradient_scale
            scalars = fused_scalars(hyper, step, scale, inputs.largest_gradient)
            if scalars and state.device.type in FUSED_DEVICES:
                if not is_limited:
                    # The fused kernel would divide infinity by infinity. Updates store no infinite
                    # first moment, but the user may have loaded or written one.
                    state.planes.exp_avg.clamp_(-LARGEST, LARGEST)
                    is_limited = True
                fused_update(segments, scalars)
            else:
                foreach_update(segments, hyper, step, scale)
        for segment in state.segments.select(prepared):
            self._update_prepared(state, gradients, segment, counts, inputs, param_out)

    def _update_prepared(
        self,
        state: BucketState,
        gradients: BucketGradients,
        segment: Segment,
        counts: npt.NDArray[np.int64],
        inputs: UpdateInputs,
        param_out: torch.Tensor | None,
    ) -> None:
        """Update one parameter whose gradient is centralized or sparse."""
        hyper, how = inputs.preparation_of(state, segment.position)
        step = int(counts[segment.position])
        gradient = prepare_gradient(state, gradients, segment, how, lazy=inputs.lazy)
        if isinstance(gradient, GradientRows):
            _update_rows(state, segment, gradient, hyper, step, param_out)
            return
        # The scale is 1.0, because the preparation has already scaled the gradient.
        foreach_update(_segments_of(state, [(segment, gradient)], param_out), hyper, step, 1.0)


def _dense(
    state: BucketState, gradients: BucketGradients, chosen: npt.NDArray[np.bool_]
) -> list[tuple[Segment, torch.Tensor]]:
    """Return the chosen parameters' segments with their dense gradients."""
    return [
        (segment, gradients.segment_gradient(state, segment))
        for segment in state.segments.select(chosen)
        if segment.position not in gradients.rows
    ]


def _segments_of(
    state: BucketState,
    members: Sequence[tuple[Segment, torch.Tensor]],
    param_out: torch.Tensor | None,
) -> DeviceSegments:
    planes = state.planes
    segments = [segment for segment, _ in members]
    largest = planes.max_exp_avg_sq
    return DeviceSegments(
        gradients=[gradient for _, gradient in members],
        master_weights=[segment.of(planes.master_weight) for segment in segments],
        exp_avgs=[segment.of(planes.exp_avg) for segment in segments],
        exp_avg_sqs=[segment.of(planes.exp_avg_sq) for segment in segments],
        max_exp_avg_sqs=None if largest is None else [s.of(largest) for s in segments],
        param_out=None if param_out is None else [s.of(param_out) for s in segments],
    )


def _update_rows(
    state: BucketState,
    segment: Segment,
    touched: GradientRows,
    hyper: Hyperparameters,
    step: int,
    param_out: torch.Tensor | None,
) -> None:
    """Copy the touched rows out of the state, update them, and write them back.

    `touched` must have no duplicate rows: one of two updates would be lost.
    """
    if touched.rows.numel() == 0:
        return
    planes = state.planes
    # No maximum: amsgrad rejects sparse gradients.
    targets = [planes.master_weight, planes.exp_avg, planes.exp_avg_sq]
    if param_out is not None:
        targets.append(param_out)
    tables = [segment.of(plane).view(-1, touched.values.shape[1]) for plane in targets]
    copies = [table[touched.rows] for table in tables]
    master, exp_avg, exp_avg_sq, *rest = [[copy.view(-1)] for copy in copies]
    foreach_update(
        DeviceSegments(
            [touched.values.reshape(-1)],
            master,
            exp_avg,
            exp_avg_sq,
            param_out=rest[0] if rest else None,
        ),
        hyper,
        step,
        1.0,
    )
    for table, copy in zip(tables, copies, strict=True):
        table.index_copy_(0, touched.rows, copy)
