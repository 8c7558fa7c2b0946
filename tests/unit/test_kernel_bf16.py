"""The update of bfloat16 state: its codes, random bits and edge values, element by element."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from offload_adam.kernels import adam
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.random_keys import segment_keys
from tests.support.kernel_reference import carry
from tests.unit.kernel_bf16_reference import (
    bits_of,
    decoded,
    encoded,
    in_float32,
    joined,
    master_of,
    split,
)
from tests.unit.kernel_cases import (
    KEY,
    MODES,
    HostState,
    Segment,
    hyperparameters,
    low_precision_state,
    random_segments,
    rows,
    run_update,
)

STEP, SCALE = 3, 0.37
NUMEL = 1500
MASTERS = [(True, None), (False, None), (False, FloatFormat.FLOAT16)]
"""Is the master split, and the format of the parameter beside a float32 master."""

EDGES = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x18000, 0x7FFFFF, 0x800000, 0x807FFF]
EDGES += [0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]
NANS = [0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF]


def patterns(edges: list[int]) -> npt.NDArray[np.float32]:
    """Return floats with these bits and both signs."""
    positive = np.array(edges, dtype=np.uint32)
    return np.concatenate([positive, positive | np.uint32(1 << 31)]).view(np.float32)


def assert_same_bits(one: HostState, other: HostState, message: str = "") -> None:
    for field in fields(HostState):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            bits = f"u{a.itemsize}"
            np.testing.assert_array_equal(a.view(bits), b.view(bits), f"{message} {field.name}")


def zero_moments(weight: npt.NDArray[np.float32]) -> HostState:
    """Return state with a split master and moments that are 0."""
    high, low = split(weight)
    zeros = np.zeros(weight.size, dtype=np.uint16)
    return HostState(high, zeros, zeros.copy(), remainder=low)


def updated(state: HostState, gradient: npt.NDArray[Any], **changes: Any) -> HostState:
    """Return a copy after one update with a float32 gradient."""
    after = state.copied()
    segment = Segment(np.ascontiguousarray(gradient, dtype=np.float32), 0)
    table = rows((hyperparameters(**changes), STEP, 1.0))
    run_update(after, [segment], table, FloatFormat.FLOAT32)
    return after


@pytest.mark.parametrize(("is_split", "param_format"), MASTERS)
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_an_update_is_the_float32_kernels_rounded(
    gradient_format: FloatFormat, is_split: bool, param_format: FloatFormat | None
) -> None:
    for number, (mode, hyper) in enumerate(MODES.items()):
        rng = np.random.default_rng(number)
        segments = random_segments(rng, (NUMEL,), gradient_format, offset=number % 2)
        state = low_precision_state(rng, NUMEL, split=is_split, param_format=param_format)
        wide = in_float32(state)
        table = rows((hyper, STEP, SCALE))
        run_update(wide, segments, table, gradient_format)
        run_update(state, segments, table, gradient_format)
        assert_same_bits(state, encoded(wide, is_split, KEY, np.arange(NUMEL)), mode)


def test_without_a_step_every_finite_weight_keeps_its_bits() -> None:
    rng = np.random.default_rng(0)
    sample = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16 | np.uint32(0x8000)).view(np.float32)
    weight = np.concatenate([sample, ties, patterns(EDGES)])
    weight = weight[np.isfinite(weight)]
    before = zero_moments(weight)
    after = updated(before, np.zeros(weight.size), lr=0.0)
    assert_same_bits(after, before)
    np.testing.assert_array_equal(bits_of(master_of(after)), bits_of(weight))


def test_no_two_weights_share_a_split_and_ties_round_away_from_zero() -> None:
    rng = np.random.default_rng(1)
    start = zero_moments(rng.normal(0, 1, 100_000).astype(np.float32))
    after = updated(start, rng.normal(0, 1, 100_000), lr=0.3)
    weight = master_of(after)
    nearest = decoded(after.master)
    error = np.abs(nearest.astype(np.float64) - weight)
    last_place = np.ldexp(1.0, np.frexp(weight)[1] - 8)
    assert np.all(error <= last_place / 2)
    # A tie keeps the bits of this test's float32 weight: no update moves it.
    ties = patterns([0x3F808000, 0x3F818000, 0x00008000])
    stepped = updated(zero_moments(ties), np.zeros(ties.size), lr=0.0)
    assert np.all(np.abs(decoded(stepped.master)) > np.abs(ties))
    assert np.all(stepped.remainder == np.int16(-(2**15)))


def test_infinite_and_nan_weights_become_nan() -> None:
    # 0 * infinity in the decay is NaN, as in the float32 kernel.
    weight = np.concatenate([patterns(NANS), patterns([0x7F800000])])
    state = zero_moments(weight)
    assert state.remainder is not None
    # A model that has become NaN may have any remainders, and the smallest or largest payload.
    state.master[:-2] = np.resize(np.array([0x7F81, 0xFF81, 0x7FFF, 0xFFFF]), weight.size - 2)
    state.remainder[:-2] = np.resize(np.array([0, -1, 2**15 - 1, -(2**15)]), weight.size - 2)
    after = updated(state, np.zeros(weight.size))
    assert np.all(np.isnan(decoded(after.master)))
    assert after.remainder is not None
    assert not np.any(after.remainder)


def test_a_remainder_that_its_parameter_cannot_have_counts_as_0() -> None:
    """A user may set a weight to 0, whose sum with a negative remainder would be a NaN's bits."""
    state = zero_moments(np.zeros(200, dtype=np.float32))
    assert state.remainder is not None
    state.master[:100] = 0x8000
    state.remainder[:] = -np.arange(1, 201)
    after = updated(state, np.zeros(200), lr=0.0)
    np.testing.assert_array_equal(after.master, state.master)
    assert not np.any(after.remainder)


@pytest.mark.parametrize("gradient", [np.nan, np.inf])
def test_a_nan_from_the_gradient_reaches_the_parameter(gradient: float) -> None:
    state = zero_moments(np.ones(200, dtype=np.float32))
    gradients = np.zeros(200)
    gradients[77] = gradient
    after = updated(state, gradients)
    wide = in_float32(state)
    run_update(
        wide,
        [Segment(gradients.astype(np.float32), 0)],
        rows((hyperparameters(), STEP, 1.0)),
        FloatFormat.FLOAT32,
    )
    is_nan = np.isnan(wide.master)
    np.testing.assert_array_equal(np.isnan(decoded(after.master)), is_nan)
    np.testing.assert_array_equal(after.master[~is_nan], state.master[~is_nan])


def test_the_roundings_of_both_moments_are_unbiased_and_independent() -> None:
    rng = np.random.default_rng(2)
    numel, num_steps = 4096, 200
    start = low_precision_state(rng, numel, split=True)
    gradient = rng.normal(0, 1, numel).astype(np.float32)
    wide = in_float32(start)
    table = rows((hyperparameters(), STEP, 1.0))
    run_update(wide, [Segment(gradient, 0)], table, FloatFormat.FLOAT32)
    keys = segment_keys(
        np.full(num_steps, 99, dtype=np.uint64), np.arange(num_steps, dtype=np.int64)
    )
    errors = {"exp_avg": np.empty((num_steps, numel)), "exp_avg_sq": np.empty((num_steps, numel))}
    for step, key in enumerate(keys):
        after = start.copied()
        place = (int(key), 0, numel, numel, 0)
        run_update(after, [Segment(gradient, 0, place=place)], table, FloatFormat.FLOAT32)
        for name, error in errors.items():
            exact = getattr(wide, name)
            # Both neighbours have one sign, and the lower half of the bits is the distance to one.
            below = (bits_of(exact) >> 16).astype(np.uint16)
            last_place = decoded(below + np.uint16(1)).astype(np.float64) - decoded(below)
            error[step] = (decoded(getattr(after, name)) - exact.astype(np.float64)) / last_place
    standard = []
    for name, error in errors.items():
        dropped = (bits_of(getattr(wide, name)) & 0xFFFF) / 2.0**16
        variance = dropped * (1 - dropped)
        assert abs(error.sum()) < 4 * np.sqrt(num_steps * variance.sum()), name
        over_steps = error.sum(axis=0) / np.sqrt(num_steps * np.maximum(variance, 1e-3))
        over_elements = error.sum(axis=1) / np.sqrt(variance.sum())
        for z in (over_steps[variance > 1e-3], over_elements):
            # The squares of n standard normal numbers sum to n with a variance of 2 n.
            assert abs(np.sum(z**2) - z.size) < 4 * np.sqrt(2 * z.size), name
            assert np.max(np.abs(z)) < 5.5, name
        standard.append(error / np.sqrt(np.maximum(variance, 1e-3)))
    one, other = standard
    assert abs(np.sum(one * other)) < 4 * np.sqrt(one.size)


def test_a_first_moment_decays_also_if_beta1_is_near_1() -> None:
    """Rounded to nearest, a change by less than half of the spacing would be no change."""
    state = zero_moments(np.ones(4096, dtype=np.float32))
    state.exp_avg[:] = carry(
        np.random.default_rng(0).uniform(1, 2, 4096).astype(np.float32), FloatFormat.BFLOAT16
    )
    before = decoded(state.exp_avg).astype(np.float64)
    keys = segment_keys(np.full(500, 99, dtype=np.uint64), np.arange(500, dtype=np.int64))
    table = rows((hyperparameters(beta1=0.999), STEP, 1.0))
    for key in keys:
        place = (int(key), 0, 4096, 4096, 0)
        segment = Segment(np.zeros(4096, dtype=np.float32), 0, place=place)
        run_update(state, [segment], table, FloatFormat.FLOAT32)
    decay = float(np.mean(decoded(state.exp_avg) / before))
    # 500 roundings, each with a deviation of at most 2**-8, of 4096 elements.
    assert abs(decay / 0.999**500 - 1) < 4 * 2**-8 * np.sqrt(500 / 4096)


def test_infinite_moments_stay_infinite_and_their_weights_do_not_move() -> None:
    state = low_precision_state(np.random.default_rng(3), 300, split=True)
    state.exp_avg[:] = carry(np.full(300, -np.inf), FloatFormat.BFLOAT16)
    state.exp_avg_sq[:] = carry(np.full(300, np.inf), FloatFormat.BFLOAT16)
    after = updated(state, np.ones(300))
    assert_same_bits(after, state)


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38, 1e-30, 1e-20])
def test_tiny_gradients_and_moments_match_the_float32_kernel(tiny: float) -> None:
    state = low_precision_state(np.random.default_rng(4), 300, split=True)
    state.exp_avg[:100], state.exp_avg_sq[:100] = 0, 0
    denormal = np.arange(128)
    state.exp_avg[100:228], state.exp_avg_sq[100:228] = denormal, denormal
    state.exp_avg[100:228:2] |= 0x8000
    assert np.all(np.abs(decoded(state.exp_avg[:228])) < 2.0**-126)
    wide = in_float32(state)
    segment = Segment(np.full(300, tiny, dtype=np.float32), 0)
    table = rows((hyperparameters(eps=1e-30), STEP, 1.0))
    run_update(wide, [segment], table, FloatFormat.FLOAT32)
    run_update(state, [segment], table, FloatFormat.FLOAT32)
    assert_same_bits(state, encoded(wide, True, KEY, np.arange(300)))


def test_weights_without_gradients_never_move() -> None:
    before = zero_moments(np.random.default_rng(5).normal(0, 1, 300).astype(np.float32))
    after = before
    for _ in range(20):
        after = updated(after, np.zeros(300))
    assert_same_bits(after, before)


@pytest.mark.parametrize("exponent", [-126, -125, -60, 0])
def test_exp_avg_sq_does_not_round_to_zero(exponent: int) -> None:
    # beta2 = 1 - 2**-24 keeps the second moment near its value, just below it.
    state = low_precision_state(np.random.default_rng(6), 2000, split=True)
    state.exp_avg_sq[:] = carry(np.full(2000, 2.0**exponent), FloatFormat.BFLOAT16)
    state.exp_avg[:] = 0
    after = updated(state, np.full(2000, 2.0 ** (exponent / 2)), beta2=1 - 2.0**-24, eps=1e-30)
    assert np.all(after.exp_avg_sq >= state.exp_avg_sq - 1)
    assert np.all(after.exp_avg_sq > 0)


def test_joined_weights_are_the_values_of_both_halves() -> None:
    # Pins the reference of this file to numbers.
    high = np.array([0x3F80, 0x3F80, 0x3F81, 0xBF80, 0x7F80], dtype=np.uint16)
    low = np.array([0, 1, -(2**15), -1, -1], dtype=np.int16)
    largest = float(np.finfo(np.float32).max)
    expected = [1, 1 + 2.0**-23, 1 + 2.0**-8, -(1 - 2.0**-24), largest]
    np.testing.assert_array_equal(joined(high, low), np.array(expected, dtype=np.float32))


def test_the_prepared_specialisation_is_the_one_that_runs() -> None:
    adam.compile_kernel(FloatFormat.FLOAT32, None, False, "bf16", True)
    compiled = len(adam._update_segments.overloads)
    state = low_precision_state(np.random.default_rng(0), 128, split=True)
    updated(state, np.ones(128))
    assert len(adam._update_segments.overloads) == compiled
