"""The bigram baseline against counting pair by pair."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from offload_adam.train.data import bigram_loss


def naive_loss(training: bytes, validation: bytes, smoothing: float) -> float:
    counts: dict[tuple[int, int], int] = {}
    totals: dict[int, int] = {}
    for pair in itertools.pairwise(training):
        counts[pair] = counts.get(pair, 0) + 1
        totals[pair[0]] = totals.get(pair[0], 0) + 1
    loss = 0.0
    for pair in itertools.pairwise(validation):
        numerator = counts.get(pair, 0) + smoothing
        loss -= math.log(numerator / (totals.get(pair[0], 0) + 256 * smoothing))
    return loss / (len(validation) - 1)


@pytest.mark.parametrize("smoothing", [1.0, 0.25])
def test_it_is_what_counting_gives(smoothing: float) -> None:
    training = b"the quick brown fox jumps over the lazy dog; \xff\x00\xff the end of the text"
    validation = b"then the other \x80 dog jumped"
    loss = bigram_loss(
        np.frombuffer(training, dtype=np.uint8),
        np.frombuffer(validation, dtype=np.uint8),
        smoothing=smoothing,
    )
    assert loss == pytest.approx(naive_loss(training, validation, smoothing), rel=1e-12)


def test_without_any_pattern_it_stands_at_the_logarithm_of_256() -> None:
    noise = np.random.default_rng(0).integers(256, size=4_000_000).astype(np.uint8)
    assert bigram_loss(noise[:-10000], noise[-10000:]) == pytest.approx(math.log(256), abs=0.02)
