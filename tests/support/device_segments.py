"""Segments of state on a device, and the error bounds that `fused_update` states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.step.foreach_update import DeviceSegments
from tests.support.kernel_reference import ReferenceState, reference_update

Float64Array = npt.NDArray[np.float64]

UNIT = 2.0**-24
DENORMAL = 2.0**-148  # a few roundings of values below 2**-126
DENORMAL_CHANGE = 2.0**-97  # the same, divided by the smallest denominator


def random_segments(
    rng: np.random.Generator,
    numels: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    amsgrad: bool = False,
    param_out: torch.dtype | None = None,
    size: float = 1.0,
    device: str = "cpu",
) -> DeviceSegments:
    """Return segments whose values of every kind spread over many magnitudes around `size`."""

    def values(scale: float) -> list[torch.Tensor]:
        spread = (rng.normal(0, scale, n) * np.exp2(rng.integers(-8, 9, n)) for n in numels)
        return [torch.from_numpy(one).float().to(device) for one in spread]

    def squares() -> list[torch.Tensor]:
        return [one.square() for one in values(0.3 * size)]

    return DeviceSegments(
        [one.to(dtype) for one in values(size)],
        values(1.0),
        values(0.3 * size),
        squares(),
        squares() if amsgrad else None,
        None if param_out is None else [one.to(param_out) for one in values(1.0)],
    )


def copied(segments: DeviceSegments) -> DeviceSegments:
    lists = (getattr(segments, field.name) for field in fields(segments))
    return DeviceSegments(*(one and [tensor.clone() for tensor in one] for one in lists))


def wide(tensors: Sequence[torch.Tensor]) -> Float64Array:
    array: Float64Array = torch.cat(list(tensors)).double().cpu().numpy()
    return array


def assert_within_bounds(
    before: DeviceSegments, after: DeviceSegments, hyper: Hyperparameters, step: int, scale: float
) -> None:
    """Compare one update with float64, with the betas rounded to float32.

    Terms of opposite signs may cancel, so errors are relative to the terms' absolute values.
    """
    hyper = replace(
        hyper, beta1=float(np.float32(hyper.beta1)), beta2=float(np.float32(hyper.beta2))
    )
    largest = before.max_exp_avg_sqs
    state = ReferenceState(
        wide(before.master_weights),
        wide(before.exp_avgs),
        wide(before.exp_avg_sqs),
        None if largest is None else wide(largest),
    )
    reference_update(state, wide(before.gradients), hyper, step, scale)
    l2, decay = hyper.weight_decay, hyper.lr * hyper.weight_decay
    l2, decay = (0.0, decay) if hyper.decoupled_weight_decay else (l2, 0.0)
    assert decay <= 0.25
    weight = np.abs(wide(before.master_weights))
    gradient = np.abs(wide(before.gradients) * scale) + l2 * weight
    first = hyper.beta1 * np.abs(wide(before.exp_avgs)) + (1 - hyper.beta1) * gradient
    second = hyper.beta2 * wide(before.exp_avg_sqs) + (1 - hyper.beta2) * gradient**2
    check("exp_avg", after.exp_avgs, state.exp_avg, 7 * UNIT * first + DENORMAL)
    bound = 11 * UNIT * second + DENORMAL
    check("exp_avg_sq", after.exp_avg_sqs, state.exp_avg_sq, bound)
    denominator = state.exp_avg_sq
    if after.max_exp_avg_sqs is not None and state.max_exp_avg_sq is not None:
        denominator = state.max_exp_avg_sq
        check("max_exp_avg_sq", after.max_exp_avg_sqs, denominator, bound)
    correction1, correction2 = 1 - hyper.beta1**step, np.sqrt(1 - hyper.beta2**step)
    # The largest change that rounding the root's terms allows.
    eps = hyper.eps * (1.0 if hyper.epsilon_hat else correction2)
    lr = hyper.lr * correction2 / correction1
    change = lr * first / (np.sqrt(denominator) + eps)
    least = np.sqrt(np.maximum(denominator - bound, 0.0)) + eps
    bound = UNIT * (3 * weight + 20 * change) + DENORMAL_CHANGE
    if l2 > 0.0:  # g**2, and so the denominator, may be far less than its terms
        bound = bound + lr * first / least - change
    check("master_weight", after.master_weights, state.master_weight, bound)


def check(
    name: str, tensors: Sequence[torch.Tensor], expected: Float64Array, bound: Float64Array
) -> None:
    """Compare each element."""
    error = np.abs(wide(tensors) - expected)
    worst = int(np.argmax(error - bound)) if error.size else 0
    assert np.all(error <= bound), (name, error[worst], bound[worst], expected[worst])
