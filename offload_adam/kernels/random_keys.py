"""Keys of the random bits of an update, see `random_bits`.

Computed with NumPy: this module does not import Numba.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

INCREMENT = 0x9E3779B97F4A7C15
XOR_SHIFTS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
"""Constants of splitmix64."""


KEY, FIRST, RUN, PITCH, LOCAL_START, SCALE, SHIFT = range(7)
"""Columns of the table `places` of `kernels.adam.update`."""
NUM_COLUMNS = 7


def name_key(name: str) -> np.uint64:
    """Return a 64-bit hash of a parameter's name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def segment_keys(
    name_keys: npt.NDArray[np.uint64], steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the keys of one update.

    Args:
        name_keys: (n,) uint64, `name_key` of each parameter.
        steps: (n,) int64, step count of each parameter, including this update.

    Returns:
        (n,) int64, the bits of the unsigned keys.
    """
    return splitmix64(name_keys + steps.astype(np.uint64) * np.uint64(INCREMENT)).view(np.int64)


def splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the hash of each state, (n,) uint64. Integer overflow wraps, without a warning."""
    z = state + np.uint64(INCREMENT)
    for shift, multiplier in XOR_SHIFTS:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(multiplier)
    return z ^ (z >> np.uint64(LAST_SHIFT))
