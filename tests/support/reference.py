"""A small model with given gradients, and the result of torch's Adam on it in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Gradients = Sequence[torch.Tensor | None]


class Weights(torch.nn.Module):
    """Named parameters `w0`, `w1`, ...; the loss of `forward` has exactly the given gradients."""

    w0: torch.nn.Parameter
    w1: torch.nn.Parameter
    w2: torch.nn.Parameter
    w3: torch.nn.Parameter

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 1,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for number, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(f"w{number}", torch.nn.Parameter(values))

    @property
    def all(self) -> list[torch.nn.Parameter]:
        """All parameters in their order."""
        return list(self.parameters())

    def forward(self, gradients: Gradients, order: Sequence[int] | None = None) -> torch.Tensor:
        """Use the parameters that have a gradient, in this order: backward goes the other way."""
        weights = self.all
        loss = torch.zeros(())
        for position in range(len(weights)) if order is None else order:
            gradient = gradients[position]
            if gradient is not None:
                loss = loss + (weights[position] * gradient).sum().float()
        return loss


def exact_gradients(
    parameters: Sequence[torch.Tensor], seed: int, world_size: int
) -> list[torch.Tensor]:
    """Return gradients whose sum and mean over the ranks are exact in every dtype used here.

    Multiples of world_size / 64 up to world_size / 4: a sum over 4 ranks needs 8 bits.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(-16, 17, p.shape, generator=generator) * world_size / 64).to(p.dtype)
        for p in parameters
    ]


def mean_of(by_rank: Sequence[Gradients]) -> list[torch.Tensor | None]:
    """Return float64 means over the ranks; a missing gradient counts as 0, None if all lack it."""
    means: list[torch.Tensor | None] = []
    for gradients in zip(*by_rank, strict=True):
        present = [gradient.double() for gradient in gradients if gradient is not None]
        means.append(torch.stack(present).sum(0) / len(by_rank) if present else None)
    return means


def adam_in_float64(
    weights: Sequence[torch.Tensor],
    steps: Sequence[Gradients],
    *,
    max_grad_norm: float | None = None,
    decoupled: bool = False,
    **options: Any,
) -> list[torch.Tensor]:
    """Return the weights after these steps of torch's plain Adam or AdamW."""
    parameters = [torch.nn.Parameter(weight.detach().double()) for weight in weights]
    maker = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = maker(parameters, foreach=False, **{"weight_decay": 0.0, **options})
    for gradients in steps:
        squares = sum(float(g.double().square().sum()) for g in gradients if g is not None)
        factor = 1.0
        if max_grad_norm is not None:
            factor = min(1.0, max_grad_norm / (math.sqrt(squares) + 1e-6))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.double() * factor
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


class Outcome(NamedTuple):
    """How a call ended: the exception's type ("" for none) and its text."""

    error: str
    message: str


def outcome_of(action: Callable[[], object]) -> Outcome:
    """Call `action` and return how it ended, so that a test can compare the errors of ranks."""
    try:
        action()
    except Exception as error:
        return Outcome(type(error).__name__, str(error))
    return Outcome("", "")


def bits(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Return each tensor's elements as bytes, in the order of its indices."""
    return [t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
