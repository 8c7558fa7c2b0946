"""The scalars of a fused update: one row of float32 for each pair (group, step count) in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GRADIENT_SCALE, L2, BETA1, BETA1_REST, ONE_MINUS_BETA1 = 0, 1, 2, 3, 4
BETA2, BETA2_REST, ONE_MINUS_BETA2 = 5, 6, 7
DECAY, STEP_SIZE, MOMENT, FRESH, DENOMINATOR_SCALE, EPS = 8, 9, 10, 11, 12, 13
NUM_SCALARS = 14


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Hyperparameters of one parameter group as plain floats, validated by the optimizer."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    nesterov: bool
    maximize: bool
    epsilon_hat: bool = False


def scalar_row(hyper: Hyperparameters, step: int, gradient_scale: float) -> npt.NDArray[np.float32]:
    """Return the row of `NUM_SCALARS` float32 for the `step`-th update of a parameter.

    Every scalar is computed in float64 and rounded once. A beta is passed as the unevaluated sum of
    two float32, because 0.999 rounded to float32 changes the steady state of `exp_avg_sq` by a
    factor of 1 + 1.3e-5.

    Args:
        hyper: the group's hyperparameters.
        step: 1-based number of this update.
        gradient_scale: unscaling times clip factor, applied to every gradient element.

    Source: Kingma and Ba, "Adam", section 2 (bias correction folded into two scalars).
    """
    correction1 = 1.0 - hyper.beta1**step
    correction2 = math.sqrt(1.0 - hyper.beta2**step)
    row = np.zeros(NUM_SCALARS, dtype=np.float32)
    row[GRADIENT_SCALE] = -gradient_scale if hyper.maximize else gradient_scale
    row[L2] = 0.0 if hyper.decoupled_weight_decay else hyper.weight_decay
    row[BETA1], row[BETA1_REST] = _split(hyper.beta1)
    row[ONE_MINUS_BETA1] = 1.0 - hyper.beta1
    row[BETA2], row[BETA2_REST] = _split(hyper.beta2)
    row[ONE_MINUS_BETA2] = 1.0 - hyper.beta2
    row[DECAY] = hyper.lr * hyper.weight_decay if hyper.decoupled_weight_decay else 0.0
    row[STEP_SIZE] = hyper.lr * (correction2 if hyper.epsilon_hat else 1.0) / correction1
    row[MOMENT] = hyper.beta1 if hyper.nesterov else 1.0
    row[FRESH] = 1.0 - hyper.beta1 if hyper.nesterov else 0.0
    row[DENOMINATOR_SCALE] = 1.0 if hyper.epsilon_hat else 1.0 / correction2
    row[EPS] = hyper.eps
    return row


def _split(value: float) -> tuple[np.float32, np.float32]:
    """Return the float32 nearest to `value`, and the float32 nearest to the remainder."""
    high = np.float32(value)
    return high, np.float32(value - float(high))
