"""Read gradients from `.grad`, and refuse those that cannot be used, by the parameter's name."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch

_grad = attrgetter("grad")
_kind = attrgetter("layout", "dtype", "is_cuda")
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class GradientReader:
    """Reads the gradients of one bucket's parameters in their memory order.

    Attributes are read by `map`: a loop in Python over ten thousand small parameters would cost
    more than their update.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]) -> None:
        self._names = list(names)
        self._parameters = list(parameters)
        self._numels = [parameter.numel() for parameter in parameters]
        self._all_contiguous = all(parameter.is_contiguous() for parameter in parameters)
        self._on_cuda = parameters[0].is_cuda

    def read(self) -> list[torch.Tensor | None]:
        """Return each parameter's gradient in the parameter's own element order, or None.

        A gradient whose strides differ from the parameter's is copied; all others are returned as
        they are.

        Raises:
            ValueError: naming the parameter, for a sparse or complex gradient or one on another
                device.
        """
        gradients: list[torch.Tensor | None] = list(map(_grad, self._parameters))
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) == len(gradients) and self._are_plain(present):
            return gradients
        for position, gradient in enumerate(gradients):
            if gradient is not None:
                if not self._is_usable(gradient, self._numels[position]):
                    self._refuse(position, gradient)
                gradients[position] = self._conform(position, gradient)
        return gradients

    def _are_plain(self, gradients: list[torch.Tensor]) -> bool:
        """Tell whether the gradients of all parameters can be taken without a second look."""
        kinds = set(map(_kind, gradients))
        return (
            self._all_contiguous
            and all(
                layout is torch.strided and dtype in _FORMATS and is_cuda == self._on_cuda
                for layout, dtype, is_cuda in kinds
            )
            and list(map(torch.Tensor.numel, gradients)) == self._numels
            and all(map(torch.Tensor.is_contiguous, gradients))
            and not any(map(torch.Tensor.is_neg, gradients))
        )

    def _is_usable(self, gradient: torch.Tensor, numel: int) -> bool:
        return (
            gradient.layout is torch.strided
            and gradient.dtype in _FORMATS
            and gradient.numel() == numel
            and gradient.is_cuda == self._on_cuda
        )

    def _conform(self, position: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient in its parameter's memory order, copied only where it is not."""
        parameter = self._parameters[position]
        # A view of a conjugate's imaginary part is negated only when it is read by torch.
        gradient = gradient.resolve_neg()
        if parameter.is_contiguous() and gradient.is_contiguous():
            return gradient
        if gradient.stride() == parameter.stride():
            return gradient
        ordered = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
        )
        return ordered.copy_(gradient)

    def _refuse(self, position: int, gradient: torch.Tensor) -> None:
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
