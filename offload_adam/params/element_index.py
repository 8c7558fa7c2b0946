"""Indices of the elements of this rank's part of a parameter in the whole parameter.

Random bits for stochastic rounding are a function of an element's index in the whole parameter, in
memory order. So the bits do not depend on how the parameter is sharded.

Example: a parameter of shape (4, 8), sharded along columns over two ranks. The part of rank 1:

    . . . . 04 05 06 07        first = 4     index of its first element
    . . . . 12 13 14 15        run = 4       number of consecutive elements in the whole parameter
    . . . . 20 21 22 23        pitch = 8     distance between the starts of two runs
    . . . . 28 29 30 31        element i: first + i // run * pitch + i % run
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from offload_adam.fsdp_private import indices_of_part, local_of


class ElementIndex(NamedTuple):
    """The indices of a part's elements in the whole parameter, see the module docstring."""

    first: int
    run: int
    pitch: int


def element_index(parameter: torch.Tensor) -> ElementIndex:
    """Return the indices of the elements of this rank's part of a parameter.

    In two cases the result counts consecutively from the part's first element: if two dimensions
    other than the outermost are sharded, or if the indices of one dimension have gaps, as with
    torch's `_StridedShard`. Rounding is then reproducible, but depends on the sharding.

    Args:
        parameter: a tensor, or a DTensor with this rank's part of the parameter.
    """
    local = local_of(parameter)
    numel = local.numel()
    if local is parameter or numel == 0:
        return ElementIndex(0, max(numel, 1), max(numel, 1))
    order = sorted(range(local.dim()), key=lambda dim: (-local.stride()[dim], dim))
    first, pitch, has_gaps = 0, 1, False
    cuts: list[tuple[int, int]] = []
    for place, dim in reversed(list(enumerate(order))):
        size, part = parameter.shape[dim], local.shape[dim]
        indices = indices_of_part(parameter, dim)
        if indices is not None:
            first += int(indices[0]) * pitch
            has_gaps |= int(indices[-1] - indices[0]) != part - 1
            if place > 0 and part < size:
                cuts.append((part * pitch, size * pitch))
        pitch *= size
    if has_gaps or len(cuts) != 1:
        return ElementIndex(first, numel, numel)
    return ElementIndex(first, *cuts[0])
