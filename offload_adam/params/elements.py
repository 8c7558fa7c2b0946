"""Formats of tensor elements, and their order in flat arrays.

A parameter keeps its strides in its bucket if its elements fill memory without gaps, as with
channels_last. Otherwise it becomes contiguous. Flat arrays hold the elements of a parameter, its
gradient and its state in this memory order.

Worked example: a parameter of shape (2, 3), whose element at [i, j] is called ij.

    strides    kept      strides in the bucket    elements in memory order
    (3, 1)     yes       (3, 1)                   00 01 02 10 11 12
    (1, 2)     yes       (1, 2)                   00 10 01 11 02 12
    (8, 1)     no        (3, 1)                   00 01 02 10 11 12
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import to_dlpack

from offload_adam.kernels.formats import FloatFormat

FORMATS: dict[torch.dtype, FloatFormat] = {
    getattr(torch, element_format.value): element_format for element_format in FloatFormat
}
"""The supported dtypes of parameters and gradients, and their formats in the kernels."""


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return a host tensor as a NumPy array of the dtype that the kernels use for its format."""
    if tensor.dtype == torch.uint8:  # codes
        return tensor.numpy()
    bits_dtype = FORMATS[tensor.dtype].bits_dtype
    if tensor.dtype != torch.float32:
        tensor = tensor.view(torch.int16)  # NumPy has no bfloat16
    return tensor.detach().numpy().view(bits_dtype)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor of one of `FORMATS`, to compare: NaN equals itself, 0 not -0."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def memory_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a parameter's strides in its bucket: its own if it has no gaps, else contiguous."""
    if tensor.is_contiguous():
        return tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]))
    expected = 1
    for dim in order:
        if tensor.shape[dim] != 1:  # torch may give a dimension of size 1 any stride
            if tensor.stride(dim) != expected:
                return _contiguous_strides(tensor.shape)
            expected *= tensor.shape[dim]
    return tensor.stride()


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def with_own_storage(part: torch.Tensor) -> torch.Tensor:
    """Return a tensor like `part` over the same memory, whose storage has only these elements.

    `torch.save` and `copy.deepcopy` handle whole storages, and so touch no other parameters.
    """
    # DLPack exports from the current device only.
    on_device = torch.cuda.device_of(part) if part.is_cuda else nullcontext()
    with on_device:
        # `from_dlpack(part)` does the same, but asks the tensor for its device and stream first,
        # which takes several times as long.
        return torch.from_dlpack(to_dlpack(part))


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor without gaps as a 1-d view in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def in_shape_of(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return flat elements in a parameter's shape, as a view: the inverse of `in_memory_order`."""
    if parameter.dim() == 1:
        return flat
    return flat.as_strided(parameter.shape, memory_strides(parameter))
