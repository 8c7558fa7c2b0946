"""One bucket's work where its state lies on the device of its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.parameters.rows import GradientRows, sum_duplicates
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.foreach_update import DeviceSegments, foreach_update, sum_of_squares
from offload_adam.step.gradients import BucketGradients
from offload_adam.step.masks import UpdateMasks
from offload_adam.step.prepared import (
    Preparation,
    Segment,
    every_segment,
    needs_preparation,
    once_prepared,
    preparation_of,
    prepare_dense,
    prepare_rows,
    prepare_whole_rows,
)
from offload_adam.step.read_gate import ReadGate


class DeviceUpdate:
    """Does with torch's operations what `HostUpdate` does with the kernels.

    State beside its parameter is never divided: every parameter is one segment there. Of sharded
    state the segments are what this rank owns.
    """

    def __init__(self, gate: ReadGate) -> None:
        self._gate = gate

    def reserve(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        """Temporaries come from torch's own cache of device memory."""

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of the dense gradients, not finite if one is not."""
        found = [gradient for _, gradient in _dense(state, gradients, gradients.readable)]
        return sum_of_squares(found)

    def squares_by_position(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        """Return the float64 sum of squares of each parameter's dense gradient."""
        squares = np.zeros(len(state.parameters))
        for segment, gradient in _dense(state, gradients, gradients.readable):
            squares[segment.position] += sum_of_squares([gradient])
        return squares

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        """Return the positions of the bucket's parameters with a gradient that is not finite."""
        found = _dense(state, gradients, gradients.readable)
        bad = [s.position for s, gradient in found if not torch.isfinite(gradient).all()]
        return np.array(bad, dtype=np.int64)

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
        rounded: torch.Tensor | None,
    ) -> None:
        """Update the `active` parameters and count the step for them.

        It waits for a checkpoint that is still reading the bucket.

        Args:
            rounded: where the 16-bit parameters are written, None where the master is it.
        """
        self._gate.wait_until_free(state.layout.index)
        counts = masks.count(state, active)
        prepared = active & needs_preparation(state, gradients)
        alike: dict[tuple[int, int], list[tuple[Segment, torch.Tensor]]] = defaultdict(list)
        for segment, gradient in _dense(state, gradients, active & ~prepared):
            key = int(state.groups[segment.position]), int(counts[segment.position])
            alike[key].append((segment, gradient))
        for (group, step), members in alike.items():
            segments = _segments_of(state, members, rounded)
            hyper = masks.hyperparameters[group]
            foreach_update(segments, hyper, step, masks.gradient_scale)
        for segment in every_segment(state, prepared):
            self._update_prepared(state, gradients, segment, counts, masks, rounded)

    def _update_prepared(
        self,
        state: BucketState,
        gradients: BucketGradients,
        segment: Segment,
        counts: npt.NDArray[np.int64],
        masks: UpdateMasks,
        rounded: torch.Tensor | None,
    ) -> None:
        """Update one parameter whose gradient is centralized or sparse."""
        position = segment.position
        hyper = masks.hyperparameters[state.groups[position]]
        how = preparation_of(state, position, hyper, masks.gradient_scale)
        step = int(counts[position])
        weight = segment.of(state.planes.master_weight)
        entries = gradients.rows.get(position)
        if entries is not None and state.layout.world_size == 1:
            entries = prepare_whole_rows(entries, weight, how)
        elif entries is not None:
            entries = prepare_rows(entries, weight, segment, how)
        if entries is not None and masks.lazy:
            _update_rows(state, segment, sum_duplicates(entries), hyper, step, rounded)
            return
        gradient = _spread(state, gradients, segment, entries, how)
        segments = _segments_of(state, [(segment, gradient)], rounded)
        foreach_update(segments, once_prepared(hyper), step, 1.0)


def _dense(
    state: BucketState, gradients: BucketGradients, chosen: npt.NDArray[np.bool_]
) -> list[tuple[Segment, torch.Tensor]]:
    """Return the chosen parameters' segments with their dense gradients."""
    return [
        (segment, gradients.segment_of(state, segment.row))
        for segment in every_segment(state, chosen)
        if segment.position not in gradients.rows
    ]


def _segments_of(
    state: BucketState,
    members: Sequence[tuple[Segment, torch.Tensor]],
    rounded: torch.Tensor | None,
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
        rounded=None if rounded is None else [s.of(rounded) for s in segments],
    )


def _spread(
    state: BucketState,
    gradients: BucketGradients,
    segment: Segment,
    entries: GradientRows | None,
    how: Preparation,
) -> torch.Tensor:
    """Return the prepared gradient of a segment."""
    weight = segment.of(state.planes.master_weight)
    out = torch.zeros_like(weight)
    if entries is None:
        dense = gradients.segment_of(state, segment.row)
        prepare_dense(dense, weight, state.parameters[segment.position], how, out)
    else:
        table = out.view(-1, entries.values.shape[1])
        table.index_put_((entries.rows,), entries.values, accumulate=True)
    return out


def _update_rows(
    state: BucketState,
    segment: Segment,
    touched: GradientRows,
    hyper: Hyperparameters,
    step: int,
    rounded: torch.Tensor | None,
) -> None:
    """Update copies of the touched rows, each given once, and put them back."""
    if touched.rows.numel() == 0:
        return
    planes = state.planes
    targets = [planes.master_weight, planes.exp_avg, planes.exp_avg_sq]
    if rounded is not None:
        targets.append(rounded)
    tables = [segment.of(plane).view(-1, touched.values.shape[1]) for plane in targets]
    copies = [table[touched.rows] for table in tables]
    master, exp_avg, exp_avg_sq, *rest = [[copy.view(-1)] for copy in copies]
    foreach_update(
        DeviceSegments(
            [touched.values.reshape(-1)],
            master,
            exp_avg,
            exp_avg_sq,
            rounded=rest[0] if rest else None,
        ),
        once_prepared(hyper),
        step,
        1.0,
    )
    for table, copy in zip(tables, copies, strict=True):
        table.index_copy_(0, touched.rows, copy)
