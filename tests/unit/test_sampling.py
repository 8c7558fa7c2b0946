"""The sequences drawn for training and evaluation: reproducible, distinct, and evenly spread."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from offload_adam.train.data import cut_batch, evaluation_starts, sample_batch

TOKENS = np.random.default_rng(0).integers(256, size=5000).astype(np.uint8)


def test_targets_are_the_tokens_that_follow() -> None:
    batch = cut_batch(np.arange(100, dtype=np.uint8), np.array([0, 7, 95]), 4)
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [7, 8, 9, 10], [95, 96, 97, 98]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [8, 9, 10, 11], [96, 97, 98, 99]]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def test_a_draw_repeats_and_differs_by_seed_and_number() -> None:
    places = list(itertools.product((0, 1), (0, 4, 8, 10**12)))
    draws = [sample_batch(TOKENS, 4, 16, seed=s, first=f).inputs for s, f in places]
    again = [sample_batch(TOKENS, 4, 16, seed=s, first=f).inputs for s, f in places]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(places)


def test_samples_are_the_same_however_they_are_divided() -> None:
    whole = sample_batch(TOKENS, 12, 16, seed=3, first=100).inputs
    for size in (1, 3, 4):
        firsts = range(100, 112, size)
        parts = [sample_batch(TOKENS, size, 16, seed=3, first=first).inputs for first in firsts]
        assert torch.equal(torch.cat(parts), whole)


def test_every_sequence_that_fits_is_drawn() -> None:
    tokens = np.arange(12, dtype=np.uint8)
    starts = sample_batch(tokens, 500, 8, seed=0, first=0).inputs[:, 0]
    assert sorted(set(starts.tolist())) == [0, 1, 2, 3]  # the last one's target is the last token


def test_evaluation_covers_the_split_without_sharing_a_target() -> None:
    for num_tokens, length, wanted in [(1000, 10, 20), (1000, 10, 500), (11, 10, 5), (25, 8, 9)]:
        starts = evaluation_starts(num_tokens, length, wanted)
        assert len(starts) == min(wanted, (num_tokens - 1) // length)
        assert starts[0] == 0
        assert starts[-1] + length <= num_tokens - 1
        assert all(np.diff(starts) >= length)
