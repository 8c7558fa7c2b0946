"""The language model's loss on a batch, in fp32 whatever the model computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from offload_adam.config import ConfigError
from offload_adam.train.corpus import VOCABULARY_SIZE
from offload_adam.train.sampling import Batch


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean cross entropy, in nats a token, of the model's guesses; 0-d, fp32.

    Raises: ConfigError where the model returns anything but (batch, time, vocabulary) logits.
    """
    logits = model(batch.inputs)
    _check_logits(logits, batch)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def _check_logits(logits: object, batch: Batch) -> None:
    wanted = f"({batch.inputs.shape[0]}, {batch.inputs.shape[1]}, {VOCABULARY_SIZE} or more)"
    if not isinstance(logits, torch.Tensor):
        got = type(logits).__name__
    elif (
        logits.dim() != 3
        or logits.shape[:2] != batch.inputs.shape
        or logits.shape[2] < VOCABULARY_SIZE
        or not logits.is_floating_point()
    ):
        got = f"{logits.dtype} of shape {tuple(logits.shape)}"
    else:
        return
    raise ConfigError.at(
        "model.factory", f"the model must return floating logits of shape {wanted}, got {got}"
    )
