"""What a loss scaler, or the caller in its place, has set on an optimizer before a step."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch

from offload_adam.torch_private import found_inf_flags


class LossScale(NamedTuple):
    """What gradients are divided by, and whether one that is not finite has been seen (not 0)."""

    grad_scale: float
    found_inf: float


def read_loss_scale(optimizer: object, *, gradients_leave: bool) -> LossScale:
    """Read `grad_scale` and `found_inf` as set by a GradScaler; default to 1 and 0.

    A GradScaler hands over the sum of its checks. Where gradients have left `.grad` there are none:
    the sum is the int 0, and no tensor, and its `unscale_` has unscaled nothing.

    Raises:
        ValueError: a scale that cannot be one; a GradScaler that saw no gradient.
    """
    scale = getattr(optimizer, "grad_scale", 1.0)
    found_inf = getattr(optimizer, "found_inf", None)
    blind = type(found_inf) is int and found_inf == 0 and isinstance(scale, torch.Tensor | None)
    if gradients_leave and blind:
        raise ValueError(
            "a GradScaler reads .grad, which gradients leave during backward here: make the "
            "optimizer without module=, or scale the loss yourself and set grad_scale, and "
            "found_inf as a float or a tensor (a gradient that is not finite is noticed anyway)"
        )
    grad_scale = 1.0 if scale is None else float(scale)
    if not (math.isfinite(grad_scale) and grad_scale > 0.0):
        raise ValueError(f"grad_scale must be finite and above 0, not {grad_scale}")
    return LossScale(grad_scale, 0.0 if found_inf is None else float(found_inf))


def report_skip(optimizer: torch.optim.Optimizer) -> None:
    """Tell the GradScaler that called `step()`, if one did, that all ranks skipped this step.

    A GradScaler has seen only this rank's `.grad`. It misses an overflow on another rank, and one
    that arose in the sum over ranks. Its `update()` would then grow the scale of this rank alone,
    or of all ranks into the next overflow.

    It passes no reference to itself, and a new tensor as `found_inf`. So look for its `step` among
    the callers and set the flags that its `update()` reads. Skipped steps alone pay for this.
    """
    frame = inspect.currentframe()
    while frame is not None:
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            for found_inf in found_inf_flags(scaler, optimizer):
                found_inf.fill_(1.0)
            return
        frame = frame.f_back
