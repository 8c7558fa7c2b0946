"""The update in float64, slow and simple: tests compare the kernels and the benchmarks with it.

It shares only the names of the hyperparameters with the kernels, and follows torch's formulas line
by line, so that no mistake is common to both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import Hyperparameters

Float64Array = npt.NDArray[np.float64]


@dataclass
class ReferenceState:
    """State of one parameter; float64 arrays of one shape, `max_exp_avg_sq` for amsgrad only."""

    master_weight: Float64Array
    exp_avg: Float64Array
    exp_avg_sq: Float64Array
    max_exp_avg_sq: Float64Array | None = None


def reference_update(
    state: ReferenceState,
    gradient: npt.NDArray[np.floating],
    hyper: Hyperparameters,
    step: int,
    gradient_scale: float = 1.0,
) -> None:
    """Apply one update in place.

    Args:
        state: read and replaced.
        gradient: as the kernel gets it; widened to float64 here.
        hyper: hyperparameters.
        step: 1-based count of updates that this one completes.
        gradient_scale: unscaling times clip factor.

    Source: torch.optim, `_single_tensor_adam`; Dozat 2016 for the Nesterov momentum, with a
    constant beta1; Kingma and Ba, section 2, for `epsilon_hat`.
    """
    weight = state.master_weight
    grad = gradient.astype(np.float64) * gradient_scale
    if hyper.maximize:
        grad = -grad
    if hyper.decoupled_weight_decay:
        weight = weight * (1 - hyper.lr * hyper.weight_decay)
    else:
        grad = grad + hyper.weight_decay * weight
    state.exp_avg = hyper.beta1 * state.exp_avg + (1 - hyper.beta1) * grad
    state.exp_avg_sq = hyper.beta2 * state.exp_avg_sq + (1 - hyper.beta2) * grad * grad
    second = state.exp_avg_sq
    if state.max_exp_avg_sq is not None:
        second = state.max_exp_avg_sq = np.maximum(state.max_exp_avg_sq, second)
    first = state.exp_avg
    if hyper.nesterov:
        first = hyper.beta1 * first + (1 - hyper.beta1) * grad
    state.master_weight = weight - _change(first, second, hyper, step)


def _change(
    first: Float64Array, second: Float64Array, hyper: Hyperparameters, step: int
) -> Float64Array:
    """Return the amount to subtract from the weight, with epsilon in either of its two places."""
    correction1 = 1 - hyper.beta1**step
    correction2 = 1 - hyper.beta2**step
    if hyper.epsilon_hat:
        lr = hyper.lr * np.sqrt(correction2) / correction1
        change: Float64Array = lr * first / (np.sqrt(second) + hyper.eps)
    else:
        denominator = np.sqrt(second / correction2) + hyper.eps
        change = hyper.lr * (first / correction1) / denominator
    return change


_PRECISION = {
    FloatFormat.FLOAT32: (24, -126, 127),
    FloatFormat.BFLOAT16: (8, -126, 127),
    FloatFormat.FLOAT16: (11, -14, 15),
}
"""Significant bits, and the exponents of the smallest and of the largest normal number."""


def round_to(values: npt.ArrayLike, target: FloatFormat) -> Float64Array:
    """Round float64 values to the nearest of a format, ties to even, as float64.

    The value is scaled until the format's last place is 1, rounded to an integer, and scaled back;
    a value above the largest finite number becomes infinite.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        wide = np.asarray(values, dtype=np.float64)
    precision, lowest, highest = _PRECISION[target]
    _, exponent = np.frexp(wide)  # wide = mantissa * 2**exponent, 0.5 <= |mantissa| < 1
    last_place = np.maximum(exponent - 1, lowest) - (precision - 1)
    rounded = np.ldexp(np.rint(np.ldexp(wide, -last_place)), last_place)
    too_large = np.abs(rounded) >= np.ldexp(1.0, highest + 1)
    return np.where(np.isfinite(wide) & too_large, np.copysign(np.inf, wide), rounded)


def read_bits(carried: npt.NDArray[np.generic], source: FloatFormat) -> Float64Array:
    """Return the values of bits carried as `FloatFormat.bits_dtype`, exactly, as float64."""
    if source is FloatFormat.FLOAT16:
        return carried.view(np.float16).astype(np.float64)
    if source is FloatFormat.BFLOAT16:
        # bfloat16 is the upper half of a float32.
        return (carried.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return carried.astype(np.float64)


def carry(values: npt.ArrayLike, target: FloatFormat) -> npt.NDArray[np.generic]:
    """Round float64 values to a format and return its bits as `FloatFormat.bits_dtype`."""
    rounded = round_to(values, target)
    if target is FloatFormat.FLOAT16:
        return rounded.astype(np.float16).view(np.int16)
    narrow = rounded.astype(np.float32)
    if target is FloatFormat.BFLOAT16:
        return (narrow.view(np.uint32) >> 16).astype(np.uint16)
    return narrow
