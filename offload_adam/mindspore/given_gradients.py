"""Gradients that are handed to the optimizer instead of left in `.grad`."""

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
        ValueError: another number of gradients; another shape or device than the parameter's.
        TypeError: not a sequence; neither tensor nor None; another dtype or layout.
    """
    if isinstance(gradients, torch.Tensor) or not isinstance(gradients, Sequence):
        raise TypeError(
            f"gradients must be a tuple with one entry for each parameter, not a "
            f"{type(gradients).__name__}"
        )
    if len(gradients) != len(parameters):
        raise ValueError(
            f"there are {len(gradients)} gradients for {len(parameters)} parameters: give one "
            "each, in the order of `parameters`, None where there is none"
        )
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        if gradient is not None:
            _check(name, parameter, gradient)
    return list(gradients)


def _check(name: str, parameter: torch.Tensor, gradient: object) -> None:
    what = f"the gradient given for parameter {name!r}"
    if isinstance(gradient, StandIn):
        raise TypeError(
            f"{what} is a stand-in, because the optimizer streams gradients out of .grad. Call "
            "step(), or construct the optimizer without module= to keep gradients in .grad"
        )
    if not isinstance(gradient, torch.Tensor):
        raise TypeError(f"{what} is a {type(gradient).__name__}: give a tensor or None")
    if not parameter.requires_grad:
        raise ValueError(f"{what} has no use: the parameter does not require a gradient; give None")
    if gradient.dtype != parameter.dtype:
        raise TypeError(f"{what} has dtype {gradient.dtype}, the parameter {parameter.dtype}")
    if gradient.layout not in _LAYOUTS:
        raise TypeError(f"{what} is {gradient.layout}; dense and torch.sparse_coo are allowed")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{what} has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}"
        )
    if gradient.device != parameter.device:
        raise ValueError(f"{what} is on {gradient.device}, the parameter on {parameter.device}")


@contextmanager
def in_place_of_grad(
    parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Iterator[None]:
    """Let these be the parameters' `.grad` inside, and what was there again afterwards."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach()
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
