"""Update of state on a device, by torch's own operations in float64.

    segments   | w0 | w1 |   w2   |      w3      |      float32, or 16-bit gradients
                 |    |    |    |   gather a run of at most RUN_NUMEL elements
    row        |  w0, w1, part of w2  |                 float64: one operation for each term
                 |    |    |    |   scatter: the only rounding

The number of launches depends on the number of runs, not of tensors. The update never waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offload_adam.kernels.scalars import Hyperparameters, UpdateScalars, update_scalars
from offload_adam.torch_private import foreach_copy

RUN_NUMEL = 1 << 20
"""Elements of a run: the temporaries take 42 MiB, independent of the size of the model."""

LARGEST = torch.finfo(torch.float32).max
"""What is stored for an infinite first moment; see `foreach_update`."""

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
    infinite only when it is stored. An infinite first moment is stored as the largest float32: its
    second moment is infinite, so no weight depends on it, and `fused_update` can read it.

    Args:
        segments: the tensors to update.
        hyper: hyperparameters of the segments' group.
        step: 1-based number of this update.
        gradient_scale: factor of every gradient element: clip factor / loss scale.
        run_numel: elements of a run.

    Raises:
        ValueError: `run_numel` is less than 1.

    Cost: 42 bytes of temporaries for each of `run_numel` elements; about 25 launches per run.
    Source: Kingma and Ba, "Adam", section 2; Dozat 2016; Loshchilov and Hutter for the decay.
    """
    scalars = update_scalars(hyper, step, gradient_scale)
    rows = _scratch(segments.gradients, _NUM_ROWS, run_numel)
    for run in runs_of(segments.gradients, run_numel):
        _update_run(segments, run, scalars, rows)


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [start, end) of the tensor at `index`."""

    index: int
    start: int
    end: int


def runs_of(tensors: Tensors, run_numel: int, pitch: int = 1) -> Iterator[list[Slice]]:
    """Cut the concatenated tensors into runs of `run_numel` elements; the last may be shorter.

    Args:
        pitch: of each tensor's length in a run, so that all slices start at a multiple of it.
    """
    if run_numel < 1:
        raise ValueError(f"run_numel is {run_numel}. It must be at least 1.")
    run_numel = padded(run_numel, pitch)
    run: list[Slice] = []
    left = run_numel
    for index, tensor in enumerate(tensors):
        start, numel = 0, tensor.numel()
        while start < numel:
            end = min(numel, start + left)
            run.append(Slice(index, start, end))
            left -= padded(end - start, pitch)
            start = end
            if left == 0:
                yield run
                run, left = [], run_numel
    if run:
        yield run


def padded(numel: int, pitch: int) -> int:
    """Return the next multiple of `pitch`."""
    return -(-numel // pitch) * pitch


def _scratch(tensors: Tensors, num_rows: int, run_numel: int) -> torch.Tensor:
    """Return uninitialised (num_rows, elements of a run) float64 on the tensors' device."""
    numel = min(run_numel, sum(tensor.numel() for tensor in tensors))
    device = tensors[0].device if tensors else None
    return torch.empty((num_rows, numel), dtype=torch.float64, device=device)


def _gather(tensors: Tensors, run: Sequence[Slice], row: torch.Tensor) -> torch.Tensor:
    """Copy a run of the tensors into the row, without rounding, and return the filled part."""
    flat = row[: sum(part.end - part.start for part in run)]
    foreach_copy(_cut(flat, run), pick(tensors, run))
    return flat


def _scatter(flat: torch.Tensor, tensors: Tensors, run: Sequence[Slice]) -> None:
    """Copy a flat run back to the tensors, the reverse of `_gather`; rounds to their dtype."""
    foreach_copy(pick(tensors, run), _cut(flat, run))


def pick(tensors: Tensors, run: Sequence[Slice]) -> list[torch.Tensor]:
    """Return a run's slices of the tensors, as views."""
    return [tensors[part.index][part.start : part.end] for part in run]


def _cut(flat: torch.Tensor, run: Sequence[Slice]) -> list[torch.Tensor]:
    return list(flat.split([part.end - part.start for part in run]))


def _update_run(
    segments: DeviceSegments, run: Sequence[Slice], scalars: UpdateScalars, rows: torch.Tensor
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
    _scatter(m.clamp(-LARGEST, LARGEST), segments.exp_avgs, run)
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
        masters = pick(segments.master_weights, run)
        foreach_copy(pick(segments.param_out, run), masters)
