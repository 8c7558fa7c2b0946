"""Invariant 1: an update depends on bits alone, not on threads, splits or alignment."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.kernels.formats import FloatFormat
from tests.unit.kernel_cases import (
    MODES,
    HostState,
    Segment,
    displaced,
    random_segments,
    random_state,
    rows,
    run_update,
    shard_numel,
)

NUMEL = 3000
# With neither L2 nor Nesterov the kernel leaves out what would change nothing.
SCALARS = rows((MODES["together"], 7, 0.6), (MODES["decoupled"], 7, 0.6))


def updated(
    state: HostState,
    segments: Sequence[Segment],
    gradient_format: FloatFormat,
    *,
    num_pieces: int = 1,
    num_threads: int = 1,
    offset: int = 0,
) -> bytes:
    """Return the bits of a copy of the state, updated."""
    after = state.copied(offset)
    run_update(
        after,
        segments,
        SCALARS,
        gradient_format,
        num_pieces=num_pieces,
        num_threads=num_threads,
    )
    return after.bits()


def split(segment: Segment, cuts: Sequence[int], offset: int = 0) -> list[Segment]:
    """Return the segment in parts, each with its gradient in memory of its own."""
    edges = [0, *sorted(cuts), segment.gradient.size]
    return [
        Segment(displaced(segment.gradient[low:high], offset), segment.start + low, segment.row)
        for low, high in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("param_format", [None, FloatFormat.BFLOAT16, FloatFormat.FLOAT16])
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_pieces_and_threads_change_no_bit(
    gradient_format: FloatFormat, param_format: FloatFormat | None
) -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, (1, 129, 900, 0, 64, 1500), gradient_format, num_rows=2)
    state = random_state(rng, shard_numel(segments), param_format, amsgrad=True)
    expected = updated(state, segments, gradient_format)
    for num_pieces in range(1, 8):
        for num_threads in (1, 2):
            bits = updated(
                state, segments, gradient_format, num_pieces=num_pieces, num_threads=num_threads
            )
            assert bits == expected


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, NUMEL), max_size=6),
    state_offset=st.integers(0, 17),
    gradient_offset=st.integers(0, 33),
    num_pieces=st.integers(1, 7),
    gradient_format=st.sampled_from(FloatFormat),
    param_format=st.sampled_from([None, FloatFormat.BFLOAT16]),
    row=st.integers(0, 1),
)
def test_splits_and_alignment_change_no_bit(
    cuts: list[int],
    state_offset: int,
    gradient_offset: int,
    num_pieces: int,
    gradient_format: FloatFormat,
    param_format: FloatFormat | None,
    row: int,
) -> None:
    rng = np.random.default_rng(1)
    whole = random_segments(rng, (NUMEL,), gradient_format)
    whole[0].row = row
    state = random_state(rng, shard_numel(whole), param_format)
    parts = split(whole[0], cuts, gradient_offset)
    bits = updated(state, parts, gradient_format, num_pieces=num_pieces, offset=state_offset)
    assert bits == updated(state, whole, gradient_format)


@pytest.mark.parametrize("row", [0, 1])
def test_elements_do_not_see_their_neighbours(row: int) -> None:
    # One element at a time is the scalar tail of the loop, all at once is its vector body.
    rng = np.random.default_rng(2)
    whole = random_segments(rng, (256,), FloatFormat.BFLOAT16)
    whole[0].row = row
    state = random_state(rng, 256, FloatFormat.BFLOAT16, amsgrad=True)
    singly = split(whole[0], range(1, 256))
    assert updated(state, singly, FloatFormat.BFLOAT16) == updated(
        state, whole, FloatFormat.BFLOAT16
    )
