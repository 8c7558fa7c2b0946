"""The scalars of one Adam update: in float64, and as the row of float32 that a kernel reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Indices into the row. A beta is the sum of two float32, BETA and BETA_REST: see `scalar_row`. The
# update's direction is MOMENT * m + FRESH * g, where m is the new first moment.
GRADIENT_SCALE, L2, BETA1, BETA1_REST, ONE_MINUS_BETA1 = 0, 1, 2, 3, 4
BETA2, BETA2_REST, ONE_MINUS_BETA2 = 5, 6, 7
DECAY, STEP_SIZE, MOMENT, FRESH, DENOMINATOR_SCALE, EPS = 8, 9, 10, 11, 12, 13
NUM_SCALARS = 14


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Hyperparameters of one parameter group as plain floats, validated by the optimizer.

    epsilon_hat: add `eps` to the root of the second moment before bias correction, as MindSpore
        does. If False, add it after bias correction, as torch does.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    nesterov: bool
    maximize: bool
    epsilon_hat: bool = False


@dataclass(frozen=True, slots=True)
class UpdateScalars:
    """The scalars of one update in float64; an element is updated by

    g = gradient_scale * g + l2 * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    n = beta1 * m + (1 - beta1) * g  if nesterov else  m
    w = w - decay * w - step_size * n / (denominator_scale * sqrt(v) + eps)

    With amsgrad, the last line uses the largest v so far.
    """

    gradient_scale: float
    l2: float
    beta1: float
    beta2: float
    decay: float
    step_size: float
    nesterov: bool
    denominator_scale: float
    eps: float


def update_scalars(hyper: Hyperparameters, step: int, gradient_scale: float) -> UpdateScalars:
    """Return the scalars for the `step`-th update of a parameter.

    Args:
        hyper: the group's hyperparameters.
        step: 1-based number of this update.
        gradient_scale: unscaling times clip factor, applied to every gradient element.

    Source: Kingma and Ba, "Adam", section 2 (bias correction folded into two scalars).
    """
    correction1 = 1.0 - hyper.beta1**step
    correction2 = math.sqrt(1.0 - hyper.beta2**step)
    decoupled = hyper.decoupled_weight_decay
    return UpdateScalars(
        gradient_scale=-gradient_scale if hyper.maximize else gradient_scale,
        l2=0.0 if decoupled else hyper.weight_decay,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        decay=hyper.lr * hyper.weight_decay if decoupled else 0.0,
        step_size=hyper.lr * (correction2 if hyper.epsilon_hat else 1.0) / correction1,
        nesterov=hyper.nesterov,
        denominator_scale=1.0 if hyper.epsilon_hat else 1.0 / correction2,
        eps=hyper.eps,
    )


def scalar_row(hyper: Hyperparameters, step: int, gradient_scale: float) -> npt.NDArray[np.float32]:
    """Return the row of `NUM_SCALARS` float32 for an update, each scalar rounded once.

    A beta is the sum of two float32, which the kernel never adds. With one float32, 0.999 would be
    rounded, and the steady state of `exp_avg_sq` would change by a factor of 1 + 1.3e-5.

    Args:
        hyper, step, gradient_scale: see `update_scalars`.
    """
    scalars = update_scalars(hyper, step, gradient_scale)
    row = np.zeros(NUM_SCALARS, dtype=np.float32)
    row[GRADIENT_SCALE] = scalars.gradient_scale
    row[L2] = scalars.l2
    row[BETA1], row[BETA1_REST] = _split(scalars.beta1)
    row[ONE_MINUS_BETA1] = 1.0 - scalars.beta1
    row[BETA2], row[BETA2_REST] = _split(scalars.beta2)
    row[ONE_MINUS_BETA2] = 1.0 - scalars.beta2
    row[DECAY] = scalars.decay
    row[STEP_SIZE] = scalars.step_size
    row[MOMENT] = scalars.beta1 if scalars.nesterov else 1.0
    row[FRESH] = 1.0 - scalars.beta1 if scalars.nesterov else 0.0
    row[DENOMINATOR_SCALE] = scalars.denominator_scale
    row[EPS] = scalars.eps
    return row


def _split(value: float) -> tuple[np.float32, np.float32]:
    """Return the float32 nearest to `value`, and the float32 nearest to the remainder."""
    high = np.float32(value)
    return high, np.float32(value - float(high))
