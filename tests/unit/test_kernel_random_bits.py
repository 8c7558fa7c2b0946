"""Random bits: the specification's numbers, and no bias or correlation beyond chance."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from offload_adam.kernels.compilation import jit_inlined
from offload_adam.kernels.random_bits import random_bits
from offload_adam.kernels.random_keys import name_key, segment_keys
from tests.unit.kernel_bf16_reference import PAIR_CONSTANTS, random_bits_of, splitmix64

WORD = 1 << 64


def _draw(key: Any, start: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = random_bits(key, start + i)


draw = jit_inlined(_draw)


def drawn(key: int, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Return the kernels' bits of elements [start, start + count)."""
    out = np.empty(count, dtype=np.uint32)
    draw(key, start, out)
    return out


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, -(2**63), 0x123456789])
@pytest.mark.parametrize("start", [0, 1, 127, 1000, 2**32 - 5, 2**40 + 77])
def test_the_bits_are_the_specifications(key: int, start: int) -> None:
    expected = random_bits_of(key, np.arange(start, start + 700))
    np.testing.assert_array_equal(drawn(key, start, 700), expected)


def test_splitmix64_is_the_published_one() -> None:
    # The first three outputs of Vigna's splitmix64.c for the seed 1234567.
    outputs = [splitmix64(1234567 + i * 0x9E3779B97F4A7C15 & WORD - 1) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_pair_constants_have_distinct_low_bits() -> None:
    assert [constant % 128 for constant in PAIR_CONSTANTS] == list(range(128))
    assert len({constant >> 7 for constant in PAIR_CONSTANTS}) == 128


def test_segment_keys_hash_the_name_and_the_step() -> None:
    names = ["weight", "weight", "bias", ""]
    steps = [1, 2, 1, 2**40]
    keys = segment_keys(np.array([name_key(name) for name in names]), np.array(steps))
    assert keys.dtype == np.int64
    for name, step, key in zip(names, steps, keys.tolist(), strict=True):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little") + step * 0x9E3779B97F4A7C15
        assert key % WORD == splitmix64(start % WORD)
    assert len(set(keys.tolist())) == 4


def test_no_keys_make_no_keys() -> None:
    assert segment_keys(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)).size == 0


def test_bits_are_uniform_and_uncorrelated() -> None:
    num_steps, numel = 4000, 256
    keys = segment_keys(np.full(num_steps, name_key("w")), np.arange(num_steps, dtype=np.int64))
    bits = np.stack([drawn(int(key), 0, numel) for key in keys])
    # Uniform in [0, 65536): the mean is 32767.5, the variance (65536**2 - 1) / 12.
    z = (bits - 32767.5) / np.sqrt((2.0**32 - 1) / 12)
    # Each sum has a standard deviation of 1. Of 33,000 normal numbers the largest is about 4.2.
    assert np.max(np.abs(z.sum(axis=0) / np.sqrt(num_steps))) < 5
    assert np.max(np.abs(z.sum(axis=1) / np.sqrt(numel))) < 5
    correlations = (z.T @ z / np.sqrt(num_steps))[np.triu_indices(numel, 1)]
    assert np.max(np.abs(correlations)) < 5.5
    assert np.std(correlations) == pytest.approx(1, abs=0.03)
    between_steps = np.sum(z[1:] * z[:-1], axis=0) / np.sqrt(num_steps - 1)
    assert np.max(np.abs(between_steps)) < 5
