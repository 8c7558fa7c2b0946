"""A small model whose training steps are slow enough for a test to kill a rank between two."""

from __future__ import annotations

import time

import torch
from torch import nn

FORWARD_S = 0.02


class SlowEmbedding(nn.Embedding):
    """Sleeps in each forward of the training."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(FORWARD_S)
        return super().forward(tokens)


def make_model() -> nn.Module:
    """Return a model with dropout, which shows whether random states are restored."""
    return nn.Sequential(SlowEmbedding(256, 16), nn.Dropout(0.2), nn.Linear(16, 256))
