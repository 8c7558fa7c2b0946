"""A model whose gradients are exactly its inputs, with the same bits on a GPU and on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload_adam import OffloadAdam
from tests.support.policies import in_policies

SHAPES = ((300, 7), (130,), (64, 64), (1,), (2, 3, 4, 5), (1000,))
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


class Unit(nn.Module):
    """A few parameters; its forward reads each of them once."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
        )

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        terms = [(w * g).sum().float() for w, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(terms).sum()


class Layers(nn.Module):
    """Units in a ModuleList. The forward of each unit waits for its own buckets."""

    def __init__(self, num_units: int = 6, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.units = nn.ModuleList(
            Unit(dtypes[number % len(dtypes)], generator) for number in range(num_units)
        )

    def forward(self, gradients: list[list[torch.Tensor]]) -> torch.Tensor:
        return torch.stack(
            [unit(given) for unit, given in zip(self.units, gradients, strict=True)]
        ).sum()


def gradients_of(model: Layers, step: int, device: str) -> list[list[torch.Tensor]]:
    """Return the gradients of a step, the same on every device."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        [
            torch.randn(p.shape, generator=generator).to(p.dtype).to(device)
            for p in unit.parameters()
        ]
        for unit in model.units
    ]


def make(
    device: str, kind: type[OffloadAdam] = OffloadAdam, **options: Any
) -> tuple[Layers, OffloadAdam]:
    """Return a model and its streaming optimizer."""
    model = Layers().to(device)
    settings: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "max_grad_norm": 20.0,
        "bucket_nbytes": 8192,
        "module": model,
    }
    return model, kind(model.parameters(), **in_policies(**(settings | options)))


def train(model: Layers, optimizer: OffloadAdam, steps: range, device: str) -> None:
    """Take steps."""
    for step in steps:
        model(gradients_of(model, step, device)).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model: Layers, optimizer: OffloadAdam) -> list[dict[str, torch.Tensor]]:
    """Return host copies of every parameter and its state.

    An fp32 parameter without a master weight in its state is its own master weight.
    """
    optimizer.synchronize()
    found = []
    for parameter in model.parameters():
        named = {"weight": parameter, "master_weight": parameter, **optimizer.state[parameter]}
        found.append({key: value.detach().cpu().clone() for key, value in named.items()})
    return found


def assert_same_bits(
    one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]
) -> None:
    """Compare every element of every tensor."""
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        for key in first.keys() & second.keys():
            assert torch.equal(first[key], second[key]), (number, key)
