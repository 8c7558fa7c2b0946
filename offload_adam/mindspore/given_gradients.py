"""Check gradients that are passed to `opt(gradients)`, and put them into `.grad` for one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from offload_adam.gradients.stand_in import StandIn

_LAYOUTS = (torch.strided, torch.sparse_coo)


def check_given(
    gradients: object, names: Sequence[str], parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Return the gradients as a list, one for each parameter, each usable as its `.grad`.

    Raises:
        ValueError: the number of gradients is wrong, or a shape or device is not the parameter's.
        TypeError: not a sequence, an entry is neither tensor nor None, or a dtype or layout is
            wrong.
    """
    if isinstance(gradients, torch.Tensor) or not isinstance(gradients, Sequence):
        raise TypeError(
            "gradients must be a tuple with one entry for each parameter, not a "
            f"{type(gradients).__name__}"
        )
    if len(gradients) != len(parameters):
        raise ValueError(
            f"Got {len(gradients)} gradients for {len(parameters)} parameters. Pass a gradient or "
            "None for each parameter, in the order of `optimizer.parameters`."
        )
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        if gradient is not None:
            _check(name, parameter, gradient)
    return list(gradients)


def _check(name: str, parameter: torch.Tensor, gradient: object) -> None:
    what = f"The gradient given for parameter {name!r}"
    if isinstance(gradient, StandIn):
        raise TypeError(
            f"{what} is a stand-in, because the optimizer streams gradients out of .grad. Call "
            "step(), or construct the optimizer without module= to keep gradients in .grad."
        )
    if not isinstance(gradient, torch.Tensor):
        raise TypeError(f"{what} is a {type(gradient).__name__}. Pass a tensor or None.")
    if not parameter.requires_grad:
        raise ValueError(
            f"{what} has no effect, because the parameter does not require a gradient. Pass None."
        )
    if gradient.dtype != parameter.dtype:
        raise TypeError(f"{what} has dtype {gradient.dtype} instead of {parameter.dtype}.")
    if gradient.layout not in _LAYOUTS:
        raise TypeError(
            f"{what} has the layout {gradient.layout}. Pass a dense or torch.sparse_coo tensor."
        )
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{what} has shape {tuple(gradient.shape)} instead of {tuple(parameter.shape)}."
        )
    if gradient.device != parameter.device:
        raise ValueError(f"{what} is on {gradient.device} instead of {parameter.device}.")


@contextmanager
def in_place_of_grad(
    parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Iterator[None]:
    """Set the parameters' `.grad` to these gradients inside the context, then restore it."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach()
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
