"""The model that `bench train` trains: a plain decoder with random weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = ("bfloat16", "float16", "float32")
SIZES_HELP = {
    "num_layers": "number of blocks",
    "width": "width of the residual stream",
    "num_heads": "attention heads; must divide the width",
    "vocabulary": "rows of the embedding and of the head",
    "sequence_length": "tokens of a sequence; batches differ in the number of sequences",
    "dtype": "dtype of the parameters: " + ", ".join(DTYPES),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes and dtype of the model; SIZES_HELP has their meanings."""

    num_layers: int = 8
    width: int = 1536
    num_heads: int = 12
    vocabulary: int = 1024
    sequence_length: int = 512
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "vocabulary", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide width ({self.width}): change one of them"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `Sizes`."""
    for size in fields(Sizes):
        parser.add_argument(
            f"--{size.name.replace('_', '-')}",
            type=type(size.default),
            default=size.default,
            help=f"{SIZES_HELP[size.name]}; default: %(default)s",
        )


def read_sizes(options: argparse.Namespace) -> Sizes:
    """Return the sizes that these options give.

    Raises:
        argparse.ArgumentTypeError: they are not the sizes of a model.
    """
    try:
        return Sizes(**{size.name: getattr(options, size.name) for size in fields(Sizes)})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Block(nn.Module):
    """Attention and a GELU network, each with layer norm at its input and a residual connection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_input = nn.Linear(width, 4 * width, bias=False)
        self.mlp_output = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_output(mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(self.mlp_input(self.mlp_norm(x)))
        return x + self.mlp_output(inner)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Maps (batch, time) tokens to the mean cross entropy of the next token.

    Blocks are recomputed in backward, for every contender alike. Otherwise the large batches, whose
    forward takes as long as the update, would not fit into a GPU.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(
            Block(sizes.width, sizes.num_heads) for _ in range(sizes.num_layers)
        )
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_model(sizes: Sizes, device: torch.device) -> Decoder:
    """Return the model; its weights are the same in every process."""
    torch.manual_seed(0)
    with torch.device(device):
        return Decoder(sizes).to(sizes.torch_dtype)


def make_tokens(sizes: Sizes, num_sequences: int, device: torch.device) -> torch.Tensor:
    """Return (num_sequences, sequence_length + 1) int64 tokens, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_sequences, sizes.sequence_length + 1)
    return torch.randint(sizes.vocabulary, shape, generator=generator).to(device)
