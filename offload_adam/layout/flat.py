"""Flat buckets, and the shard of each bucket that a rank owns.

    bucket   | p3 ........ pad | p2 .. pad | p1 ............... pad | pad |
    block    |  128 elements each                                         |
    shard    |       rank 0       |       rank 1       |      rank 2      |
    segments |     p3[0:...]      | p3 rest, p2, p1[0:]|     p1 rest      |

Parameters are in the order in which backward produces their gradients: the reverse of the order in
which they were given. Each starts at a multiple of 128 elements. A bucket is padded so that every
rank owns one contiguous shard of whole blocks.

Worked example: parameters 0, 1 and 2 of 100, 300 and 130 elements, one bucket, two ranks.

    parameter  2: elements    0 to 130, padded to 256
    parameter  1: elements  256 to 556, padded to 640
    parameter  0: elements  640 to 740, padded to 768 = 2 ranks * 3 blocks of 128
    rank 0 owns [0, 384):   all of parameter 2, elements [0, 128) of parameter 1
    rank 1 owns [384, 768): elements [128, 300) of parameter 1, all of parameter 0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar


class _Sliceable(Protocol):
    def __getitem__(self, elements: slice, /) -> Self: ...


Flat = TypeVar("Flat", bound=_Sliceable)
"""A tensor or an array with one dimension."""

BLOCK_NUMEL = 128
"""Elements of a block: the unit of alignment, of sharding and of the gradient norm.

No block belongs to two parameters or two shards, so its sum of squares does not depend on the
number of ranks. Larger blocks would need fewer sums (8 bytes each), but more padding.
"""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """The properties of a parameter that determine its layout.

    bucket_key: equal for all parameters of a bucket; it encodes dtype, device and `amsgrad`.
    amsgrad: the state includes the largest second moment so far.
    on_device: the parameter is not in host memory.
    """

    index: int
    numel: int
    itemsize: int
    bucket_key: str
    amsgrad: bool = False
    on_device: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """The range of one parameter in its bucket: elements [start, end)."""

    parameter: int
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Elements of the parameter, without its padding."""
        return self.end - self.start


class Segment(NamedTuple):
    """The part of one parameter in one rank's shard.

    position: index of the parameter in the bucket's `placements`.
    parameter_start: offset of the segment in the parameter, in elements.
    shard_start: offset of the segment in the shard, in elements.
    """

    position: int
    parameter_start: int
    shard_start: int
    numel: int

    def of(self, plane: Flat) -> Flat:
        """Return the segment's part of a flat tensor of the shard's length."""
        return plane[self.shard_start : self.shard_start + self.numel]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that are reduced and gathered in one collective.

    numel: elements including all padding, a multiple of 128 * world_size.
    world_size: number of ranks that share the bucket.

    Raises:
        ValueError: placements overlap, are out of order, unaligned, or leave the bucket.
    """

    index: int
    bucket_key: str
    itemsize: int
    numel: int
    world_size: int
    placements: tuple[Placement, ...]
    amsgrad: bool = False
    on_device: bool = False

    def __post_init__(self) -> None:
        end = 0
        for placed in self.placements:
            if placed.start != align(end) or placed.end < placed.start:
                raise ValueError(
                    f"In bucket {self.index}, {placed} must start at {align(end)} and must not end "
                    "before its start."
                )
            end = placed.end
        expected = align(end, BLOCK_NUMEL * self.world_size)
        if self.numel != expected:
            raise ValueError(
                f"Bucket {self.index} must have {expected} elements, not {self.numel}: its "
                f"parameters end at {end}, and each of {self.world_size} shards has whole blocks."
            )

    @property
    def shard_numel(self) -> int:
        """Number of elements that each rank owns."""
        return self.numel // self.world_size

    @property
    def num_blocks(self) -> int:
        """Number of blocks of one shard."""
        return self.shard_numel // BLOCK_NUMEL

    def shard_bounds(self, rank: int) -> tuple[int, int]:
        """Return the half-open range of the bucket's elements that `rank` owns."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Return the parts of parameters in `rank`'s shard, in the order of the bucket."""
        low, high = self.shard_bounds(rank)
        return tuple(
            Segment(
                position=position,
                parameter_start=max(low - placed.start, 0),
                shard_start=max(placed.start - low, 0),
                numel=min(placed.end, high) - max(placed.start, low),
            )
            for position, placed in enumerate(self.placements)
            if min(placed.end, high) > max(placed.start, low)
        )


def align(numel: int, multiple: int = BLOCK_NUMEL) -> int:
    """Round an element count up to a multiple."""
    return -(-numel // multiple) * multiple


def plan_buckets(
    specs: Sequence[ParameterSpec], *, world_size: int, bucket_nbytes: int, first_index: int = 0
) -> tuple[Bucket, ...]:
    """Lay parameters out in buckets, in the order in which backward completes them.

    A bucket is closed when the next parameter would exceed `bucket_nbytes`. A larger parameter gets
    its own bucket.

    Args:
        specs: parameters in forward order.
        world_size: number of ranks that share each bucket.
        bucket_nbytes: bytes of parameters at which a bucket is full.
        first_index: index of the first new bucket, after those that already exist.
    """
    if world_size < 1 or bucket_nbytes < 1:
        raise ValueError(f"{world_size=} and {bucket_nbytes=} must be at least 1")
    groups: list[list[ParameterSpec]] = []
    open_groups: dict[str, list[ParameterSpec]] = {}
    filled_nbytes: dict[str, int] = {}
    for spec in reversed(specs):
        nbytes = align(spec.numel) * spec.itemsize
        group = open_groups.get(spec.bucket_key)
        if group is None or filled_nbytes[spec.bucket_key] + nbytes > bucket_nbytes:
            group = []
            groups.append(group)
            open_groups[spec.bucket_key] = group
            filled_nbytes[spec.bucket_key] = 0
        group.append(spec)
        filled_nbytes[spec.bucket_key] += nbytes
    # Backward completes a bucket with the gradient of the parameter that comes first in the
    # forward: the last one in the group.
    position = {spec.index: place for place, spec in enumerate(specs)}
    groups.sort(key=lambda group: -position[group[-1].index])
    return tuple(
        _place(group, first_index + offset, world_size) for offset, group in enumerate(groups)
    )


def _place(group: Iterable[ParameterSpec], index: int, world_size: int) -> Bucket:
    """Assign a range to every parameter of one bucket."""
    placements = []
    start = 0
    for spec in group:
        placements.append(Placement(spec.index, start, start + spec.numel))
        start = align(start + spec.numel)
    numel = align(start, BLOCK_NUMEL * world_size)
    return Bucket(
        index,
        spec.bucket_key,
        spec.itemsize,
        numel,
        world_size,
        tuple(placements),
        amsgrad=spec.amsgrad,
        on_device=spec.on_device,
    )
