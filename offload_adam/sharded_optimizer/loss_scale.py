"""Read what a GradScaler or the caller set on an optimizer, and report skipped steps back."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch

from offload_adam.torch_private import found_inf_flags


class LossScale(NamedTuple):
    """The loss scale of one step.

    grad_scale: gradients are divided by it.
    found_inf: not 0 if the scaler saw a non-finite gradient.
    """

    grad_scale: float
    found_inf: float


def read_loss_scale(optimizer: object, *, gradients_leave: bool) -> LossScale:
    """Read `grad_scale` and `found_inf` as set by a GradScaler; default to 1 and 0.

    Args:
        gradients_leave: gradients are moved out of `.grad` during backward.

    Raises:
        ValueError: the scale is not finite and above 0, or a GradScaler checked no gradient.
    """
    scale = getattr(optimizer, "grad_scale", 1.0)
    found_inf = getattr(optimizer, "found_inf", None)
    # A GradScaler sets `found_inf` to the sum of its checks, one for each device with gradients. If
    # all gradients have left `.grad`, it checked none: the sum is the int 0, not a tensor.
    blind = type(found_inf) is int and found_inf == 0 and isinstance(scale, torch.Tensor | None)
    if gradients_leave and blind:
        raise ValueError(
            "A GradScaler found no gradients in .grad, because this optimizer moves them out "
            "during backward. Construct the optimizer without module=, or scale the loss yourself "
            "and set optimizer.grad_scale; steps with non-finite gradients are skipped anyway."
        )
    grad_scale = 1.0 if scale is None else float(scale)
    if not (math.isfinite(grad_scale) and grad_scale > 0.0):
        raise ValueError(f"grad_scale must be finite and above 0, not {grad_scale}")
    return LossScale(grad_scale, 0.0 if found_inf is None else float(found_inf))


def report_skip(optimizer: torch.optim.Optimizer) -> None:
    """Tell the GradScaler that called `step()`, if one did, that all ranks skipped this step.

    A GradScaler checks only this rank's `.grad`. It misses an overflow on another rank or in the
    sum over the ranks. Its `update()` would then not reduce the scale: the ranks' scales would
    differ, or the next step would overflow again on all ranks.

    Cost: a walk over the call stack, in skipped steps only.
    """
    # The scaler passes no reference to itself to `step()`, and never reads the tensor again that it
    # sets as `found_inf`. So find the scaler's `step` among the callers, and set the flags that its
    # `update()` reads.
    frame = inspect.currentframe()
    while frame is not None:
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            for found_inf in found_inf_flags(scaler, optimizer):
                found_inf.fill_(1.0)
            return
        frame = frame.f_back
