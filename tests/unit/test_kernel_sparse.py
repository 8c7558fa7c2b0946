"""The lazy update: touched rows as the dense kernel and as float64, the others as before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from offload_adam.kernels import sparse, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import Hyperparameters, scalar_row
from tests.support.kernel_reference import (
    Float64Array,
    ReferenceState,
    carry,
    read_bits,
    reference_update,
)
from tests.unit.kernel_cases import (
    MODES,
    CarriedArray,
    HostState,
    Segment,
    displaced,
    error_bounds,
    random_state,
    run_update,
)
from tests.unit.kernel_cases import rows as scalar_table

STEP, SCALE = 3, 0.37
NUM_ROWS = 40
WIDTHS = (1, 3, 64, 129)
PARAM_FORMATS = [None, FloatFormat.BFLOAT16, FloatFormat.FLOAT16]


def random_rows(rng: np.random.Generator, num_touched: int) -> npt.NDArray[np.int64]:
    """Return distinct rows of the table, in no order."""
    return rng.permutation(NUM_ROWS)[:num_touched].astype(np.int64)


def random_values(
    rng: np.random.Generator, num_touched: int, width: int, source: FloatFormat
) -> CarriedArray:
    return carry(rng.normal(0, 1, (num_touched, width)), source)


def run_rows(
    state: HostState,
    touched: npt.NDArray[np.int64],
    values: CarriedArray,
    hyper: Hyperparameters,
    source: FloatFormat,
    *,
    num_pieces: int = 2,
) -> None:
    threads.use_threads(2)
    sparse.update_rows(
        source,
        touched,
        values,
        values.shape[1],
        scalar_row(hyper, STEP, SCALE),
        state.master,
        None,
        state.exp_avg,
        state.exp_avg_sq,
        state.param_out,
        None,
        num_pieces,
    )


def reference_rows(
    state: ReferenceState,
    touched: npt.NDArray[np.int64],
    gradient: Float64Array,
    hyper: Hyperparameters,
) -> None:
    """Gather the touched rows, update them in float64, and put them back."""
    planes = [
        plane.reshape(NUM_ROWS, -1)
        for plane in (state.master_weight, state.exp_avg, state.exp_avg_sq)
    ]
    part = ReferenceState(*(plane[touched] for plane in planes))
    reference_update(part, gradient, hyper, STEP, SCALE)
    updated = (part.master_weight, part.exp_avg, part.exp_avg_sq)
    for plane, new in zip(planes, updated, strict=True):
        plane[touched] = new


def planes_by_row(state: HostState) -> list[CarriedArray]:
    planes: list[CarriedArray | None] = [
        state.master,
        state.exp_avg,
        state.exp_avg_sq,
        state.param_out,
    ]
    return [plane.reshape(NUM_ROWS, -1) for plane in planes if plane is not None]


@pytest.mark.parametrize("param_format", PARAM_FORMATS)
@pytest.mark.parametrize("source", FloatFormat)
def test_touched_rows_have_the_dense_kernels_bits_and_no_other_row_changes(
    source: FloatFormat, param_format: FloatFormat | None
) -> None:
    for number, (mode, hyper) in enumerate(MODES.items()):
        width = WIDTHS[number % len(WIDTHS)]
        rng = np.random.default_rng(number)
        touched = random_rows(rng, 17)
        values = random_values(rng, 17, width, source)
        before = random_state(rng, NUM_ROWS * width, param_format)
        if before.param_out is not None and param_format is not None:
            # The bits of untouched rows are to be told from those of a zero.
            before.param_out[:] = carry(rng.normal(0, 1, NUM_ROWS * width), param_format)
        dense, lazy = before.copied(), before.copied(offset=number % 2)
        whole = carry(rng.normal(0, 1, (NUM_ROWS, width)), source)
        whole[touched] = values
        table = scalar_table((hyper, STEP, SCALE))
        run_update(dense, [Segment(whole.reshape(-1), 0)], table, source)
        run_rows(lazy, touched, values, hyper, source)
        others = np.setdiff1d(np.arange(NUM_ROWS), touched)
        assert others.size == NUM_ROWS - 17
        states = (planes_by_row(state) for state in (before, dense, lazy))
        for old, expected, new in zip(*states, strict=True):
            assert new[touched].tobytes() == expected[touched].tobytes(), mode
            assert new[others].tobytes() == old[others].tobytes(), mode
            assert np.any(new[touched] != old[touched])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_element_is_within_its_error_bound(width: int, mode: str) -> None:
    rng = np.random.default_rng(width)
    touched = random_rows(rng, 9)
    values = random_values(rng, 9, width, FloatFormat.BFLOAT16)
    state = random_state(rng, NUM_ROWS * width, None)
    old = state.reference(0, state.master.size)
    expected = state.reference(0, state.master.size)
    gradient = read_bits(values, FloatFormat.BFLOAT16)
    reference_rows(expected, touched, gradient, MODES[mode])
    run_rows(state, touched, values, MODES[mode], FloatFormat.BFLOAT16)
    whole = np.zeros((NUM_ROWS, width))
    whole[touched] = gradient
    bounds = error_bounds(old, expected, whole.reshape(-1), MODES[mode], STEP, SCALE)
    assert np.all(np.abs(state.master - expected.master_weight) <= bounds.master)
    assert np.all(np.abs(state.exp_avg - expected.exp_avg) <= bounds.exp_avg)
    assert np.all(np.abs(state.exp_avg_sq - expected.exp_avg_sq) <= bounds.exp_avg_sq)


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 7, 64])
def test_no_bit_depends_on_the_number_of_pieces_or_the_order_of_the_rows(num_pieces: int) -> None:
    rng = np.random.default_rng(0)
    touched = random_rows(rng, 13)
    values = random_values(rng, 13, 33, FloatFormat.FLOAT16)
    before = random_state(rng, NUM_ROWS * 33, FloatFormat.BFLOAT16)
    one, many = before.copied(), before.copied()
    hyper, source = MODES["together"], FloatFormat.FLOAT16
    run_rows(one, touched, values, hyper, source, num_pieces=1)
    order = np.argsort(touched)
    run_rows(many, touched[order], values[order], hyper, source, num_pieces=num_pieces)
    assert one.bits() != before.bits()
    assert many.bits() == one.bits()


@pytest.mark.parametrize("num_pieces", [1, 5])
def test_without_touched_rows_nothing_changes(num_pieces: int) -> None:
    rng = np.random.default_rng(0)
    state = random_state(rng, NUM_ROWS * 8, FloatFormat.FLOAT16)
    bits = state.bits()
    touched, values = random_rows(rng, 0), random_values(rng, 0, 8, FloatFormat.FLOAT32)
    run_rows(state, touched, values, MODES["l2"], FloatFormat.FLOAT32, num_pieces=num_pieces)
    assert state.bits() == bits


def test_the_first_and_the_last_row_stay_within_the_table() -> None:
    rng = np.random.default_rng(0)
    width = 5
    guarded = random_state(rng, (NUM_ROWS + 2) * width, None)
    before = guarded.copied()
    inside = slice(width, -width)
    table = HostState(guarded.master[inside], guarded.exp_avg[inside], guarded.exp_avg_sq[inside])
    touched = np.array([NUM_ROWS - 1, 0], dtype=np.int64)
    values = random_values(rng, 2, width, FloatFormat.FLOAT32)
    run_rows(table, touched, values, MODES["adam"], FloatFormat.FLOAT32)
    changed = np.flatnonzero((guarded.master != before.master).reshape(-1, width).any(axis=1))
    np.testing.assert_array_equal(changed, [1, NUM_ROWS])


def test_the_prepared_specialisation_is_the_one_that_runs() -> None:
    sparse.compile_kernel(FloatFormat.BFLOAT16, FloatFormat.BFLOAT16)
    compiled = len(sparse._update_touched.overloads)
    rng = np.random.default_rng(0)
    state = random_state(rng, NUM_ROWS * 4, FloatFormat.BFLOAT16)
    values = displaced(carry(rng.normal(0, 1, 8), FloatFormat.BFLOAT16), 1).reshape(2, 4)
    run_rows(state, random_rows(rng, 2), values, MODES["adam"], FloatFormat.BFLOAT16)
    assert len(sparse._update_touched.overloads) == compiled
