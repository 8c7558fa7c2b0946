"""Norm and update of one bucket with state on a device, by torch's own operations in float64.

    segments   | w0 | w1 |   w2   |      w3      |      float32, or 16-bit gradients
                 |    |    |    |   gather a run of at most RUN_NUMEL elements
    row        |  w0, w1, part of w2  |                 float64: one operation for each term
                 |    |    |    |   scatter: the only rounding

The number of launches depends on the number of runs, not of tensors. The update never waits for the
device; the sum of squares waits once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.sparse import GradientRows
from offload_adam.gradients.whole import (
    needs_preparation,
    prepare_gradient,
)
from offload_adam.kernels.scalars import Hyperparameters, UpdateScalars, update_scalars
from offload_adam.layout.flat import Segment
from offload_adam.params.bucket import BucketState
from offload_adam.step.messages import UpdateInputs
from offload_adam.torch_private import foreach_copy

RUN_NUMEL = 1 << 20
"""Elements of a run: the temporaries of an update take 32 MiB, those of a sum of squares 8 MiB,
independent of the size of the model."""

_NUM_ROWS = 4  # gradient, weight and two moments

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class DeviceSegments:
    """Segments of one bucket that are updated with the same scalars; 1-d tensors on one device.

    gradients: of any floating dtype, only read.
    master_weights, exp_avgs, exp_avg_sqs: float32, updated in place.
    max_exp_avg_sqs: the same for amsgrad, else None.
    param_out: receive the 16-bit parameters; None if the master weights are the parameters.

    No two tensors may overlap.

    Raises:
        ValueError: the lists differ in length; or a tensor differs from its gradient in shape or
            device, or has the wrong dtype.
    """

    gradients: Tensors
    master_weights: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    max_exp_avg_sqs: Tensors | None = None
    param_out: Tensors | None = None

    def __post_init__(self) -> None:
        for name in ("gradients", "master_weights", "exp_avgs", "exp_avg_sqs"):
            self._check(name, getattr(self, name), name != "gradients")
        if self.max_exp_avg_sqs is not None:
            self._check("max_exp_avg_sqs", self.max_exp_avg_sqs, True)
        if self.param_out is not None:
            self._check("param_out", self.param_out, False)

    def _check(self, name: str, tensors: Tensors, is_state: bool) -> None:
        if len(tensors) != len(self.gradients):
            raise ValueError(
                f"{name} has {len(tensors)} tensors, but gradients has {len(self.gradients)}. Pass "
                "one tensor for each gradient."
            )
        for index, (tensor, gradient) in enumerate(zip(tensors, self.gradients, strict=True)):
            # Without this check, copy_() would silently broadcast a tensor of one element.
            if tensor.shape != (gradient.numel(),) or tensor.device != self.gradients[0].device:
                raise ValueError(
                    f"{name}[{index}] has shape {tuple(tensor.shape)} on {tensor.device}. It must "
                    f"be 1-d with {gradient.numel()} elements on {self.gradients[0].device}."
                )
            if not tensor.is_floating_point() or (is_state and tensor.dtype != torch.float32):
                allowed = "float32" if is_state else "a floating dtype"
                raise ValueError(f"{name}[{index}] is {tensor.dtype}. It must be {allowed}.")


@torch.no_grad()
def foreach_update(
    segments: DeviceSegments,
    hyper: Hyperparameters,
    step: int,
    gradient_scale: float,
    *,
    run_numel: int = RUN_NUMEL,
) -> None:
    """Apply one Adam update to all segments, in place.

    The formula is that of `kernels.adam`, in float64. Each stored value is rounded to float32 once,
    and is within 1 ULP of the exact result. An exception: if terms of opposite signs cancel to less
    than 2**-27 of their size, the float64 errors (a few 2**-53 of the terms) become visible. A
    16-bit parameter is the rounded master weight.

    The host kernel rounds to float32 at every operation, so it differs in two cases. Here, a moment
    below 2**-126 is kept if torch keeps denormals, and a square beyond the range of float32 becomes
    infinite only when it is stored.

    Args:
        segments: the tensors to update.
        hyper: hyperparameters of the segments' group.
        step: 1-based number of this update.
        gradient_scale: factor of every gradient element: clip factor / loss scale.
        run_numel: elements of a run.

    Raises:
        ValueError: `run_numel` is less than 1.

    Cost: 34 bytes of temporaries for each of `run_numel` elements; about 25 launches per run.
    Source: Kingma and Ba, "Adam", section 2; Dozat 2016; Loshchilov and Hutter for the decay.
    """
    scalars = update_scalars(hyper, step, gradient_scale)
    rows = _scratch(segments.gradients, _NUM_ROWS, run_numel)
    for run in _runs(segments.gradients, run_numel):
        _update_run(segments, run, scalars, rows)


@torch.no_grad()
def sum_of_squares(gradients: Tensors, *, run_numel: int = RUN_NUMEL) -> float:
    """Return the float64 sum of squares of 1-d tensors on one device, non-finite if an element is.

    Waits for the device once. No square overflows: that of float32's largest value is 1e77.
    """
    if not gradients:
        return 0.0
    row = _scratch(gradients, 1, run_numel)[0]
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for run in _runs(gradients, run_numel):
        total += _gather(gradients, run, row).square_().sum()
    return float(total)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Elements [start, end) of the tensor at `index`."""

    index: int
    start: int
    end: int


def _runs(tensors: Tensors, run_numel: int) -> Iterator[list[_Slice]]:
    """Cut the concatenated tensors into runs of `run_numel` elements; the last may be shorter."""
    if run_numel < 1:
        raise ValueError(f"run_numel is {run_numel}. It must be at least 1.")
    run: list[_Slice] = []
    left = run_numel
    for index, tensor in enumerate(tensors):
        start, numel = 0, tensor.numel()
        while start < numel:
            end = min(numel, start + left)
            run.append(_Slice(index, start, end))
            left -= end - start
            start = end
            if left == 0:
                yield run
                run, left = [], run_numel
    if run:
        yield run


def _scratch(tensors: Tensors, num_rows: int, run_numel: int) -> torch.Tensor:
    """Return uninitialised (num_rows, elements of a run) float64 on the tensors' device."""
    numel = min(run_numel, sum(tensor.numel() for tensor in tensors))
    device = tensors[0].device if tensors else None
    return torch.empty((num_rows, numel), dtype=torch.float64, device=device)


def _gather(tensors: Tensors, run: Sequence[_Slice], row: torch.Tensor) -> torch.Tensor:
    """Copy a run of the tensors into the row, without rounding, and return the filled part."""
    flat = row[: sum(part.end - part.start for part in run)]
    foreach_copy(_cut(flat, run), _pick(tensors, run))
    return flat


def _scatter(flat: torch.Tensor, tensors: Tensors, run: Sequence[_Slice]) -> None:
    """Copy a flat run back to the tensors, the reverse of `_gather`; rounds to their dtype."""
    foreach_copy(_pick(tensors, run), _cut(flat, run))


def _pick(tensors: Tensors, run: Sequence[_Slice]) -> list[torch.Tensor]:
    return [tensors[part.index][part.start : part.end] for part in run]


def _cut(flat: torch.Tensor, run: Sequence[_Slice]) -> list[torch.Tensor]:
    return list(flat.split([part.end - part.start for part in run]))


def _update_run(
    segments: DeviceSegments, run: Sequence[_Slice], scalars: UpdateScalars, rows: torch.Tensor
) -> None:
    """Update one run; `rows` hold its gradient, weight and moments."""
    g = _gather(segments.gradients, run, rows[0]).mul_(scalars.gradient_scale)
    w = _gather(segments.master_weights, run, rows[1])
    m = _gather(segments.exp_avgs, run, rows[2])
    v = _gather(segments.exp_avg_sqs, run, rows[3])
    if scalars.l2 != 0.0:
        g.add_(w, alpha=scalars.l2)
    m.mul_(scalars.beta1).add_(g, alpha=1.0 - scalars.beta1)
    infinite = v.isinf()
    v.mul_(scalars.beta2).addcmul_(g, g, value=1.0 - scalars.beta2)
    # An infinite second moment stays infinite. With beta2 = 0 the product above is NaN.
    v.masked_fill_(infinite, math.inf)
    _scatter(m, segments.exp_avgs, run)
    _scatter(v, segments.exp_avg_sqs, run)
    if scalars.nesterov:
        m.mul_(scalars.beta1).add_(g, alpha=1.0 - scalars.beta1)
    if segments.max_exp_avg_sqs is not None:
        # The gradient is no longer needed: reuse its row.
        largest = _gather(segments.max_exp_avg_sqs, run, rows[0])
        torch.maximum(v, largest, out=v)
        _scatter(v, segments.max_exp_avg_sqs, run)
    # m / inf is 0, but if m is infinite too the quotient is NaN.
    m.masked_fill_(v.isinf(), 0.0)
    denominator = v.sqrt_().mul_(scalars.denominator_scale).add_(scalars.eps)
    w.mul_(1.0 - scalars.decay).add_(m.div_(denominator), alpha=-scalars.step_size)
    _scatter(w, segments.master_weights, run)
    if segments.param_out is not None:
        masters = _pick(segments.master_weights, run)
        foreach_copy(_pick(segments.param_out, run), masters)


class DeviceUpdate:
    """Has the methods of `HostUpdate`, but runs torch's operations on the device.

    With replicated state every parameter is one segment. With sharded state the segments are those
    of this rank's shard.
    """

    def compile_for_accumulator(self, state: BucketState) -> None:
        """Do nothing: torch's operations read any dtype."""

    def allocate_for(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        """Do nothing: torch's caching allocator provides the temporaries."""

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        """Return the float64 sum of squares of the dense gradients, non-finite if one is."""
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
        """Return the positions of the bucket's parameters with a non-finite gradient."""
        found = _dense(state, gradients, gradients.readable)
        bad = [s.position for s, gradient in found if not torch.isfinite(gradient).all()]
        return np.array(bad, dtype=np.int64)

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        inputs: UpdateInputs,
        param_out: torch.Tensor | None,
    ) -> None:
        """Update the `active` parameters and count the step for them.

        Args:
            active: (n,) bool, by position in the bucket.
            param_out: receives the 16-bit parameters; None if the master is the parameter.
        """
        counts = inputs.count_step(state, active)
        prepared = active & needs_preparation(state, gradients)
        # Parameters of one group and step count share their scalars, and so one call.
        alike: dict[tuple[int, int], list[tuple[Segment, torch.Tensor]]] = defaultdict(list)
        for segment, gradient in _dense(state, gradients, active & ~prepared):
            key = int(state.groups[segment.position]), int(counts[segment.position])
            alike[key].append((segment, gradient))
        for (group, step), members in alike.items():
            segments = _segments_of(state, members, param_out)
            hyper = inputs.hyperparameters[group]
            foreach_update(segments, hyper, step, inputs.gradient_scale)
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
