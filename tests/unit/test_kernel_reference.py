"""The reference itself: against torch in float64, the specification's numbers, torch's rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from offload_adam.kernels.formats import FloatFormat
from tests.support.kernel_reference import (
    ReferenceState,
    carry,
    read_bits,
    reference_update,
    round_to,
)
from tests.unit.kernel_cases import hyperparameters

STEPS = 5


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
)
def test_the_reference_is_torchs_adam_in_float64(changes: dict[str, Any], amsgrad: bool) -> None:
    hyper = hyperparameters(**changes)
    rng = np.random.default_rng(0)
    weight, zero = rng.normal(size=50), np.zeros(50)
    state = ReferenceState(weight, zero, zero, zero if amsgrad else None)
    parameter = torch.tensor(weight, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], amsgrad=amsgrad, foreach=False, **changes)
    for step in range(1, STEPS + 1):
        gradient = rng.normal(size=50)
        reference_update(state, gradient, hyper, step)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(state.master_weight, parameter.detach().numpy(), rtol=1e-13)


def test_an_epsilon_hat_step_is_the_specifications() -> None:
    one = np.ones(1)
    state = ReferenceState(np.zeros(1), one, one)
    reference_update(state, one, hyperparameters(epsilon_hat=True), step=1)
    assert state.master_weight[0] == pytest.approx(-0.000316228, rel=1e-6)


def test_nesterov_looks_one_step_ahead() -> None:
    zero = np.zeros(1)
    state = ReferenceState(zero, zero, zero)
    reference_update(state, np.ones(1), hyperparameters(nesterov=True, lr=1.0, eps=0.0), step=1)
    # m = 0.1; (0.9 * 0.1 + 0.1) / (1 - 0.9) = 1.9, over sqrt(0.001 / (1 - 0.999)) = 1.
    assert state.master_weight[0] == pytest.approx(-1.9)
    assert state.exp_avg[0] == pytest.approx(0.1)


@pytest.mark.parametrize("target", [FloatFormat.BFLOAT16, FloatFormat.FLOAT16])
def test_rounding_is_torchs(target: FloatFormat) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    ours = read_bits(carry(values, target), target)
    theirs = torch.from_numpy(values).to(getattr(torch, target.value)).double().numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_ties_go_to_even() -> None:
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 2.0**-134, 3 * 2.0**-134, -0.0]
    expected = [1, 1 + 2.0**-6, -1, 0, 2.0**-132, -0.0]
    rounded = round_to(values, FloatFormat.BFLOAT16)
    np.testing.assert_array_equal(rounded, expected)
    assert np.signbit(rounded[-1])
