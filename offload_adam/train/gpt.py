"""The built-in model: a small byte-level GPT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from offload_adam.config.sections import ModelSizes
from offload_adam.train.data import VOCABULARY_SIZE

_INIT_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head width)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block: pre-norm attention and GELU MLP, both added to the residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_input = nn.Linear(width, 4 * width)
        self.mlp_output = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Maps (batch, time) int64 bytes to (batch, time, 256) logits of the next byte.

    max_length: the longest time; each position has its own embedding.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
    """

    def __init__(self, sizes: ModelSizes, max_length: int) -> None:
        super().__init__()
        width = sizes.width
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, sizes.num_heads) for _ in range(sizes.num_layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY_SIZE, bias=False)
        if sizes.tied_head:
            self.head.weight = self.token_embedding.weight
        self._init_weights()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))  # type: ignore[no-any-return]

    def _init_weights(self) -> None:
        """Draw all matrices with one scale; those that write to the residual stream with less."""
        residual_std = _INIT_STD / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                writes_residual = name.endswith(("attention.output.weight", "mlp_output.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else _INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
