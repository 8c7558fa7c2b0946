"""Gradients that must be worked on whole before the update: centralized ones, and sparse ones.

What is prepared is scaled and has its weight decay in it, in fp32: the update takes it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.sparse import GradientRows, sum_duplicates
from offload_adam.layout.flat import Segment
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_shape_of


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a gradient is prepared with.

    scale: unscaling times clip factor.
    weight_decay: L2, of the weight as it is before the update.
    centralized: the mean over all dimensions but the first is subtracted.
    """

    scale: float
    weight_decay: float
    centralized: bool


def needs_preparation(state: BucketState, gradients: BucketGradients) -> npt.NDArray[np.bool_]:
    """Return which of the bucket's parameters have a gradient that is prepared."""
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
    """Return a parameter's gradient in this rank's shard, scaled, decayed and centralized.

    Args:
        lazy: return a sparse gradient as rows, each once; such a shard has whole parameters.
        out: (segment.numel,) float32, which is overwritten and returned where the gradient is not
            lazy; None for new memory.

    Source: Yong et al., "Gradient Centralization" (2020).
    """
    weight = segment.of(state.planes.master_weight)
    entries = gradients.rows.get(segment.position)
    if entries is not None:
        if state.layout.world_size == 1:
            entries = _prepare_whole_rows(entries, weight, how)
        else:
            entries = _prepare_rows(entries, weight, segment, how)
        if lazy:
            return sum_duplicates(entries)
    out = torch.empty_like(weight) if out is None else out
    if entries is not None:
        table = out.zero_().view(-1, entries.values.shape[1])
        table.index_put_((entries.rows,), entries.values, accumulate=True)
        return out
    dense = gradients.segment_gradient(state, segment)
    out.copy_(dense).mul_(how.scale).add_(weight, alpha=how.weight_decay)
    if how.centralized:
        parameter = state.parameters[segment.position]
        shaped = in_shape_of(out, parameter)
        dims = tuple(range(1, parameter.dim()))
        # In float64, where no sum of finite gradients overflows.
        shaped.sub_(shaped.mean(dim=dims, keepdim=True, dtype=torch.float64))
    return out


def _prepare_rows(
    entries: GradientRows, weight: torch.Tensor, segment: Segment, how: Preparation
) -> GradientRows:
    """Return the elements of sparse entries that lie in a segment, as rows of width 1, decayed.

    Every entry decays its row, also where several entries have one row.

    Args:
        weight: (segment.numel,) float32.

    Returns:
        Offsets in the segment, with repetitions.
    """
    rows, values = entries
    columns = torch.arange(values.shape[1], dtype=rows.dtype, device=rows.device)
    offsets = (rows[:, None] * values.shape[1] + columns - segment.parameter_start).flatten()
    inside = (offsets >= 0) & (offsets < segment.numel)
    offsets = offsets[inside]
    scaled = values.flatten()[inside].float() * how.scale
    return GradientRows(offsets, scaled.add_(weight[offsets], alpha=how.weight_decay)[:, None])


def _prepare_whole_rows(
    entries: GradientRows, weight: torch.Tensor, how: Preparation
) -> GradientRows:
    """Return sparse entries of a parameter that this rank has whole, decayed and centralized.

    Args:
        weight: float32, all of the parameter's elements.
    """
    rows, values = entries
    decayed = values.float() * how.scale
    decayed.add_(weight.view(-1, values.shape[1])[rows], alpha=how.weight_decay)
    if how.centralized:
        decayed.sub_(decayed.mean(dim=1, keepdim=True, dtype=torch.float64))
    return GradientRows(rows, decayed)
