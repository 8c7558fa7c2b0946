"""Two ranks on one GPU over gloo: sharded steps with CUDA streams give the bits of the CPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.coordinator import ranks
from tests.gpu.layers import assert_same_bits, bits, make, train
from tests.support.ranks import RankPool

NUM_STEPS = 8
TIMEOUT_S = 60.0

RankBits = list[dict[str, torch.Tensor]]


def train_rank(
    rank: int, world_size: int, device: str, kind: type[OffloadAdam], overlap: bool
) -> RankBits:
    """Train, and return copies of all state. Uses gloo, since NCCL rejects two ranks on one GPU."""
    open_group = ranks._open_group

    def open_gloo(of: Any, purpose: str, backend: str) -> Any:
        return open_group(of, purpose, "gloo")

    with mock.patch.object(ranks, "_open_group", open_gloo):
        model, optimizer = make(device, kind, overlap=overlap)
        train(model, optimizer, range(NUM_STEPS), device)
        found = bits(model, optimizer)
        optimizer.close()
    for state in found:
        # On a CPU, an fp32 parameter is its own master weight, whole on every rank. On a GPU, the
        # master weight is a shard. The values are compared as the weight.
        if state["weight"].dtype == torch.float32:
            del state["master_weight"]
    return found


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> list[RankBits]:
    return ranks.run(train_rank, 2, "cpu", OffloadAdam, False, timeout=TIMEOUT_S)


@pytest.mark.parametrize("overlap", [False, True])
def test_two_ranks_on_one_gpu_have_the_bits_of_the_cpu(
    ranks: RankPool, expected: list[RankBits], overlap: bool
) -> None:
    found = ranks.run(train_rank, 2, "cuda", OffloadAdam, overlap, timeout=TIMEOUT_S)
    for mine, reference in zip(found, expected, strict=True):
        assert_same_bits(mine, reference)
