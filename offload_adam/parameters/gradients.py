"""Read gradients from `.grad`, and refuse those that cannot be used, by the parameter's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class GradientsInPlace(NamedTuple):
    """The gradients of one bucket where autograd left them, one entry a parameter.

    tensors: dense, in the parameter's memory order; None where there is none. Holding them keeps
        the memory alive that `addresses` point to.
    addresses: of the first element, 0 where there is none.
    dtypes: all that occur, in a fixed order.
    """

    tensors: list[torch.Tensor | None]
    addresses: list[int]
    dtypes: list[torch.dtype]


class GradientReader:
    """Reads the gradients of one bucket's parameters in their memory order.

    Each gradient is looked at once, all of it together: among ten thousand small ones every object
    is a cache miss, and those cost more than the interpreter.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._names = list(names)
        self._parameters = list(parameters)
        self._numels = [parameter.numel() for parameter in parameters]
        self._all_contiguous = all(parameter.is_contiguous() for parameter in parameters)
        self._on_cuda = parameters[0].is_cuda

    def read(self) -> GradientsInPlace:
        """Return each parameter's gradient in the parameter's own element order, or None.

        A gradient whose strides differ from the parameter's is copied; all others are returned as
        they are.

        Raises:
            ValueError: naming the parameter, for a sparse or complex gradient or one on another
                device.
        """
        tensors: list[torch.Tensor | None] = []
        addresses: list[int] = []
        dtypes: set[torch.dtype] = set()
        plain = self._all_contiguous
        for parameter, numel in zip(self._parameters, self._numels, strict=True):
            gradient = parameter.grad
            if gradient is None:
                tensors.append(None)
                addresses.append(0)
                continue
            if not (
                plain
                and gradient.layout is torch.strided
                and gradient.is_contiguous()
                and gradient.numel() == numel
                and gradient.is_cuda == self._on_cuda
                and not gradient.is_neg()
            ):
                gradient = self._conform(len(tensors), gradient)
            dtypes.add(gradient.dtype)
            tensors.append(gradient)
            addresses.append(gradient.data_ptr())
        for dtype in dtypes.difference(_FORMATS):
            position = next(i for i, t in enumerate(tensors) if t is not None and t.dtype == dtype)
            self._refuse(position, tensors[position])
        return GradientsInPlace(tensors, addresses, sorted(dtypes, key=str))

    def _conform(self, position: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient in its parameter's memory order, copied only where it is not."""
        parameter = self._parameters[position]
        if (
            gradient.layout is not torch.strided
            or gradient.dtype not in _FORMATS
            or gradient.shape != parameter.shape
            or gradient.is_cuda != self._on_cuda
        ):
            self._refuse(position, gradient)
        # A view of a conjugate's imaginary part is negated only when it is read by torch.
        gradient = gradient.resolve_neg()
        if gradient.stride() == parameter.stride():
            return gradient
        if parameter.is_contiguous() and gradient.is_contiguous():
            return gradient
        ordered = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
        )
        return ordered.copy_(gradient)

    def _refuse(self, position: int, gradient: torch.Tensor | None) -> NoReturn:
        assert gradient is not None
        name = self._names[position]
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"the gradient of parameter {name!r} is {gradient.layout}: only dense gradients "
                "are supported (for nn.Embedding pass sparse=False)"
            )
        if gradient.dtype not in _FORMATS:
            raise ValueError(
                f"the gradient of parameter {name!r} has dtype {gradient.dtype}; supported are "
                "float32, bfloat16 and float16"
            )
        parameter = self._parameters[position]
        raise ValueError(
            f"the gradient of parameter {name!r} has shape {tuple(gradient.shape)} on "
            f"{gradient.device}, the parameter {tuple(parameter.shape)} on {parameter.device}"
        )


def in_memory_order(gradient: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements as they lie in memory, 1-d, without a copy."""
    return gradient.as_strided((gradient.numel(),), (1,))
