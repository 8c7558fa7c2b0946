"""A flat range of a tensor as N-d boxes, each of which is one contiguous run of it.

shape (4, 5), range [3, 17)     . . . X X     box 1: row 0, columns 3 to 4
                                X X X X X     box 2: rows 1 to 2
                                X X X X X
                                X X . . .     box 3: row 3, columns 0 to 1
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """A block of a tensor: the index of its first element, and its sizes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes_of_range(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """Cut elements [start, end) of a row-major tensor into boxes, in order.

    There are at most 2 * ndim - 1, and each one's elements lie together in the flat tensor.
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
    """Cut a range within one slice along the first dimension."""
    return [
        Box((index, *box.offsets), (1, *box.sizes)) for box in boxes_of_range(shape[1:], start, end)
    ]


def range_of_box(shape: Sequence[int], box: Box) -> tuple[int, int]:
    """Return the flat range [start, end) of a box.

    Raises:
        ValueError: the box leaves the tensor, or its elements do not lie together.
    """
    if not len(shape) == len(box.offsets) == len(box.sizes):
        raise ValueError(f"{box} has another number of dimensions than a tensor of {list(shape)}")
    start, stride, open_above = 0, 1, False
    for size, offset, extent in zip(
        reversed(shape), reversed(box.offsets), reversed(box.sizes), strict=True
    ):
        if offset < 0 or extent < 0 or offset + extent > size:
            raise ValueError(f"{box} leaves a tensor of {list(shape)}")
        # Once a dimension is not covered whole, all above it must be a single index.
        if open_above and extent > 1:
            raise ValueError(f"{box} is no contiguous part of a tensor of {list(shape)}")
        open_above = open_above or extent != size
        start += offset * stride
        stride *= size
    return start, start + prod(box.sizes)
