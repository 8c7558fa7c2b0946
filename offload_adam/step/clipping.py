"""Decide what a step does with its gradients: their scale, or a skip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offload_adam.coordinator.agreement import Agreement

_NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds this to the norm it divides by


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do with this step; the same on every one, computed from the agreement alone.

    gradient_scale: what the kernel multiplies gradients with, unscaling times clip factor.
    """

    skip: bool
    total_norm: float
    clip_factor: float
    gradient_scale: float


def decide(agreement: Agreement, max_norm: float | None, factor: float = 1.0) -> Decision:
    """Turn the agreement into a scale or a skip, in float64.

    Args:
        factor: what gradients are to be multiplied by besides.

    Source: torch.nn.utils.clip_grad_norm_, for the factor max_norm / (norm + 1e-6), at most 1.
    """
    grad_scale = agreement.grad_scales[0]
    total_norm = math.sqrt(agreement.sum_of_squares) * abs(factor) / grad_scale
    if agreement.non_finite or agreement.found_inf or not math.isfinite(factor):
        return Decision(True, total_norm, 1.0, 0.0)
    clip_factor = 1.0 if max_norm is None else min(1.0, max_norm / (total_norm + _NORM_EPS))
    return Decision(False, total_norm, clip_factor, clip_factor * factor / grad_scale)
