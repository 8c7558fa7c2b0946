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

If a thousand or more parameters have fewer than 128 elements, these start at the next multiple of
16 instead, so that several share a block. None crosses into the next block.

Worked example: parameters 0, 1 and 2 of 20, 3 and 300 elements among very many.

    parameter  2: elements    0 to 300
    parameter  1: elements  304 to 307, after parameter 2 in its last block
    parameter  0: elements  320 to 340, in the same block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar

from offload_adam.options import CODED_FORMATS, StateFormat


class _Sliceable(Protocol):
    def __getitem__(self, elements: slice, /) -> Self: ...


Flat = TypeVar("Flat", bound=_Sliceable)
"""A tensor or an array with one dimension."""

BLOCK_NUMEL = 128
"""Elements of a block: the unit of sharding and of the gradient norm.

The norm sums the squares of each block of each parameter. No block belongs to two shards, so these
sums do not depend on the number of ranks. Larger blocks would need fewer sums (8 bytes each), but
more padding.
"""

VECTOR_NUMEL = 16
"""Alignment of parameters with less than a block: one vector of the update kernel.

It is a whole cache line of float32, and 32 bytes of a 16-bit parameter.
"""

PACK_FROM = 1000
"""Number of parameters with less than a block from which on they share blocks.

Fewer waste at most half a megabyte of each plane of state, and state that earlier versions have
saved as one file for each rank of a world (`local_state_dict`) depends on where shards begin.
"""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """The properties of a parameter that determine its layout.

    bucket_key: equal for all parameters of a bucket; it encodes dtype, device and planes of state.
    unit: equal for all parameters of a bucket, too: what FSDP2 gathers at a time, for example.
        Buckets of several units share slots.
    amsgrad: the state includes the largest second moment so far.
    on_device: the parameter is not in host memory.
    padded_numel: elements to reserve for the parameter, if more than `numel`.
    num_shards: number of ranks that share the state of its bucket; 0 for the default of all.
    state_format: format of the state.
    is_bfloat16: the parameter is bfloat16. In low precision it is then a part of its master weight.
    follows_state_format: for plans: the state format of a run applies to the parameter.
    """

    index: int
    numel: int
    itemsize: int
    bucket_key: str
    amsgrad: bool = False
    on_device: bool = False
    unit: str = ""
    padded_numel: int = 0
    num_shards: int = 0
    state_format: StateFormat = "fp32"
    is_bfloat16: bool = False
    follows_state_format: bool = False


class Placement(NamedTuple):
    """The range of one parameter in its bucket: elements [start, end).

    reserved_end: elements [end, reserved_end) belong to the parameter's memory, but are no elements
        of it. 0 if there are none.
    """

    parameter: int
    start: int
    end: int
    reserved_end: int = 0

    @property
    def numel(self) -> int:
        """Elements of the parameter, without its padding."""
        return self.end - self.start

    @property
    def memory_end(self) -> int:
        """End of the parameter's memory: its elements, and what is reserved after them."""
        return max(self.end, self.reserved_end)


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
    state_format: StateFormat = "fp32"
    is_bfloat16: bool = False

    def __post_init__(self) -> None:
        end = 0
        for placed in self.placements:
            start, packed = align(end), placed.start
            if packed != start:  # in a block with the parameter before
                packed = start_after(end, placed.memory_end - placed.start, packs=True)
            if placed.start not in (start, packed) or placed.numel < 0:
                raise ValueError(
                    f"In bucket {self.index}, {placed} must start at {start} or {packed}, and must "
                    "not end before its start."
                )
            end = placed.memory_end
        expected = align(end, BLOCK_NUMEL * self.world_size)
        if self.numel != expected:
            raise ValueError(
                f"Bucket {self.index} must have {expected} elements, not {self.numel}: its "
                f"parameters end at {end}, and each of {self.world_size} shards has whole blocks."
            )

    @property
    def splits_master(self) -> bool:
        """Whether the parameters are the high halves of their own master weights."""
        return self.is_bfloat16 and self.state_format != "fp32"

    @property
    def shard_numel(self) -> int:
        """Number of elements that each rank owns."""
        return self.numel // self.world_size

    @property
    def num_sums(self) -> int:
        """Upper bound of the number of block sums of one shard.

        It is the number of the shard's blocks, and one more for each parameter of the bucket that
        shares a block with an earlier one.
        """
        sharing = sum(placed.start % BLOCK_NUMEL != 0 for placed in self.placements)
        return blocks_of(self.shard_numel) + sharing

    def shard_bounds(self, rank: int) -> tuple[int, int]:
        """Return the half-open range of the bucket's elements that `rank` owns."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Return the parts of parameters in `rank`'s shard, in the order of the bucket."""
        low, high = self.shard_bounds(rank)
        segments = []
        for position, placed in enumerate(self.placements):
            start, end = max(placed.start, low), min(placed.end, high)
            if start < end:
                segments.append(Segment(position, start - placed.start, start - low, end - start))
        return tuple(segments)


def align(numel: int, multiple: int = BLOCK_NUMEL) -> int:
    """Round an element count up to a multiple."""
    return -(-numel // multiple) * multiple


def blocks_of(numel: int) -> int:
    """Return the number of blocks of this many elements; the last one may be partial."""
    return align(numel) // BLOCK_NUMEL


def start_after(end: int, numel: int, *, packs: bool) -> int:
    """Return where a parameter of `numel` elements starts, after one that ends at `end`.

    Args:
        packs: parameters with less than a block share blocks.
    """
    # A larger one starts at a whole block, so that shards cut it at whole blocks of its own.
    start = align(end, VECTOR_NUMEL)
    fits = numel < BLOCK_NUMEL and start % BLOCK_NUMEL + numel <= BLOCK_NUMEL
    return start if packs and fits else align(end)


def plan_buckets(
    specs: Sequence[ParameterSpec], *, world_size: int, bucket_nbytes: int, first_index: int = 0
) -> tuple[Bucket, ...]:
    """Lay parameters out in buckets, in the order in which backward completes them.

    A bucket is closed when the next parameter would exceed `bucket_nbytes`. A larger parameter gets
    its own bucket.

    Args:
        specs: parameters in forward order.
        world_size: number of ranks that share each bucket, unless its parameters say otherwise.
        bucket_nbytes: bytes of parameters at which a bucket is full.
        first_index: index of the first new bucket, after those that already exist.
    """
    if world_size < 1 or bucket_nbytes < 1:
        raise ValueError(f"{world_size=} and {bucket_nbytes=} must be at least 1")
    groups: list[tuple[ParameterSpec, list[Placement]]] = []
    open_groups: dict[tuple[str, str], list[Placement]] = {}
    many_tiny = sum(max(s.numel, s.padded_numel) < BLOCK_NUMEL for s in specs) >= PACK_FROM
    for spec in reversed(specs):
        group = open_groups.get((spec.bucket_key, spec.unit))
        numel = max(spec.numel, spec.padded_numel)
        # A block of codes has one exponent, so it belongs to one parameter.
        packs = many_tiny and spec.state_format not in CODED_FORMATS
        start = start_after(group[-1].memory_end, numel, packs=packs) if group else 0
        if group is None or align(start + numel) * spec.itemsize > bucket_nbytes:
            group = open_groups[spec.bucket_key, spec.unit] = []
            groups.append((spec, group))
            start = 0
        reserved_end = start + numel if numel > spec.numel else 0
        group.append(Placement(spec.index, start, start + spec.numel, reserved_end))
    # Backward completes a bucket with the gradient of the parameter that comes first in the
    # forward: the last one in the group.
    position = {spec.index: place for place, spec in enumerate(specs)}
    groups.sort(key=lambda group: -position[group[1][-1].parameter])
    return tuple(
        Bucket(
            first_index + offset,
            spec.bucket_key,
            spec.itemsize,
            align(placements[-1].memory_end, BLOCK_NUMEL * (spec.num_shards or world_size)),
            spec.num_shards or world_size,
            tuple(placements),
            amsgrad=spec.amsgrad,
            on_device=spec.on_device,
            state_format=spec.state_format,
            is_bfloat16=spec.is_bfloat16,
        )
        for offset, (spec, placements) in enumerate(groups)
    )
