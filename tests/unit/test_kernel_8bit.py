"""The update of 8-bit state: codes, exponents, random bits and edge values, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from offload_adam.kernels import adam, adam_8bit_ir, adam_8bit_plain, adam_ir, codes
from offload_adam.kernels import scalars as at
from offload_adam.kernels.compilation import jit_inlined
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.random_keys import segment_keys
from offload_adam.kernels.scalars import Hyperparameters
from tests.support.kernel_reference import carry
from tests.unit import kernel_8bit_reference as reference
from tests.unit.kernel_8bit_reference import Place, decoded_avg, decoded_sq, master_of
from tests.unit.kernel_bf16_reference import bits_of, decoded
from tests.unit.kernel_cases import (
    KEY,
    MODES,
    HostState,
    Segment,
    displaced,
    hyperparameters,
    rows,
    run_update,
)

CodedFormat = Literal["mixed", "int8"]
FORMATS: list[CodedFormat] = ["mixed", "int8"]
MASTERS = [True, False]
"""Is the master split. A split one has bfloat16 gradients, the other float32 and a float16 copy."""

plain_range = jit_inlined(adam_8bit_plain.update_range)


def new_state(state_format: CodedFormat, weight: npt.NDArray[Any], *, split: bool) -> HostState:
    """Return the state before the first update."""
    numel = weight.size
    return HostState(
        carry(weight, FloatFormat.BFLOAT16) if split else weight.astype(np.float32),
        np.zeros(numel, dtype=np.uint16 if state_format == "mixed" else np.uint8),
        np.zeros(numel, dtype=np.uint8),
        param_out=None if split else carry(np.zeros(numel), FloatFormat.FLOAT16),
        remainder=np.zeros(numel, dtype=np.int8) if split else None,
        exponents=np.zeros((-(-numel // 128), 2), dtype=np.uint8),
    )


def gradient_format(state: HostState) -> FloatFormat:
    return FloatFormat.FLOAT32 if state.remainder is None else FloatFormat.BFLOAT16


def carried(gradient: npt.NDArray[Any], state: HostState) -> npt.NDArray[Any]:
    """Return a gradient in the format that is tested with this state."""
    return carry(gradient, gradient_format(state))


def widened(gradient: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return decoded(gradient) if gradient.dtype == np.uint16 else gradient.astype(np.float32)


def scales(beta2: float) -> Iterator[tuple[int, int]]:
    """Yield the bits of the scale and the shift of each update, as the host computes them."""
    scale = np.float32(1)
    while True:
        if beta2 == 0:
            yield int(np.float32(1).view(np.int32)), 60
            continue
        mantissa, exponent = np.frexp(scale * np.float32(beta2))
        scale = np.float32(2 * mantissa)
        yield int(scale.view(np.int32)), 1 - int(exponent)


def places(beta2: float, key: int = KEY, **columns: int) -> Iterator[Place]:
    """Yield the place of each update; the key changes."""
    for number, (bits, shift) in enumerate(scales(beta2)):
        yield Place(key + number, scale_bits=bits, shift=shift, **columns)


def update(
    state: HostState,
    gradient: npt.NDArray[Any],
    place: Place,
    hyper: Hyperparameters,
    step: int = 3,
    **options: Any,
) -> None:
    """Run the kernel in place on one segment; the gradient is carried already."""
    segment = Segment(gradient, 0, place=place.columns())
    table = rows((hyper, step, 1.0))
    run_update(state, [segment], table, gradient_format(state), **options)


def assert_same_bits(one: HostState, other: HostState, message: str = "") -> None:
    for field in fields(HostState):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            bits = f"u{a.itemsize}"
            np.testing.assert_array_equal(a.view(bits), b.view(bits), f"{message} {field.name}")


def trained_state(state_format: CodedFormat, numel: int, *, split: bool) -> tuple[HostState, Place]:
    """Return state after some updates, and the place of the next one."""
    rng = np.random.default_rng(numel)
    state = new_state(state_format, rng.normal(0, 1, numel), split=split)
    spread = np.exp(rng.normal(0, 1, numel))
    sequence = places(0.999)
    for step, place in zip(range(1, 21), sequence, strict=False):
        gradient = carried(rng.normal(0, 1, numel) * spread, state)
        update(state, gradient, place, hyperparameters(), step)
    return state, next(sequence)


@pytest.mark.parametrize("split", MASTERS)
@pytest.mark.parametrize("state_format", FORMATS)
def test_both_loops_compute_the_references_bits(state_format: CodedFormat, split: bool) -> None:
    rng = np.random.default_rng(7)
    numel = 1000
    gradients = rng.normal(0, 1, (15, numel)) * np.exp(rng.normal(0, 3, (15, numel)))
    gradients[:, 256:384] *= rng.random((15, 128)) > 0.97  # mostly zeros
    gradients[:4, 384:512], gradients[4:8, 384:512] = 0, 1e-20
    gradients[5:, 512:640] *= 1e-7  # a steep fall
    gradients[5:, 640:768] *= 1e7
    gradients[7:9, ::50] = 1e30
    gradients[:, 768:800] = -0.0
    start = new_state(state_format, rng.normal(0, 1, numel), split=split)
    modes = {**MODES, "no_memory": hyperparameters(beta2=0.0, beta1=0.999)}
    for mode, hyper in modes.items():
        ir, plain, expected = start.copied(offset=3), start.copied(), start.copied()
        where = {"first": 12345, "run": 300, "pitch": 1001, "local_start": 128}
        sequence = zip(gradients, places(hyper.beta2, **where), strict=False)
        for step, (values, place) in enumerate(sequence, 1):
            gradient = carried(values, start)
            (row,) = rows((hyper, step, 0.37))
            segment = Segment(gradient, 0, place=place.columns())
            run_update(ir, [segment], row[None], gradient_format(start), num_pieces=3)
            plain_range(
                gradient,
                plain.master,
                plain.remainder,
                plain.exp_avg,
                plain.exp_avg_sq,
                plain.param_out,
                plain.exponents,
                place.key,
                place.first,
                place.local_start,
                place.run,
                place.pitch,
                place.scale_bits,
                place.shift,
                row,
                None,
                0,
            )
            expected = reference.updated(expected, widened(gradient), row, place)
            assert_same_bits(ir, expected, f"{mode} {step}")
            assert_same_bits(plain, expected, f"{mode} {step} plain")
        assert np.all(np.isfinite(master_of(ir)))
        assert np.any(ir.master != start.master)


@pytest.mark.parametrize("numel", [1, 2, 127, 128, 129, 255, 256, 4101])
def test_lengths_alignments_and_pieces_change_no_bit(numel: int) -> None:
    rng = np.random.default_rng(numel)
    start, place = trained_state("int8", numel, split=True)
    gradient = carried(rng.normal(0, 1, numel), start)
    hyper = MODES["decoupled"]
    expected = reference.updated(start, widened(gradient), rows((hyper, 3, 1.0))[0], place)
    for num_pieces in range(1, 5):
        for offset in (0, 1, 5, 31):
            after = start.copied(offset)
            moved = displaced(gradient, 32 - offset)
            update(after, moved, place, hyper, num_pieces=num_pieces)
            assert_same_bits(after, expected, f"{num_pieces} {offset}")


@pytest.mark.parametrize("run", [1, 50, 128, 129, 300, 2000])
@pytest.mark.parametrize("state_format", FORMATS)
def test_segments_and_blocks_may_span_runs(state_format: CodedFormat, run: int) -> None:
    numel, cuts = 2000, [0, 128, 768, 1024, 2000]
    start, place = trained_state(state_format, numel, split=True)
    place = replace(place, first=77, run=run, pitch=run + 13, local_start=640)
    gradient = carried(np.random.default_rng(run).normal(0, 1, numel), start)
    table = rows((hyperparameters(), 3, 1.0))
    expected = reference.updated(start, widened(gradient), table[0], place)
    segments = [
        Segment(
            displaced(gradient[low:high], 3),
            low,
            place=replace(place, local_start=640 + low).columns(),
        )
        for low, high in itertools.pairwise(cuts)
    ]
    for num_pieces in (1, 3, 4):
        after = start.copied()
        run_update(after, segments, table, FloatFormat.BFLOAT16, num_pieces=num_pieces)
        assert_same_bits(after, expected, f"{num_pieces}")


def test_each_segment_has_its_own_place_and_the_padding_between_is_unchanged() -> None:
    numels, starts = [300, 1, 129, 1000], [0, 384, 512, 768]
    whole, place = trained_state("int8", 1792, split=True)
    rng = np.random.default_rng(0)
    after, expected, segments = whole.copied(), whole.copied(), []
    table = rows((hyperparameters(), 3, 1.0))
    for number, (numel, start) in enumerate(zip(numels, starts, strict=True)):
        own = replace(place, key=number, scale_bits=place.scale_bits + number, shift=number)
        gradient = carried(rng.normal(0, 1, numel), whole)
        segments.append(Segment(gradient, start, place=own.columns()))
        part, blocks = slice(start, start + numel), slice(start // 128, -(-(start + numel) // 128))
        assert whole.remainder is not None
        assert whole.exponents is not None
        assert expected.remainder is not None
        assert expected.exponents is not None
        before = HostState(
            whole.master[part],
            whole.exp_avg[part],
            whole.exp_avg_sq[part],
            remainder=whole.remainder[part],
            exponents=whole.exponents[blocks],
        )
        new = reference.updated(before, widened(gradient), table[0], own)
        expected.master[part], expected.remainder[part] = new.master, new.remainder
        expected.exp_avg[part], expected.exp_avg_sq[part] = new.exp_avg, new.exp_avg_sq
        assert new.exponents is not None
        expected.exponents[blocks] = new.exponents
    for num_pieces in (1, 2, 3, 5):
        after = whole.copied()
        run_update(after, segments, table, FloatFormat.BFLOAT16, num_pieces=num_pieces)
        assert_same_bits(after, expected, f"{num_pieces}")


def assert_unbiased(
    error: npt.NDArray[np.float64], variance: npt.NDArray[np.float64], name: str
) -> None:
    """Check errors (steps, elements) with these variances: in all, over steps, over elements."""
    num_steps = len(error)
    assert abs(error.sum()) < 4 * np.sqrt(num_steps * variance.sum()), name
    is_rounded = variance > 1e-3
    over_steps = (error.sum(axis=0) / np.sqrt(num_steps * np.maximum(variance, 1e-3)))[is_rounded]
    over_elements = error.sum(axis=1) / np.sqrt(variance.sum())
    for z in (over_steps, over_elements):
        # The squares of n standard normal numbers sum to n with a variance of 2 n.
        assert abs(np.sum(z**2) - z.size) < 4 * np.sqrt(2 * z.size), name
        assert np.max(np.abs(z)) < 5.5, name


@pytest.mark.parametrize("state_format", FORMATS)
def test_the_roundings_are_unbiased(state_format: CodedFormat) -> None:
    numel, num_steps = 2048, 400
    start, place = trained_state(state_format, numel, split=True)
    gradient = carried(np.random.default_rng(1).normal(0, 1, numel), start)
    hyper = hyperparameters(lr=0.01)
    exact = reference.unrounded(start, widened(gradient), rows((hyper, 3, 1.0))[0], place)
    keys = segment_keys(np.full(num_steps, 5, dtype=np.uint64), np.arange(num_steps))
    results: dict[str, list[npt.NDArray[np.float64]]] = {"v": [], "m": [], "w": []}
    for key in keys.tolist():
        after = start.copied()
        update(after, gradient, replace(place, key=key), hyper)
        results["v"].append(decoded_sq(after, place))
        results["m"].append(decoded_avg(after))
        results["w"].append(master_of(after).astype(np.float64))
    assert start.exponents is not None
    q = np.maximum(np.repeat(start.exponents[:, 1].astype(np.int64), 128) - place.shift, 63)
    scale = float(reference.float_of(place.scale_bits)) * np.exp2(q - 127.0)
    expected = {
        "v": exact.x.reshape(-1) * scale,
        "m": exact.m.reshape(-1).astype(np.float64),
        "w": exact.weight.reshape(-1).astype(np.float64),
    }
    for name, values in results.items():
        stacked, value = np.stack(values), expected[name]
        low, high = stacked.min(axis=0), stacked.max(axis=0)
        # A second moment below the smallest code has no neighbour on one side.
        # Other values have both neighbours among the results, unless they are close to one.
        inside = (low <= value) & (value <= high) & (high > low)
        assert np.mean(inside | np.isclose(low, value, rtol=2e-3)) > (
            0.98 if name == "v" else 0.999
        ), name
        spacing = (high - low)[inside]
        error = (stacked[:, inside] - value[inside]) / spacing
        share = ((value - low)[inside]) / spacing
        assert np.mean((stacked == low) | (stacked == high)) == 1, name
        assert_unbiased(error, share * (1 - share), name)


@pytest.mark.parametrize("state_format", FORMATS)
def test_moments_follow_the_exact_ones(state_format: CodedFormat) -> None:
    rng = np.random.default_rng(3)
    numel, beta1, beta2 = 4096, 0.97, 0.99
    hyper = hyperparameters(beta1=beta1, beta2=beta2)
    state = new_state(state_format, np.ones(numel), split=True)
    spread = np.exp(rng.normal(0, 1, numel))
    m, v = np.zeros(numel), np.zeros(numel)
    for step, place in zip(range(1, 301), places(beta2), strict=False):
        level = 1.0 if step < 150 else 0.1
        gradient = carried(rng.normal(0.3, 1, numel) * spread * level, state)
        update(state, gradient, place, hyper, step)
        g = widened(gradient).astype(np.float64)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    ratio = decoded_sq(state, place) / v
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(numel)
    assert ratio.std() < 0.25
    error = (decoded_avg(state) - m) / np.sqrt(v)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(numel)
    slope = np.sum(decoded_avg(state) * m / v) / np.sum(m * m / v)
    assert abs(slope - 1) < 0.02
    assert error.std() < (0.01 if state_format == "mixed" else 0.1)


@pytest.mark.parametrize("state_format", FORMATS)
def test_gradients_of_any_scale_move_weights_from_the_first_step_on(
    state_format: CodedFormat,
) -> None:
    levels = 10.0 ** np.arange(-12, 9)
    gradient = np.repeat(levels, 128)
    state = new_state(state_format, np.zeros(gradient.size), split=False)
    total = np.zeros(gradient.size)
    for step, place in zip(range(1, 11), places(0.999), strict=False):
        before = master_of(state).astype(np.float64)
        update(state, carried(gradient, state), place, hyperparameters(), step)
        change = before - master_of(state).astype(np.float64)
        expected = 1e-3 * gradient / (gradient + 1e-8)
        assert np.all(np.abs(change / expected - 1) < (0.02 if step == 1 else 0.4)), step
        total += change
    mean = (total / (10 * expected)).reshape(-1, 128).mean(axis=1)
    assert np.all(np.abs(mean - 1) < 0.03)


@pytest.mark.parametrize("split", MASTERS)
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("huge", [2.0**31, 1e30, -1e30, np.inf, -np.inf])
def test_a_huge_gradient_counts_as_0(state_format: CodedFormat, split: bool, huge: float) -> None:
    before, place = trained_state(state_format, 300, split=split)
    gradient = np.random.default_rng(0).normal(0, 1, 300)
    gradient[77] = 0
    expected, after = before.copied(), before.copied()
    update(expected, carried(gradient, before), place, hyperparameters())
    gradient[77] = huge
    update(after, carried(gradient, before), place, hyperparameters())
    assert_same_bits(after, expected)


def test_the_largest_gradient_that_counts_is_stored() -> None:
    state = new_state("int8", np.zeros(128), split=False)
    update(state, np.full(128, 2.0**30, dtype=np.float32), Place(KEY), hyperparameters())
    np.testing.assert_allclose(decoded_sq(state, Place(KEY)), 1e-3 * 2.0**60, rtol=0.13)
    np.testing.assert_allclose(decoded_avg(state), 0.1 * 2.0**30, rtol=0.07)


@pytest.mark.parametrize("split", MASTERS)
@pytest.mark.parametrize("state_format", FORMATS)
def test_weights_without_gradients_never_move(state_format: CodedFormat, split: bool) -> None:
    rng = np.random.default_rng(5)
    state = new_state(state_format, rng.normal(0, 1, 300), split=split)
    start = master_of(state)
    gradient = rng.normal(0, 1, 300)
    gradient[::2] = 0
    for step, place in zip(range(1, 31), places(0.9), strict=False):
        update(state, carried(gradient, state), place, hyperparameters(), step)
    moved = bits_of(master_of(state)) != bits_of(start)
    np.testing.assert_array_equal(moved, np.arange(300) % 2 == 1)
    assert not np.any(decoded_avg(state)[::2])


def test_without_a_step_every_finite_weight_of_24_bits_keeps_its_bits() -> None:
    high = np.repeat(np.arange(2**16, dtype=np.uint16), 2)
    low = np.random.default_rng(0).integers(-128, 128, high.size).astype(np.int8)
    low[::512], low[2::512], low[4::512] = -128, 127, 0
    # The remainder of zero has no negative values, and of infinity no positive ones.
    low[(high & 0x7FFF) == 0] = np.abs(low[(high & 0x7FFF) == 0] // 2)
    low[(high & 0x7FFF) == 0x7F80] = -1
    weight = reference.joined_24(high, low)
    finite = np.isfinite(weight)
    before = new_state("int8", np.zeros(int(finite.sum())), split=True)
    before.master, before.remainder = high[finite], low[finite]
    after = before.copied()
    update(after, carried(np.zeros(after.master.size), after), Place(KEY), hyperparameters(lr=0.0))
    np.testing.assert_array_equal(after.master, before.master)
    np.testing.assert_array_equal(after.remainder, before.remainder)


@pytest.mark.parametrize("split", MASTERS)
@pytest.mark.parametrize("state_format", FORMATS)
def test_nan_reaches_the_weight(state_format: CodedFormat, split: bool) -> None:
    state, place = trained_state(state_format, 300, split=split)
    gradient = np.ones(300)
    gradient[77] = np.nan
    for _ in range(2):
        update(state, carried(gradient, state), place, hyperparameters())
        is_nan = np.isnan(master_of(state))
        np.testing.assert_array_equal(np.flatnonzero(is_nan), [77])
        gradient[77] = 0  # it stays


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8001, 0x7FC0FFFF])
def test_a_nan_with_any_payload_is_stored_as_nan(bits: int) -> None:
    state, place = trained_state("int8", 300, split=True)
    table = rows((hyperparameters(), 3, 1.0))
    table[0, at.GRADIENT_SCALE] = np.uint32(bits).view(np.float32)
    segment = Segment(carried(np.ones(300), state), 0, place=place.columns())
    run_update(state, [segment], table, FloatFormat.BFLOAT16)
    assert np.all(np.isnan(decoded(state.master)))
    assert not np.any(state.remainder)


def test_nan_and_infinite_weights_stay_and_remainders_that_do_not_fit_count_as_0() -> None:
    state = new_state("int8", np.zeros(1024), split=True)
    assert state.remainder is not None
    state.master[:] = np.resize(
        np.array([0x7F81, 0xFF81, 0x7FFF, 0xFFFF, 0x7F80, 0xFF80, 0x8000, 0], np.uint16), 1024
    )
    state.remainder[:] = np.resize(np.arange(-128, 0, dtype=np.int8), 1024)
    before = state.copied()
    zeros = carried(np.zeros(1024), state)
    update(state, zeros, Place(KEY), hyperparameters(lr=0.0))
    for number in range(4):
        assert np.all(np.isnan(decoded(state.master[number::8])))
        assert not np.any(state.remainder[number::8])
    # With a negative remainder, infinity is a large number.
    assert np.all(np.isfinite(master_of(state)[4::8]))
    np.testing.assert_array_equal(state.master[5::8], before.master[5::8])
    np.testing.assert_array_equal(state.master[6::8], before.master[6::8])
    assert not np.any(state.remainder[6::8])


def test_a_small_second_moment_beside_a_large_one_is_not_0() -> None:
    state = new_state("int8", np.zeros(128), split=False)
    gradient = np.full(128, 1e-9)
    gradient[5] = 1e6
    total = np.zeros(128)
    for step, place in zip(range(1, 21), places(0.999), strict=False):
        update(state, carried(gradient, state), place, hyperparameters(eps=1e-30), step)
        total = np.abs(master_of(state).astype(np.float64))
        assert np.all(decoded_sq(state, place) > 0)
        # Small elements may move too little, but not too much.
        assert np.all(total < 1.05 * step * 1e-3)
    assert total[5] > 0.018


def test_the_scale_decays_the_second_moment_exactly() -> None:
    state, place = trained_state("int8", 1024, split=True)
    place = replace(place, scale_bits=0x3FC00000, shift=0)
    before = decoded_sq(state, place)
    zeros = carried(np.zeros(1024), state)
    # D = 1.5 times 0.25 is 0.375: the host multiplies it by 4.
    update(state, zeros, replace(place, shift=2), hyperparameters(beta2=0.25))
    np.testing.assert_array_equal(decoded_sq(state, place), before * 0.25)


def test_exponents_and_codes_have_limits() -> None:
    state, place = trained_state("int8", 128, split=True)
    zeros = carried(np.zeros(128), state)
    assert state.exponents is not None
    for _ in range(20):
        update(state, zeros, replace(place, shift=30), hyperparameters(beta1=0.0))
    assert state.exponents[0].tolist() == [codes.AVG_MIN_EXPONENT, codes.SQ_MIN_EXPONENT]
    assert not np.any(state.exp_avg % 128)


@pytest.mark.parametrize("state_format", FORMATS)
def test_without_beta2_the_second_moment_is_that_of_the_last_gradient(
    state_format: CodedFormat,
) -> None:
    state = new_state(state_format, np.zeros(256), split=False)
    hyper = hyperparameters(beta2=0.0)
    for step, (level, place) in enumerate(zip((1e3, 1e-3, 1.0, 1e-6), places(0.0), strict=False)):
        gradient = level * np.random.default_rng(step).uniform(0.5, 2, 256)
        update(state, carried(gradient, state), place, hyper, step + 1)
        np.testing.assert_allclose(decoded_sq(state, place), gradient**2, rtol=0.13)


@pytest.mark.parametrize("state_format", FORMATS)
def test_the_prepared_specialisation_is_the_one_that_runs(state_format: CodedFormat) -> None:
    adam.compile_kernel(FloatFormat.BFLOAT16, None, False, state_format, split_master=True)
    adam.compile_kernel(FloatFormat.FLOAT32, FloatFormat.FLOAT16, False, state_format)
    compiled = len(adam._update_segments.overloads)
    for split in MASTERS:
        state = new_state(state_format, np.zeros(128), split=split)
        update(state, carried(np.ones(128), state), Place(KEY), hyperparameters())
    assert len(adam._update_segments.overloads) == compiled


def test_the_chosen_loop_is_the_architectures() -> None:
    chosen = adam_8bit_ir if adam_ir.supports_ir() else adam_8bit_plain
    assert adam._8bit_range.py_func is chosen.update_range
