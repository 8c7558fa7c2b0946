"""bfloat16 state: no bit depends on threads, splits, shards, alignment or the kernel that runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.kernels import adam_ir, adam_plain, sparse, threads
from offload_adam.kernels.compilation import jit_inlined
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import scalar_row
from tests.support.kernel_reference import carry
from tests.unit.kernel_cases import (
    KEY,
    MODES,
    CarriedArray,
    HostState,
    Segment,
    displaced,
    low_precision_state,
    random_segments,
    rows,
    run_update,
)

SCALARS = rows((MODES["together"], 7, 0.6), (MODES["decoupled"], 7, 0.6), (MODES["l2"], 7, 0.6))
SOURCE = FloatFormat.BFLOAT16
MASTERS = [(True, None), (False, None), (False, FloatFormat.FLOAT16)]
"""Is the master split, and the format of the parameter beside a float32 master."""

plain_range = jit_inlined(adam_plain.update_range)

needs_ir = pytest.mark.skipif(
    not adam_ir.supports_ir(), reason="this machine uses the plain loop only"
)


def updated(state: HostState, segments: Sequence[Segment], **options: Any) -> bytes:
    """Return the bits of a copy of the state, updated."""
    offset = options.pop("offset", 0)
    after = state.copied(offset)
    run_update(after, segments, SCALARS, SOURCE, **options)
    return after.bits()


def split(segment: Segment, cuts: Sequence[int], offset: int = 0) -> list[Segment]:
    """Return the segment in parts, each with its gradient in memory of its own."""
    edges = [0, *sorted(cuts), segment.gradient.size]
    return [
        Segment(displaced(segment.gradient[low:high], offset), segment.start + low, segment.row)
        for low, high in itertools.pairwise(edges)
    ]


@settings(max_examples=50, deadline=None)
@given(
    numel=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    state_offset=st.integers(0, 33),
    gradient_offset=st.integers(0, 33),
    num_pieces=st.integers(1, 7),
    num_threads=st.integers(1, 2),
    is_split=st.booleans(),
    row=st.integers(0, 2),
)
def test_splits_and_alignment_change_no_bit(
    numel: int,
    cuts: list[int],
    state_offset: int,
    gradient_offset: int,
    num_pieces: int,
    num_threads: int,
    is_split: bool,
    row: int,
) -> None:
    rng = np.random.default_rng(1)
    whole = random_segments(rng, (numel,), SOURCE)
    whole[0].row = row
    state = low_precision_state(rng, numel, split=is_split)
    parts = split(whole[0], [cut % (numel + 1) for cut in cuts], gradient_offset)
    bits = updated(
        state, parts, offset=state_offset, num_pieces=num_pieces, num_threads=num_threads
    )
    assert bits != state.bits()
    assert bits == updated(state, whole, num_pieces=1, num_threads=1)


@pytest.mark.parametrize("row", [0, 1])
def test_elements_do_not_see_their_neighbours(row: int) -> None:
    rng = np.random.default_rng(2)
    whole = random_segments(rng, (256,), SOURCE)
    whole[0].row = row
    state = low_precision_state(rng, 256, split=True)
    assert updated(state, split(whole[0], range(1, 256))) == updated(state, whole)


def test_every_length_matches_the_first_elements_of_a_longer_range() -> None:
    rng = np.random.default_rng(3)
    (whole,) = random_segments(rng, (400,), SOURCE)
    before = low_precision_state(rng, 400, split=True)
    expected = before.copied()
    run_update(expected, [whole], SCALARS, SOURCE)
    for numel in range(1, 301):
        start = 37 * numel % 100
        after = before.copied()
        part = slice(start, start + numel)
        run_update(after, [Segment(whole.gradient[part], start)], SCALARS, SOURCE)
        for name in ("master", "remainder", "exp_avg", "exp_avg_sq"):
            new, old, full = (getattr(one, name) for one in (after, before, expected))
            np.testing.assert_array_equal(new[part], full[part], f"{numel} {name}")
            np.testing.assert_array_equal(np.delete(new, part), np.delete(old, part))


def columns_of(state: HostState, num_columns: int, part: slice) -> HostState:
    """Return some columns of state that is a matrix."""

    def taken(array: Any) -> Any:
        return None if array is None else array.reshape(-1, num_columns)[:, part].reshape(-1)

    arrays = (state.master, state.exp_avg, state.exp_avg_sq, None, state.param_out, state.remainder)
    return HostState(*(taken(array) for array in arrays))


@pytest.mark.parametrize("first_row", [0, 3])
@pytest.mark.parametrize("part", [slice(0, 70), slice(70, 71), slice(71, 300), slice(0, 300)])
def test_a_shard_of_columns_has_the_bits_of_the_whole_matrix(part: slice, first_row: int) -> None:
    rng = np.random.default_rng(4)
    num_rows, num_columns = 12, 300
    width = part.stop - part.start
    gradient = carry(rng.normal(0, 1, (num_rows, num_columns)), SOURCE)
    state = low_precision_state(rng, gradient.size, split=True)
    shard = columns_of(state, num_columns, part)
    run_update(state, [Segment(gradient.reshape(-1), 0)], SCALARS, SOURCE)
    # Rows from `first_row` on are the shard; its second segment begins within a row.
    first, cut = first_row * num_columns + part.start, width * 3 + width // 2
    own = np.ascontiguousarray(gradient[first_row:, part]).reshape(-1)
    skipped = first_row * width
    segments = [
        Segment(own[:cut], skipped, place=(KEY, first, width, num_columns, 0)),
        Segment(own[cut:], skipped + cut, place=(KEY, first, width, num_columns, cut)),
    ]
    run_update(shard, segments, SCALARS, SOURCE, num_pieces=3)
    expected = columns_of(state, num_columns, part)
    for name in ("master", "remainder", "exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(
            getattr(shard, name)[skipped:], getattr(expected, name)[skipped:], name
        )


def test_each_segment_takes_its_own_key() -> None:
    rng = np.random.default_rng(5)
    segments = random_segments(rng, (500, 500), SOURCE)
    segments[1].gradient[:] = segments[0].gradient
    state = low_precision_state(rng, 1024, split=True)
    for array in (state.master, state.remainder, state.exp_avg, state.exp_avg_sq):
        assert array is not None
        array[512:] = array[:512]
    segments[0].place = (1, 0, 500, 500, 0)
    for second_key, is_same in ((1, True), (2, False)):
        segments[1].place = (second_key, 0, 500, 500, 0)
        after = state.copied()
        run_update(after, segments, SCALARS, SOURCE)
        np.testing.assert_array_equal(after.master[:500], after.master[512:1012])
        for moment in (after.exp_avg, after.exp_avg_sq):
            assert np.array_equal(moment[:500], moment[512:1012]) is is_same


@needs_ir
@pytest.mark.parametrize(("is_split", "param_format"), MASTERS)
@pytest.mark.parametrize("source", FloatFormat)
def test_both_loops_compute_the_same_bits(
    source: FloatFormat, is_split: bool, param_format: FloatFormat | None
) -> None:
    numel, start = 1000, 12345
    for number, (mode, hyper) in enumerate(MODES.items()):
        rng = np.random.default_rng(number)
        (segment,) = random_segments(rng, (numel,), source, offset=number % 2)
        before = low_precision_state(rng, numel, split=is_split, param_format=param_format)
        make_extreme(before, segment.gradient, source)
        (scalars,) = rows((hyper, 3, 0.37))
        segment.place = (KEY, start, numel, numel, 0)
        ir, plain = before.copied(offset=3), before.copied()
        run_update(ir, [segment], scalars[None], source, num_pieces=1)
        plain_range(
            segment.gradient,
            plain.master,
            plain.remainder,
            plain.exp_avg,
            plain.exp_avg_sq,
            None,
            plain.param_out,
            KEY,
            start,
            scalars,
            None,
            0,
        )
        assert np.any(plain.master != before.master)
        for name in ("master", "remainder", "exp_avg", "exp_avg_sq", "param_out"):
            one, other = getattr(ir, name), getattr(plain, name)
            if other is not None:
                bits = f"u{one.itemsize}"
                np.testing.assert_array_equal(one.view(bits), other.view(bits), f"{mode}: {name}")


def make_extreme(state: HostState, gradient: CarriedArray, source: FloatFormat) -> None:
    """Put denormal, infinite and NaN moments and weights, and huge gradients, side by side."""
    state.exp_avg[0:200] = np.arange(200) % 128  # denormal
    state.exp_avg_sq[100:300] = np.arange(200) % 128
    state.exp_avg_sq[250:400] = 0x7F80
    state.master[350:450] = 0
    if state.remainder is not None:
        state.master[450:470] = 0x7F80  # with a negative remainder still a number
        state.master[470:480] = 0x7FC0
    if source is not FloatFormat.FLOAT16:
        gradient[380:480] = carry(np.full(100, 1e30), source)


@pytest.mark.parametrize(("is_split", "param_format"), MASTERS)
@pytest.mark.parametrize("width", [1, 3, 64, 129])
def test_touched_rows_have_the_dense_kernels_bits_and_no_other_row_changes(
    width: int, is_split: bool, param_format: FloatFormat | None
) -> None:
    rng = np.random.default_rng(width)
    num_rows, local_start = 40, 3 * width
    touched = rng.permutation(num_rows)[:17].astype(np.int64)
    source = FloatFormat.FLOAT32
    values = carry(rng.normal(0, 1, (17, width)), source)
    before = low_precision_state(rng, num_rows * width, split=is_split, param_format=param_format)
    place = (KEY, 5, width, width + 7, local_start)  # a shard of columns that begins at row 3
    whole = carry(rng.normal(0, 1, (num_rows, width)), source)
    whole[touched] = values
    for mode in ("adam", "together"):
        dense, lazy = before.copied(), before.copied(offset=1)
        segment = Segment(whole.reshape(-1), 0, place=place)
        scalars = scalar_row(MODES[mode], 3, 0.37)
        run_update(dense, [segment], scalars[None], source)
        run_rows(lazy, touched, values, scalars, place)
        others = np.setdiff1d(np.arange(num_rows), touched)
        for name in ("master", "remainder", "exp_avg", "exp_avg_sq", "param_out"):
            old, expected, new = (getattr(one, name) for one in (before, dense, lazy))
            if new is not None:
                old, expected, new = (x.reshape(num_rows, width) for x in (old, expected, new))
                np.testing.assert_array_equal(new[touched], expected[touched], name)
                np.testing.assert_array_equal(new[others], old[others], name)


def run_rows(
    state: HostState,
    touched: npt.NDArray[np.int64],
    values: CarriedArray,
    scalars: npt.NDArray[np.float32],
    place: tuple[int, int, int, int, int],
) -> None:
    """Run the lazy update with a float32 gradient."""
    threads.use_threads(2)
    sparse.update_rows(
        FloatFormat.FLOAT32,
        touched,
        values,
        values.shape[1],
        scalars,
        state.master,
        state.remainder,
        state.exp_avg,
        state.exp_avg_sq,
        state.param_out,
        np.array(place, dtype=np.int64),
        2,
    )


def test_the_prepared_row_specialisation_is_the_one_that_runs() -> None:
    sparse.compile_kernel(FloatFormat.FLOAT32, None, "bf16", True)
    compiled = len(sparse._update_touched.overloads)
    rng = np.random.default_rng(0)
    state = low_precision_state(rng, 40, split=True)
    values = carry(rng.normal(0, 1, (2, 4)), FloatFormat.FLOAT32)
    touched = np.array([7, 2], dtype=np.int64)
    run_rows(state, touched, values, SCALARS[0], (KEY, 0, 40, 40, 0))
    assert len(sparse._update_touched.overloads) == compiled
