"""Which sequences a rank sees: a function of the seed and of how many all ranks have seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.train.corpus import ByteTokens


class Batch(NamedTuple):
    """Tokens and the token that follows each: (batch, time) int64 both."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(self.inputs.to(device), self.targets.to(device))


def sample_batch(
    tokens: ByteTokens, batch_size: int, sequence_length: int, *, seed: int, first: int
) -> Batch:
    """Draw the run's samples number `first` and following, uniformly.

    Each is a pure function of seed and number, so a run that goes on needs to know no more than how
    many have been drawn, whichever rank of however many ranks draws them.
    """
    numbers = range(first, first + batch_size)
    most = tokens.size - sequence_length
    starts = [int(np.random.default_rng((seed, number)).integers(most)) for number in numbers]
    return cut_batch(tokens, np.array(starts, dtype=np.int64), sequence_length)


def evaluation_starts(
    num_tokens: int, sequence_length: int, num_sequences: int
) -> npt.NDArray[np.int64]:
    """Return where to cut evenly spread sequences that share no target, at most `num_sequences`."""
    num_sequences = min(num_sequences, (num_tokens - 1) // sequence_length)
    last_start = num_tokens - 1 - sequence_length
    return np.linspace(0, last_start, num_sequences).astype(np.int64)


def cut_batch(tokens: ByteTokens, starts: npt.NDArray[np.int64], sequence_length: int) -> Batch:
    """Return the sequences that begin at `starts`, one row each."""
    rows = tokens[starts[:, np.newaxis] + np.arange(sequence_length + 1)].astype(np.int64)
    return Batch(torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:]))
