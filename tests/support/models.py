"""The model of the checkpoint tests. Saved files depend on it, so do not change it."""

from __future__ import annotations

import torch
from torch import nn


class Model(nn.Module):
    """Shapes that no world size divides, buffers, and empty, frozen and tied parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 37)
        self.tied = self.head
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.conv(inputs)).mean((2, 3))) * self.scale
        return found + self.empty.sum() + self.frozen.sum()
