"""A tiny language model and its data, made from a configuration, without a download."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 32
LENGTH = 8
# Adam divides by |g|, so the last bits of a tiny gradient would decide the sign of an update. With
# this eps an error of d in a gradient moves a weight by at most LR / EPS * d = d a step.
LR = 1e-2
EPS = 1e-2


def make_model(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Return GPT-2 with two layers and tied embeddings; the same weights at each call."""
    torch.manual_seed(7)
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).to(dtype)


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences in which each token follows from the one before, so that they can be learned."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        token, tokens = index % VOCABULARY, []
        for _ in range(LENGTH):
            tokens.append(token)
            token = (5 * token + 3) % VOCABULARY
        text = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        return {"input_ids": text, "labels": text.clone()}


def forget_accelerator() -> None:
    """Let the next Accelerator or Trainer of this process find out about its ranks anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
