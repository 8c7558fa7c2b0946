"""bfloat16 state in NumPy, from its specification: shares no code with the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.unit.kernel_cases import HostState

UInt32Array = npt.NDArray[np.uint32]
_WORD, _LONG = (1 << 32) - 1, (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Hash 64 bits in Python's integers; source: Vigna's splitmix64.c."""
    z = (state + 0x9E3779B97F4A7C15) & _LONG
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LONG
    return z ^ (z >> 31)


PAIR_CONSTANTS = [splitmix64(1000 + i) & _WORD & ~127 | i for i in range(128)]


def random_bits_of(key: int, indices: npt.NDArray[np.int64]) -> UInt32Array:
    """Return the 16 random bits of each element, one after the other in Python's integers."""
    hashes: dict[int, int] = {}
    result = np.empty(indices.size, dtype=np.uint32)
    for place, g in enumerate(indices.tolist()):
        block, j = divmod(g, 128)
        if block not in hashes:
            hashes[block] = splitmix64((key & _LONG) ^ (block * 0xD1342543DE82EF95 & _LONG))
        k1, k2 = hashes[block] & _WORD, hashes[block] >> 32 | 1
        x = (PAIR_CONSTANTS[j // 2] + k1) * k2 & _WORD
        h = x ^ x >> 13
        result[place] = h >> 16 if j % 2 else h & 0xFFFF
    return result


def bits_of(values: npt.NDArray[np.float32]) -> UInt32Array:
    return values.view(np.uint32)


def decoded(bfloat16: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return bfloat16 bits as float32."""
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def joined(high: npt.NDArray[Any], low: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the float32 master weights of a split master."""
    return ((high.astype(np.int64) << 16) + low.astype(np.int64)).astype(np.uint32).view(np.float32)


def split(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return both halves of a split master; a NaN has a NaN and 0."""
    bits = bits_of(weight).astype(np.int64)
    nan = np.isnan(weight)
    high = np.where(nan, bits | 0x400000, bits + 0x8000) >> 16
    low = np.where(nan, 0, bits & 0xFFFF)
    return high.astype(np.uint16), low.astype(np.uint16).view(np.int16)


def rounded_randomly(v: npt.NDArray[np.float32], random: UInt32Array) -> npt.NDArray[np.uint16]:
    """Return float32 as bfloat16, rounded by 16 random bits for each element."""
    return ((bits_of(v).astype(np.int64) + random) >> 16).astype(np.uint16)


def master_of(state: HostState) -> npt.NDArray[np.float32]:
    """Return the float32 master weights of any state."""
    if state.remainder is None:
        return np.array(state.master, dtype=np.float32)
    return joined(state.master, state.remainder)


def in_float32(state: HostState) -> HostState:
    """Return bfloat16 state as the float32 kernel takes it."""
    out = None if state.param_out is None else state.param_out.copy()
    moments = decoded(state.exp_avg), decoded(state.exp_avg_sq)
    return HostState(master_of(state), *moments, None, out)


def encoded(
    after: HostState, split_master: bool, key: int, indices: npt.NDArray[np.int64]
) -> HostState:
    """Return what the float32 kernel computed as bfloat16 state.

    Args:
        indices: of the elements in the unsharded parameter.
    """
    exp_avg = rounded_randomly(after.exp_avg, random_bits_of(key, indices ^ 1))
    exp_avg_sq = rounded_randomly(after.exp_avg_sq, random_bits_of(key, indices))
    if not split_master:
        return HostState(after.master, exp_avg, exp_avg_sq, None, after.param_out)
    high, low = split(after.master)
    return HostState(high, exp_avg, exp_avg_sq, None, None, low)
