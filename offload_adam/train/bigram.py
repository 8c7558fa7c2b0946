"""The bar that a language model has to clear: guessing each byte from the one before it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from offload_adam.train.corpus import VOCABULARY_SIZE, ByteTokens


def bigram_loss(training: ByteTokens, validation: ByteTokens, smoothing: float = 1.0) -> float:
    """Return the mean cross entropy, in nats a token, of a bigram model on the validation split.

    Its probabilities are the training split's counts of pairs, each raised by `smoothing`.
    """
    counts = _pair_counts(training) + smoothing
    log_probabilities = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
    seen = _pair_counts(validation)
    return float(-(seen * log_probabilities).sum() / seen.sum())


def _pair_counts(tokens: ByteTokens) -> npt.NDArray[np.int64]:
    """Return how often each byte (column) follows each byte (row), (256, 256) int64."""
    pairs = tokens[:-1].astype(np.int64) * VOCABULARY_SIZE + tokens[1:]
    counts = np.bincount(pairs, minlength=VOCABULARY_SIZE**2)
    return counts.reshape(VOCABULARY_SIZE, VOCABULARY_SIZE)
