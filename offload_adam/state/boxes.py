"""Boxes: the parts of a tensor that ranks hold, that files contain and that DCP saves.

A rank holds a range of a tensor's elements in memory order, or a range of a DTensor's local part.
Files and DCP need N-d boxes, so the range is cut into boxes whose elements are contiguous in the
rank's memory:

shape (4, 5), range [3, 17)     . . . X X     box 1: row 0, columns 3 to 4
                                X X X X X     box 2: rows 1 to 2
                                X X X X X
                                X X . . .     box 3: row 3, columns 0 to 1

local part of columns 2 to 4    . . X X X     one box: contiguous in the local tensor, although not
                                . . X X X     in the whole tensor
                                . . X X X
                                . . X X X

A tensor's boxes list its dimensions in memory order, the outermost first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

import torch

from offload_adam.fsdp_private import indices_of_part, local_of

MAX_CUT_DIMS = 6
"""Dimensions that boxes may divide, unless all are flat ranges. It bounds `find_fault`.

A mesh divides as many dimensions as it has itself, and a flat range of a local part divides at most
the five of a 3-d convolution's weight.
"""


class Box(NamedTuple):
    """A block of a tensor: the index of its first element, and its sizes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.sizes)

    def permuted(self, dims: Sequence[int]) -> Box:
        """Return the box of the tensor with its dimensions permuted as by `Tensor.permute`."""
        return Box(tuple(self.offsets[dim] for dim in dims), tuple(self.sizes[dim] for dim in dims))

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Return the index of this box in a tensor whose first element has the index `origin`."""
        starts = self.offsets
        if origin is not None:
            starts = tuple(offset - first for offset, first in zip(starts, origin, strict=True))
        return tuple(slice(s, s + size) for s, size in zip(starts, self.sizes, strict=True))


def boxes_of_range(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """Cut elements [start, end) of a row-major tensor into boxes, in order.

    There are at most 2 * ndim - 1 boxes. The elements of each are contiguous in the flat tensor.
    """
    if start >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = start // row, -(-end // row)
    if row == 1 or (start == first * row and end == last * row):
        zeros = (0,) * (len(shape) - 1)
        return [Box((first, *zeros), (last - first, *shape[1:]))]
    if last - first == 1:
        return _in_row(shape, first, start - first * row, end - first * row)
    boxes: list[Box] = []
    if start > first * row:
        boxes += _in_row(shape, first, start - first * row, row)
        first += 1
    whole = end // row
    if whole > first:
        boxes += boxes_of_range(shape, first * row, whole * row)
    if end > whole * row:
        boxes += _in_row(shape, whole, 0, end - whole * row)
    return boxes


def _in_row(shape: Sequence[int], index: int, start: int, end: int) -> list[Box]:
    """Cut elements [start, end) of the slice `index` along the first dimension."""
    return [
        Box((index, *box.offsets), (1, *box.sizes)) for box in boxes_of_range(shape[1:], start, end)
    ]


def range_of_box(shape: Sequence[int], box: Box) -> tuple[int, int] | None:
    """Return the flat range [start, end) of a box, None if its elements are not contiguous.

    Raises:
        ValueError: the box exceeds the tensor. The message is a fragment, to which the caller adds
            the name of the tensor.
    """
    if not len(shape) == len(box.offsets) == len(box.sizes):
        raise ValueError(
            f"{box} and a tensor of {list(shape)} differ in their number of dimensions"
        )
    start, stride, is_partial, has_gaps = 0, 1, False, False
    for size, offset, extent in zip(
        reversed(shape), reversed(box.offsets), reversed(box.sizes), strict=True
    ):
        if offset < 0 or extent < 0 or offset + extent > size:
            raise ValueError(f"{box} exceeds a tensor of {list(shape)}")
        # If the box covers a dimension only in part, every outer dimension must have one index.
        has_gaps |= is_partial and extent > 1
        is_partial |= extent != size
        start += offset * stride
        stride *= size
    return None if has_gaps and box.numel > 0 else (start, start + box.numel)


def boxes_of_part(tensor: torch.Tensor, order: Sequence[int], start: int, end: int) -> list[Box]:
    """Cut a range of this rank's elements of a tensor into boxes of the whole tensor, in order.

    Args:
        tensor: a plain tensor, of which this rank has all elements, or a DTensor.
        order: dimensions of this rank's part in memory order, the outermost first.
        start, end: the range [start, end) of the part's elements in memory order.

    Returns:
        Boxes whose elements follow each other in this rank's memory.
    """
    local = local_of(tensor)
    boxes = boxes_of_range([local.shape[dim] for dim in order], start, end)
    if local is tensor or not boxes:
        return boxes
    runs = [_runs(indices_of_part(tensor, dim), local.shape[dim]) for dim in order]
    return [placed for box in boxes for placed in _in_whole(box, runs)]


class _Run(NamedTuple):
    """Indices [low, low + length) of a local part are [first, first + length) of the whole."""

    low: int
    first: int
    length: int


def _runs(indices: torch.Tensor | None, size: int) -> list[_Run]:
    """Return the runs of one dimension of `size` indices, which in the whole are `indices`."""
    if indices is None:
        return [_Run(0, 0, size)]
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    lows = [0, *breaks.tolist()]
    firsts = indices[lows].tolist()
    return [
        _Run(low, first, end - low)
        for low, first, end in zip(lows, firsts, [*lows[1:], size], strict=True)
    ]


def _in_whole(box: Box, runs: Sequence[Sequence[_Run]]) -> Iterator[Box]:
    """Yield the boxes of the whole tensor that a box of the local part consists of."""
    parts: list[list[tuple[int, int]]] = []  # by dimension: first index and number of indices
    for low, size, along in zip(*box, runs, strict=True):
        cuts = [(max(low, run.low), min(low + size, run.low + run.length), run) for run in along]
        parts.append(
            [(run.first + start - run.low, end - start) for start, end, run in cuts if start < end]
        )
    # Inside a dimension of several runs, only one index at a time of the outer ones is contiguous.
    innermost = max((dim for dim, cuts in enumerate(parts) if len(cuts) > 1), default=0)
    for dim in range(innermost):
        parts[dim] = [(first + i, 1) for first, count in parts[dim] for i in range(count)]
    for chosen in product(*parts):
        yield Box(tuple(first for first, _ in chosen), tuple(count for _, count in chosen))


def overlap(one: Box, other: Box) -> Box | None:
    """Return the elements that two boxes share; None if there are none."""
    starts = tuple(map(max, one.offsets, other.offsets))
    sizes = tuple(
        min(a + m, b + n) - start for a, m, b, n, start in zip(*one, *other, starts, strict=True)
    )
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def find_fault(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[tuple[int, ...], int] | None:
    """Find an element of a tensor that is not in exactly one of the boxes.

    Args:
        boxes: non-empty ones inside the tensor.

    Returns:
        The first such element, and the number of boxes that have it. None if there is none.

    Raises:
        ValueError: the boxes divide more than `MAX_CUT_DIMS` dimensions.

    Cost: proportional to the number of boxes.
    """
    # Boxes cover each element once if and only if the sum of their indicator functions is that of
    # the whole tensor. Both are determined by their differences along every dimension, which for a
    # box are 1 or -1 at each corner, and 0 elsewhere.
    whole = Box((0,) * len(shape), tuple(shape))
    dims = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] < size for box in boxes)]
    if len(dims) > MAX_CUT_DIMS:
        raise ValueError(f"its pieces divide {len(dims)} dimensions, more than {MAX_CUT_DIMS}")
    corners: dict[tuple[int, ...], int] = {}
    for sign, box in [(-1, whole), *((1, box) for box in boxes)]:
        # Dimensions that no box divides are the same for all corners.
        ends = [((box.offsets[d], 1), (box.offsets[d] + box.sizes[d], -1)) for d in dims]
        for chosen in product(*ends):
            corner = tuple(at for at, _ in chosen)
            corners[corner] = corners.get(corner, 0) + sign * prod(way for _, way in chosen)
    wrong = min((corner for corner, total in corners.items() if total != 0), default=None)
    if wrong is None:
        return None
    # No element before the first wrong corner has a wrong count, so this is the count there.
    element = [0] * len(shape)
    for dim, index in zip(dims, wrong, strict=True):
        element[dim] = index
    return tuple(element), 1 + corners[wrong]


def views_of(data: torch.Tensor, boxes: Sequence[Box]) -> list[tuple[Box, torch.Tensor]]:
    """Return each box with its elements, as a view in the shape of the box.

    Args:
        data: (n,) the elements of the boxes, one box after the other.
    """
    ends = accumulate((box.numel for box in boxes), initial=0)
    return [
        (box, data[start : start + box.numel].view(box.sizes))
        for box, start in zip(boxes, ends, strict=False)
    ]


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a dense tensor's dimensions in memory order, the outermost first."""
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride()[dim], dim)))


def inverse_order(order: Sequence[int]) -> list[int]:
    """Return the permutation from memory order back to logical order."""
    return [order.index(dim) for dim in range(len(order))]
