"""The update against the float64 reference: every mode, gradient format and parameter format."""

from __future__ import annotations

import numpy as np
import pytest

from offload_adam.kernels import adam
from offload_adam.kernels.formats import FloatFormat
from tests.support.kernel_reference import carry, read_bits, reference_update
from tests.unit.kernel_cases import (
    MODES,
    HostState,
    Segment,
    error_bounds,
    hyperparameters,
    random_segments,
    random_state,
    rows,
    run_update,
    shard_numel,
)

NUMELS = (0, 1, 127, 128, 129, 0, 1000, 3, 4096, 517)
STEP, SCALE = 3, 0.37


def assert_close(before: HostState, after: HostState, segment: Segment, mode: str) -> None:
    """Compare one segment with the reference, element by element."""
    start, end = segment.start, segment.end
    hyper, source = MODES[mode], _format_of(segment)
    gradient = read_bits(segment.gradient, source)
    old, new = before.reference(start, end), before.reference(start, end)
    reference_update(new, gradient, hyper, STEP, SCALE)
    bounds = error_bounds(old, new, gradient, hyper, STEP, SCALE)
    kernel = after.reference(start, end)
    assert np.all(np.abs(kernel.exp_avg - new.exp_avg) <= bounds.exp_avg)
    assert np.all(np.abs(kernel.exp_avg_sq - new.exp_avg_sq) <= bounds.exp_avg_sq)
    assert np.all(np.abs(kernel.master_weight - new.master_weight) <= bounds.master)
    if kernel.max_exp_avg_sq is not None and new.max_exp_avg_sq is not None:
        assert np.all(np.abs(kernel.max_exp_avg_sq - new.max_exp_avg_sq) <= bounds.exp_avg_sq)


def _format_of(segment: Segment) -> FloatFormat:
    return next(one for one in FloatFormat if one.bits_dtype == segment.gradient.dtype)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("param_format", [None, FloatFormat.BFLOAT16, FloatFormat.FLOAT16])
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_every_element_is_within_its_error_bound(
    gradient_format: FloatFormat, param_format: FloatFormat | None, amsgrad: bool
) -> None:
    for number, mode in enumerate(MODES):
        rng = np.random.default_rng(number)
        # The odd modes read gradients that lie one element behind a boundary.
        segments = random_segments(rng, NUMELS, gradient_format, offset=number % 2)
        before = random_state(rng, shard_numel(segments), param_format, amsgrad=amsgrad)
        after = before.copied(offset=number % 2)
        run_update(after, segments, rows((MODES[mode], STEP, SCALE)), gradient_format)
        for segment in segments:
            assert_close(before, after, segment, mode)
            if param_format is not None and after.param_out is not None:
                written = after.param_out[segment.start : segment.end]
                expected = carry(after.master[segment.start : segment.end], param_format)
                np.testing.assert_array_equal(written, expected)


def test_nothing_between_the_segments_is_touched() -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, (1, 127, 300), FloatFormat.BFLOAT16)
    before = random_state(rng, shard_numel(segments), FloatFormat.BFLOAT16)
    after = before.copied()
    run_update(after, segments, rows((MODES["l2"], STEP, SCALE)), FloatFormat.BFLOAT16)
    outside = np.ones(before.master.size, dtype=bool)
    for segment in segments:
        outside[segment.start : segment.end] = False
    assert outside.sum() == 127 + 1 + 84
    np.testing.assert_array_equal(after.master[outside], before.master[outside])
    np.testing.assert_array_equal(after.exp_avg[outside], before.exp_avg[outside])
    np.testing.assert_array_equal(after.exp_avg_sq[outside], before.exp_avg_sq[outside])
    assert before.param_out is not None
    assert after.param_out is not None
    np.testing.assert_array_equal(after.param_out[outside], before.param_out[outside])


def test_each_segment_takes_its_own_row_of_scalars() -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, (500, 1, 130, 700, 2), FloatFormat.FLOAT32, num_rows=3)
    modes = ("adam", "together", "l2")
    before = random_state(rng, shard_numel(segments), None)
    after = before.copied()
    table = rows(*((MODES[mode], STEP, SCALE) for mode in modes))
    run_update(after, segments, table, FloatFormat.FLOAT32, num_pieces=3)
    for segment in segments:
        assert_close(before, after, segment, modes[segment.row])


@pytest.mark.parametrize("numels", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("num_pieces", [1, 5])
def test_an_empty_table_changes_nothing(numels: tuple[int, ...], num_pieces: int) -> None:
    rng = np.random.default_rng(0)
    state = random_state(rng, 128, None)
    bits = state.bits()
    segments = random_segments(rng, numels, FloatFormat.FLOAT32)
    table = rows((MODES["adam"], 1, 1.0))
    run_update(state, segments, table, FloatFormat.FLOAT32, num_pieces=num_pieces)
    assert state.bits() == bits


def test_the_prepared_specialisation_is_the_one_that_runs() -> None:
    adam.compile_kernel(FloatFormat.FLOAT16, FloatFormat.FLOAT16, True)
    compiled = len(adam._update_segments.overloads)
    rng = np.random.default_rng(0)
    segments = random_segments(rng, (3,), FloatFormat.FLOAT16)
    state = random_state(rng, 128, FloatFormat.FLOAT16, amsgrad=True)
    run_update(state, segments, rows((hyperparameters(), 1, 1.0)), FloatFormat.FLOAT16)
    assert len(adam._update_segments.overloads) == compiled
