"""Moments over many steps, and moments that have decayed into the denormals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from offload_adam.kernels import scalars as at
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import Hyperparameters
from tests.support.kernel_reference import ReferenceState, reference_update
from tests.unit.kernel_cases import (
    UNIT,
    HostState,
    Segment,
    hyperparameters,
    rows,
    run_update,
)

SMALLEST_NORMAL = 2.0**-126


def filled(numel: int, exp_avg: float, exp_avg_sq: float, *, largest: float) -> HostState:
    """Return the state of zero weights with these moments."""
    return HostState(
        np.zeros(numel, dtype=np.float32),
        np.full(numel, exp_avg, dtype=np.float32),
        np.full(numel, exp_avg_sq, dtype=np.float32),
        np.full(numel, largest, dtype=np.float32),
    )


def errors_after(num_steps: int, *, keep_rest: bool) -> npt.NDArray[np.float64]:
    """Return the errors of exp_avg_sq in units of 2**-24 after steps of one constant gradient."""
    rng = np.random.default_rng(0)
    gradient = rng.uniform(0.5, 2, 1000).astype(np.float32)
    hyper, zero = hyperparameters(), np.zeros(1000)
    state = HostState(*np.zeros((3, 1000), dtype=np.float32))
    reference = ReferenceState(zero, zero, zero)
    for step in range(1, num_steps + 1):
        scalars = rows((hyper, step, 1.0))
        if not keep_rest:
            scalars[:, at.BETA2_REST] = 0.0
        run_update(state, [Segment(gradient, 0)], scalars, FloatFormat.FLOAT32, num_pieces=1)
        reference_update(reference, gradient, hyper, step)
    errors: npt.NDArray[np.float64] = (state.exp_avg_sq / reference.exp_avg_sq - 1) / UNIT
    return errors


def test_exp_avg_sq_keeps_to_the_reference_over_many_steps() -> None:
    # A step rounds by at most 1 unit; of 200 such, independent, the sum stays within sqrt(200) x 1.
    errors = errors_after(200, keep_rest=True)
    assert np.max(np.abs(errors)) < 15
    assert abs(np.mean(errors)) < 2


def test_a_beta_rounded_to_float32_would_not() -> None:
    # float32(0.999) is 1.3e-8 too large: after 200 steps the mean term has grown by about 22 units.
    assert np.mean(errors_after(200, keep_rest=False)) > 15


@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-127, SMALLEST_NORMAL - 2.0**-149])
def test_a_moment_below_the_smallest_normal_counts_as_zero(tiny: float) -> None:
    state = filled(200, tiny, tiny, largest=tiny)
    zeros = np.zeros(200, dtype=np.float32)
    scalars = rows((hyperparameters(eps=1e-30), 1, 1.0))
    run_update(state, [Segment(zeros, 0)], scalars, FloatFormat.FLOAT32)
    assert state.bits() == bytes(4 * 4 * 200)


def test_the_smallest_normal_moment_counts() -> None:
    state = filled(200, -SMALLEST_NORMAL, SMALLEST_NORMAL, largest=SMALLEST_NORMAL)
    zeros = np.zeros(200, dtype=np.float32)
    scalars = rows((hyperparameters(eps=1e-30), 1, 1.0))
    run_update(state, [Segment(zeros, 0)], scalars, FloatFormat.FLOAT32)
    assert np.all(state.exp_avg < 0)
    assert np.all(state.exp_avg_sq > 0)
    assert np.all(state.master > 0)
    assert state.max_exp_avg_sq is not None
    assert np.all(state.max_exp_avg_sq == np.float32(SMALLEST_NORMAL))


def weight_change(hyper: Hyperparameters, moment: float) -> tuple[float, float]:
    """Return how one update with a zero gradient moves a zero weight: kernel's, reference's."""
    state = filled(1, moment, 0.0, largest=0.0)
    reference = state.reference(0, 1)
    zero = np.zeros(1, dtype=np.float32)
    run_update(state, [Segment(zero, 0)], rows((hyper, 1, 1.0)), FloatFormat.FLOAT32)
    reference_update(reference, zero, hyper, 1)
    return float(state.master[0]), float(reference.master_weight[0])


@pytest.mark.parametrize("moment", [1.5e-38, 1e-36, 1e-20])
def test_a_small_moment_loses_no_bits_to_the_step_size(moment: float) -> None:
    # Were it scaled by a step size of 1e-4 before the division, 1.5e-38 would keep 10 bits.
    kernel, reference = weight_change(hyperparameters(lr=1e-5, eps=1e-30), moment)
    assert kernel == pytest.approx(reference, rel=8 * UNIT, abs=0)
