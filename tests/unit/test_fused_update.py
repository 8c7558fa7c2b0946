"""The update by torch's fused kernel against float64, by element, on CPU tensors.

A GPU's kernel rounds no more often. On a CPU, torch computes the first moment by another formula.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.step.foreach_update import LARGEST, DeviceSegments, foreach_update
from offload_adam.step.fused_update import (
    GRADIENT_LIMIT,
    FusedScalars,
    fused_scalars,
    fused_update,
)
from tests.support.device_segments import assert_within_bounds, copied, random_segments
from tests.support.dispatched import Dispatched
from tests.support.kernel_reference import ReferenceState, reference_update, round_to
from tests.unit.kernel_cases import MODES, hyperparameters

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scalars_of(hyper: Hyperparameters, step: int = 3, scale: float = 1.0) -> FusedScalars:
    scalars = fused_scalars(hyper, step, scale, 1e6)
    assert scalars is not None
    return scalars


FUSED_MODES = {
    "adam": MODES["adam"],
    "l2": MODES["l2"],
    "decoupled": MODES["decoupled"],
    "maximize": MODES["maximize"],
    "epsilon_hat": MODES["epsilon_hat"],
    "no momentum": MODES["no_momentum"],
    "lr 0": hyperparameters(lr=0.0, weight_decay=0.1, decoupled_weight_decay=True),
    "betas": hyperparameters(beta1=0.99, beta2=0.95, eps=1e-6, lr=0.03),
    "epsilon_hat, decoupled": hyperparameters(
        epsilon_hat=True, weight_decay=0.3, decoupled_weight_decay=True, lr=0.5
    ),
}


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("mode", FUSED_MODES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    numels=st.lists(st.sampled_from([0, 1, 5, 64, 301]), max_size=5),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([1, 2, 7, 1000, 100_000]),
    scale=st.sampled_from([1.0, -1.0, 0.37, 2.0**-16]),
    size=st.sampled_from([1.0, 1e-4, 1e-9, 1e-22]),
    run_numel=st.sampled_from([1, 7, 128, 1 << 20]),
)
def test_every_element_is_within_the_stated_bounds(
    seed: int,
    numels: list[int],
    dtype: torch.dtype,
    step: int,
    scale: float,
    size: float,
    run_numel: int,
    mode: str,
    amsgrad: bool,
) -> None:
    rng = np.random.default_rng(seed)
    before = random_segments(rng, [130, *numels], dtype, amsgrad=amsgrad, size=size)
    after = copied(before)
    fused_update(after, scalars_of(FUSED_MODES[mode], step, scale), run_numel=run_numel)
    assert_within_bounds(before, after, FUSED_MODES[mode], step, scale)
    for old, new in zip(before.gradients, after.gradients, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("param_out", "target"),
    [(torch.bfloat16, FloatFormat.BFLOAT16), (torch.float16, FloatFormat.FLOAT16)],
)
def test_the_16_bit_parameter_is_the_master_weight_rounded(
    param_out: torch.dtype, target: FloatFormat
) -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, (300, 5), torch.bfloat16, param_out=param_out)
    fused_update(segments, scalars_of(MODES["decoupled"]), run_numel=128)
    assert segments.param_out is not None
    for master, found in zip(segments.master_weights, segments.param_out, strict=True):
        np.testing.assert_array_equal(found.double(), round_to(master.double(), target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_many_steps_stay_close_to_float64_with_the_exact_betas(
    dtype: torch.dtype, beta2: float
) -> None:
    rng = np.random.default_rng(1)
    hyper = hyperparameters(beta2=beta2, weight_decay=0.1, decoupled_weight_decay=True)
    segments = random_segments(rng, (400,))
    for plane in (*segments.exp_avgs, *segments.exp_avg_sqs):
        plane.zero_()
    start = segments.master_weights[0].double().numpy()  # a copy
    state = ReferenceState(start, np.zeros(400), np.zeros(400))
    mean = rng.normal(0, 1, 400)
    for step in range(1, 3001):
        gradient = torch.from_numpy(mean + rng.normal(0, 1, 400)).to(dtype)
        given_now = DeviceSegments(
            [gradient], segments.master_weights, segments.exp_avgs, segments.exp_avg_sqs
        )
        fused_update(given_now, scalars_of(hyper, step, 0.3))
        reference_update(state, gradient.double().numpy(), hyper, step, 0.3)
    np.testing.assert_allclose(segments.exp_avg_sqs[0], state.exp_avg_sq, rtol=8e-6)
    np.testing.assert_allclose(segments.exp_avgs[0], state.exp_avg, rtol=0, atol=5e-7)
    # The CPU's kernel rounds 1 - lr * weight_decay to float32, by the same amount in each step.
    weight = np.maximum(np.abs(start), np.abs(state.master_weight))
    error = np.abs(segments.master_weights[0].double().numpy() - state.master_weight)
    moved = np.abs(state.master_weight - start)
    assert np.all(error <= 3000 * 2.0**-24 * (0.5 * weight + 2e-3) + 1e-5 * moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"nesterov": True},
        {"eps": 0.0},
        {"eps": 1e-16},
        {"lr": 100.0},
        {"lr": 1e-40},
        {"lr": 1e-300, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 1e-41},
        {"beta2": 0.0},
        {"beta1": 1e-42},
        {"beta2": 0.9999},  # the nearest float32 is 1.7e-4 of 1 - beta2 away
        {"beta2": 1.0 - 2.0**-30},
    ],
    ids=str,
)
def test_scalars_that_the_kernel_does_not_take_exactly_are_left_to_float64(
    changes: dict[str, Any],
) -> None:
    assert fused_scalars(hyperparameters(**changes), 3, 1.0, 1.0) is None


def test_gradients_that_may_overflow_are_left_to_float64() -> None:
    hyper = hyperparameters()
    assert fused_scalars(hyper, 3, 1.0, 1e18) is not None
    for largest in (1e19, math.inf, math.nan):
        assert fused_scalars(hyper, 3, 1.0, largest) is None
    assert fused_scalars(hyper, 3, 1e-39, 1.0) is None


@pytest.mark.parametrize("mode", ["adam", "l2", "decoupled"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("numel", [5, 64])  # single elements, vectors
def test_no_weight_becomes_nan(mode: str, amsgrad: bool, numel: int) -> None:
    """Extremes of everything that the host does not know."""
    rng = np.random.default_rng(0)
    extremes = np.array([0.0, 1e-45, -1e-38, 1.0, -1e19, 3.4e38, LARGEST, -LARGEST])
    for _ in range(50):
        w, m, v, largest = (torch.from_numpy(rng.choice(extremes, numel)).float() for _ in range(4))
        squares = [one.abs() for one in (v, largest)]
        for one in squares:
            one[rng.random(numel) < 0.3] = math.inf
        gradient = torch.from_numpy(rng.choice([0.0, 1.0, 1e-30, -GRADIENT_LIMIT / 2], numel))
        segments = DeviceSegments(
            [gradient.float()], [w], [m], [squares[0]], [squares[1]] if amsgrad else None
        )
        infinite = squares[0].isinf()
        fused_update(segments, scalars_of(MODES[mode]))
        for plane in (w, m, *squares):
            assert not bool(plane.isnan().any())
        assert bool(m.isfinite().all())
        assert bool(squares[0][infinite].isinf().all())


def test_weights_with_an_infinite_second_moment_only_decay() -> None:
    weight, exp_avg_sq = torch.ones(2), torch.tensor([math.inf, 1.0])
    segments = DeviceSegments([torch.ones(2)], [weight], [torch.ones(2)], [exp_avg_sq])
    other = copied(segments)
    fused_update(segments, scalars_of(MODES["decoupled"]))
    foreach_update(other, MODES["decoupled"], 3, 1.0)
    assert exp_avg_sq[0] == math.inf
    assert weight[0] == other.master_weights[0][0] == np.float32(1 - 1e-4)


def test_a_first_moment_that_overflows_can_be_read_by_the_fused_kernel() -> None:
    segments = DeviceSegments([torch.ones(2)], *([torch.ones(2)] for _ in range(3)))
    foreach_update(segments, MODES["adam"], 1, 1e45)
    assert segments.exp_avgs[0].tolist() == [LARGEST, LARGEST]
    assert segments.exp_avg_sqs[0].tolist() == [math.inf, math.inf]
    weight = segments.master_weights[0].clone()
    fused_update(segments, scalars_of(MODES["adam"]))
    assert torch.equal(segments.master_weights[0], weight)


@pytest.mark.parametrize(
    ("dtype", "scale", "mode", "launches", "nbytes"),
    [
        (torch.float32, 1.0, "decoupled", {"full": 1, "_fused_adamw_": 1}, 28),
        (
            torch.bfloat16,
            0.5,
            "decoupled",
            {"full": 1, "_foreach_copy_": 5, "mul_": 5, "_fused_adamw_": 5},
            28 + 6 + 8,
        ),
        (
            torch.bfloat16,
            1.0,
            "l2",
            {"full": 1, "_foreach_copy_": 5, "_foreach_add_": 5, "clamp_": 5, "_fused_adamw_": 5},
            28 + 6 + 12 + 8,
        ),
    ],
)
def test_few_launches_and_bytes_and_no_wait(
    dtype: torch.dtype, scale: float, mode: str, launches: dict[str, int], nbytes: int
) -> None:
    rng = np.random.default_rng(0)
    # 5 runs of 1,000 elements, with slices in steps of 4.
    segments = random_segments(rng, (2_497, 9, 2_477, 5), dtype)
    with Dispatched() as seen:
        fused_update(segments, scalars_of(MODES[mode], scale=scale), run_numel=1_000)
    assert seen.names == launches
    assert seen.num_waits == 0
    assert seen.largest_numel <= 1_000
    assert seen.nbytes / 4_988 == pytest.approx(nbytes, rel=0.01)


def test_float64_takes_many_times_the_bytes() -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, (5_000,), torch.bfloat16, param_out=torch.bfloat16)
    with Dispatched() as fused:
        fused_update(segments, scalars_of(MODES["decoupled"], scale=0.5))
    with Dispatched() as exact:
        foreach_update(segments, MODES["decoupled"], 3, 0.5)
    assert (fused.names.total(), round(fused.nbytes / 5_000)) == (5, 48)
    assert (exact.names.total(), round(exact.nbytes / 5_000)) == (24, 372)


def test_slices_in_the_scratch_start_at_multiples_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    def record(masters: Any, gradients: list[torch.Tensor], *_: Any, **__: Any) -> None:
        for one, master in zip(gradients, masters, strict=True):
            starts.extend(int(tensor.storage_offset()) for tensor in (one, master))

    monkeypatch.setattr("offload_adam.step.fused_update.fused_adamw", record)
    segments = random_segments(np.random.default_rng(0), (5, 30, 1, 77), torch.bfloat16)
    fused_update(segments, scalars_of(MODES["adam"]), run_numel=18)
    assert len(starts) > 8
    assert all(start % 4 == 0 for start in starts)


def test_without_segments_nothing_happens() -> None:
    scalars = scalars_of(MODES["adam"])
    fused_update(DeviceSegments([], [], [], []), scalars)
    fused_update(DeviceSegments(*([torch.zeros(0)] for _ in range(4))), scalars)


def test_the_betas_are_float32_and_so_are_their_corrections() -> None:
    hyper = hyperparameters()
    scalars = scalars_of(hyper, step=1)
    assert (scalars.beta1, scalars.beta2) == (float(np.float32(0.9)), float(np.float32(0.999)))
    rounded = replace(hyper, beta1=scalars.beta1, beta2=scalars.beta2)
    assert scalars == scalars_of(rounded, step=1)
    # One step moves a weight by lr, whatever the betas, because corrections are of the same betas.
    segments = DeviceSegments([torch.ones(4)], *([torch.zeros(4)] for _ in range(3)))
    fused_update(segments, scalars)
    expected = torch.full((4,), -1e-3)
    torch.testing.assert_close(segments.master_weights[0], expected, rtol=1e-6, atol=0)
