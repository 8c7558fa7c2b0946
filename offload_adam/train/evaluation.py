"""The validation loss, the same whatever the number of ranks that share the work."""

from __future__ import annotations

import torch
from torch import nn

from offload_adam.config.sections import TrainSection
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.startup import World
from offload_adam.train.corpus import ByteTokens
from offload_adam.train.loss import next_token_loss
from offload_adam.train.sampling import cut_batch, evaluation_starts


@torch.no_grad()
def evaluate(model: nn.Module, tokens: ByteTokens, train: TrainSection, world: World) -> float:
    """Return the mean loss in nats over `eval_sequences` sequences spread over the split.

    A collective: every rank takes its part of the sequences, and every rank gets the mean.
    """
    starts = evaluation_starts(tokens.size, train.sequence_length, train.eval_sequences)
    own = starts[world.rank :: world.world_size]
    total = torch.zeros(2, dtype=torch.float64, device="cpu")  # sum of losses, number of sequences
    was_training = model.training
    model.eval()
    for first in range(0, len(own), train.batch_size):
        chosen = own[first : first + train.batch_size]
        batch = cut_batch(tokens, chosen, train.sequence_length).to(world.device)
        loss = next_token_loss(model, batch)
        total += torch.tensor(
            [loss.item() * len(chosen), len(chosen)], dtype=torch.float64, device="cpu"
        )
        PROGRESS.move()
    model.train(was_training)
    world.ranks.all_reduce(total)
    return float(total[0] / total[1])
