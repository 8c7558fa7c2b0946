"""Prepare centralized and sparse gradients for the kernel, which cannot read them directly.

A prepared gradient is fp32, already scaled, and includes weight decay: the update applies neither
again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.sparse import GradientRows, sum_duplicates
from offload_adam.layout.flat import Segment
from offload_adam.memory.planes import StatePlanes
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_shape_of


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a gradient is prepared.

    scale: factor of the gradient: 1 / loss scale times clip factor.
    weight_decay: L2 coefficient, applied to the weight before the update.
    centralized: subtract the mean over all dimensions but the first.
    """

    scale: float
    weight_decay: float
    centralized: bool


def needs_preparation(state: BucketState, gradients: BucketGradients) -> npt.NDArray[np.bool_]:
    """Return which parameters need `prepare_gradient`: (num parameters,) bool."""
    if not gradients.rows:
        return state.centralized
    needed = state.centralized.copy()
    needed[list(gradients.rows)] = True
    return needed


def prepare_gradient(
    state: BucketState,
    gradients: BucketGradients,
    segment: Segment,
    how: Preparation,
    *,
    lazy: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor | GradientRows:
    """Return this rank's segment of a gradient, scaled, with weight decay, and centralized.

    Args:
        lazy: return a sparse gradient as unique rows. The shard must have whole parameters.
        out: (segment.numel,) float32, overwritten and returned unless rows are returned; None for
            new memory.

    Source: Yong et al., "Gradient Centralization" (2020).
    """
    planes = state.planes
    entries = gradients.rows.get(segment.position)
    if entries is not None:
        if state.layout.world_size == 1:
            entries = _prepare_whole_rows(entries, planes, segment, how)
        else:
            # A shard may begin or end inside a row, so its elements become rows of width 1.
            entries = _prepare_rows(entries, planes, segment, how)
        if lazy:
            return sum_duplicates(entries)
    if out is None:
        device = planes.master_weight.device
        out = torch.empty(segment.numel, dtype=torch.float32, device=device)
    if entries is not None:
        table = out.zero_().view(-1, entries.values.shape[1])
        table.index_put_((entries.rows,), entries.values, accumulate=True)
        return out
    dense = gradients.segment_gradient(state, segment)
    out.copy_(dense).mul_(how.scale)
    if how.weight_decay != 0:  # split master weights have to be joined first
        out.add_(planes.master_of(segment), alpha=how.weight_decay)
    if how.centralized:
        parameter = state.parameters[segment.position]
        shaped = in_shape_of(out, parameter)
        dims = tuple(range(1, parameter.dim()))
        # In float64, because an fp32 sum of finite gradients may overflow.
        shaped.sub_(shaped.mean(dim=dims, keepdim=True, dtype=torch.float64))
    return out


def _prepare_rows(
    entries: GradientRows, planes: StatePlanes, segment: Segment, how: Preparation
) -> GradientRows:
    """Return a segment's elements of sparse entries, as rows of width 1, with weight decay.

    Weight decay is added once per entry, so several times to a repeated row.

    Returns:
        Rows are offsets in the segment, with repetitions.
    """
    rows, values = entries
    columns = torch.arange(values.shape[1], dtype=rows.dtype, device=rows.device)
    offsets = (rows[:, None] * values.shape[1] + columns - segment.parameter_start).flatten()
    inside = (offsets >= 0) & (offsets < segment.numel)
    offsets = offsets[inside]
    scaled = values.flatten()[inside].float()[:, None] * how.scale
    scaled.add_(planes.master_of(segment, offsets), alpha=how.weight_decay)
    return GradientRows(offsets, scaled)


def _prepare_whole_rows(
    entries: GradientRows, planes: StatePlanes, segment: Segment, how: Preparation
) -> GradientRows:
    """Return sparse entries of a whole parameter, with weight decay, and centralized."""
    rows, values = entries
    decayed = values.float() * how.scale
    decayed.add_(planes.master_of(segment, rows, values.shape[1]), alpha=how.weight_decay)
    if how.centralized:
        decayed.sub_(decayed.mean(dim=1, keepdim=True, dtype=torch.float64))
    return GradientRows(rows, decayed)
