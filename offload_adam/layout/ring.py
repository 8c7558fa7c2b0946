"""What ranks send when they average or gather a bucket around a ring, and how fast they do."""

from __future__ import annotations

from dataclasses import dataclass

ALL_REDUCE_PASSES = 2
"""An all-reduce is a reduce-scatter and an all-gather, each one pass."""


@dataclass(frozen=True, slots=True)
class RingSpeed:
    """What a rank sends in one pass of a bucket around the ring, in 1e9 bytes a second.

    mean_16bit, mean_32bit: while gradients of this width are averaged, which costs arithmetic, too.
    gather: while parameters of any width are gathered.
    """

    mean_16bit: float
    mean_32bit: float
    gather: float

    @classmethod
    def uniform(cls, gb_per_s: float) -> RingSpeed:
        """Return the speed of ranks that do everything equally fast."""
        return cls(gb_per_s, gb_per_s, gb_per_s)

    def mean(self, itemsize: int) -> float:
        """Return the speed of averaging elements of so many bytes."""
        return self.mean_16bit if itemsize == 2 else self.mean_32bit

    @property
    def least(self) -> float:
        """The slowest of all."""
        return min(self.mean_16bit, self.mean_32bit, self.gather)


def pass_nbytes(nbytes: int, world_size: int) -> float:
    """Return what a rank sends in one pass: all of a bucket's bytes but one rank's share."""
    return (world_size - 1) / world_size * nbytes
