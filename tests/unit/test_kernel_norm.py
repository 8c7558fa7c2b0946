"""Block sums of squares: exact where they can be, ordered always, and blind to nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.kernels import norm, threads
from offload_adam.kernels.formats import FloatFormat
from tests.support.kernel_reference import carry, read_bits
from tests.unit.kernel_cases import Segment, displaced, random_segments, shard_numel

NUMELS = (0, 1, 127, 128, 129, 0, 1000, 3, 4096, 517)


def block_sums(
    segments: Sequence[Segment],
    gradient_format: FloatFormat,
    *,
    num_pieces: int = 2,
    num_threads: int = 2,
    target: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.float64]:
    """Return the sums of a shard; -1 where no segment lies. Copy the gradients to `target`."""
    threads.use_threads(num_threads)
    sums = np.full(shard_numel(segments) // 128, -1.0)
    norm.block_sums(
        gradient_format,
        np.array([segment.gradient.ctypes.data for segment in segments], dtype=np.int64),
        np.array([segment.start // 128 for segment in segments], dtype=np.int64),
        np.array([segment.gradient.size for segment in segments], dtype=np.int64),
        sums,
        num_pieces,
        None
        if target is None
        else target.ctypes.data + np.array([s.start for s in segments]) * target.itemsize,
    )
    return sums


def expected_sums(
    segments: Sequence[Segment], gradient_format: FloatFormat
) -> npt.NDArray[np.float64]:
    """Return the same by NumPy, in its own order."""
    shard = np.full(shard_numel(segments), np.nan)
    for segment in segments:
        padded_end = segment.start + -(-segment.gradient.size // 128) * 128
        shard[segment.start : padded_end] = 0.0
        shard[segment.start : segment.end] = read_bits(segment.gradient, gradient_format)
    sums = np.sum(shard.reshape(-1, 128) ** 2, axis=1)
    return np.where(np.isnan(sums), -1.0, sums)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_sums_are_numpys(gradient_format: FloatFormat, offset: int) -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, NUMELS, gradient_format, offset=offset)
    ours, theirs = block_sums(segments, gradient_format), expected_sums(segments, gradient_format)
    # Squares are exact; 8 + 4 additions of positive terms on our side, up to 127 on NumPy's.
    np.testing.assert_allclose(ours, theirs, rtol=(12 + 127) * 2.0**-53, atol=0)


@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_sums_of_integers_are_exact(gradient_format: FloatFormat) -> None:
    rng = np.random.default_rng(0)
    whole = carry(rng.integers(-128, 129, 1000), gradient_format)
    segments = [Segment(whole, 256)]
    sums = block_sums(segments, gradient_format)
    np.testing.assert_array_equal(sums, expected_sums(segments, gradient_format))
    assert list(sums[:2]) == [-1.0, -1.0]


@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_pieces_and_threads_change_no_bit(gradient_format: FloatFormat) -> None:
    rng = np.random.default_rng(0)
    segments = random_segments(rng, NUMELS, gradient_format)
    expected = block_sums(segments, gradient_format, num_pieces=1, num_threads=1).tobytes()
    for num_pieces, num_threads in itertools.product(range(1, 8), (1, 2)):
        sums = block_sums(segments, gradient_format, num_pieces=num_pieces, num_threads=num_threads)
        assert sums.tobytes() == expected


@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_a_copy_has_the_bits_of_the_gradient_and_changes_no_sum(
    gradient_format: FloatFormat, offset: int
) -> None:
    segments = random_segments(np.random.default_rng(0), NUMELS, gradient_format, offset=offset)
    for segment in segments:  # any bits, so also NaNs with a payload
        segment.gradient.view(np.uint8)[1::7] ^= 0xFF
    numel = shard_numel(segments)
    # Two small ones share a block; their addresses have the alignment of an element.
    for position, start in ((1, 3), (2, 4)):
        segments.append(Segment(segments[position].gradient[:127], numel + start))
    expected = np.full(numel + 256, 7, dtype=segments[0].gradient.dtype)
    untouched = expected.copy()
    for segment in segments:
        expected[segment.start : segment.end] = segment.gradient
    sums_of = partial(block_sums, segments[:10], gradient_format)
    plain = sums_of(num_pieces=1, num_threads=1).tobytes()
    for num_pieces, num_threads in itertools.product((1, 2, 3, 7, 64), (1, 2)):
        shard = displaced(untouched, 0)
        block_sums(segments[10:], gradient_format, num_pieces=num_pieces, target=shard)
        sums = sums_of(num_pieces=num_pieces, num_threads=num_threads, target=shard)
        assert sums.tobytes() == plain
        np.testing.assert_array_equal(shard.view(np.uint8), expected.view(np.uint8))


@settings(max_examples=30)
@given(
    blocks=st.lists(st.integers(0, 23), max_size=4),
    offset=st.integers(0, 33),
    gradient_format=st.sampled_from(FloatFormat),
)
def test_splits_at_blocks_and_alignment_change_no_bit(
    blocks: list[int], offset: int, gradient_format: FloatFormat
) -> None:
    rng = np.random.default_rng(1)
    (whole,) = random_segments(rng, (3000,), gradient_format)
    edges = [0, *(128 * block for block in sorted(blocks)), 3000]
    parts = [
        Segment(displaced(whole.gradient[low:high], offset), low)
        for low, high in itertools.pairwise(edges)
    ]
    split, joint = block_sums(parts, gradient_format), block_sums([whole], gradient_format)
    assert split.tobytes() == joint.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_a_non_finite_element_is_seen_in_every_place(
    gradient_format: FloatFormat, value: float
) -> None:
    zeros = carry(np.zeros(300), gradient_format)
    poison = carry([value], gradient_format)[0]
    for place in range(300):
        gradient = zeros.copy()
        gradient[place] = poison
        finite = np.isfinite(block_sums([Segment(gradient, 0)], gradient_format))
        np.testing.assert_array_equal(np.flatnonzero(~finite), [place // 128])


def test_the_largest_and_the_smallest_floats_stay_finite_and_positive() -> None:
    largest = np.full(128, np.finfo(np.float32).max, dtype=np.float32)
    smallest = np.full(128, 2.0**-149, dtype=np.float32)
    sums = block_sums([Segment(largest, 0), Segment(smallest, 128)], FloatFormat.FLOAT32)
    np.testing.assert_array_equal(sums, [128 * float(largest[0]) ** 2, 128 * 2.0**-298])
