"""Bytes and speed of the ring collectives that average or gather a bucket."""

from __future__ import annotations

from dataclasses import dataclass

ALL_REDUCE_PASSES = 2
"""Passes of an all-reduce: a reduce-scatter and an all-gather."""


@dataclass(frozen=True, slots=True)
class RingSpeed:
    """Speed at which a rank sends in one pass around the ring, in 1e9 bytes per second.

    mean_16bit, mean_32bit: while gradients of this width are averaged, arithmetic included.
    gather: while parameters of any width are gathered.
    """

    mean_16bit: float
    mean_32bit: float
    gather: float

    @classmethod
    def uniform(cls, gb_per_s: float) -> RingSpeed:
        """Return the same speed for all collectives."""
        return cls(gb_per_s, gb_per_s, gb_per_s)

    def mean(self, itemsize: int) -> float:
        """Return the speed of averaging elements of `itemsize` bytes."""
        return self.mean_16bit if itemsize == 2 else self.mean_32bit

    @property
    def least(self) -> float:
        """The lowest of the three speeds."""
        return min(self.mean_16bit, self.mean_32bit, self.gather)


def pass_nbytes(nbytes: int, world_size: int) -> float:
    """Return the bytes that a rank sends in one pass: all of a bucket except one rank's share."""
    return (world_size - 1) / world_size * nbytes
