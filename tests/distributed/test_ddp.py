"""ZeRO-1 beside DistributedDataParallel, held to one process in float64 on all ranks' data."""

from __future__ import annotations

import itertools

import torch
from torch.nn.parallel import DistributedDataParallel

from offload_adam import OffloadAdam, OffloadPolicy
from tests.support.ranks import RankPool

NUM_STEPS = 3
LR = 1e-2
# Adam divides by |g|, so that the last bits of a tiny gradient would decide its sign; with this eps
# an error of d in a gradient moves a weight by at most LR / EPS * d = d a step.
EPS = 1e-2


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.LayerNorm(40), torch.nn.Linear(40, 2)
    )
    return model


def batch_of(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator)


def train_one_way(
    rank: int, as_view: bool, static_graph: bool, wraps_first: bool, given: bool
) -> list[torch.Tensor]:
    """Train with DDP; `given`: DDP is given as module, else it is not known and must be said."""
    model = make_model()

    def wrap() -> DistributedDataParallel:
        return DistributedDataParallel(
            model, gradient_as_bucket_view=as_view, static_graph=static_graph, bucket_cap_mb=0
        )

    wrapped = wrap() if wraps_first else None
    optimizer = OffloadAdam(
        model.named_parameters(),
        lr=LR,
        eps=EPS,
        max_grad_norm=1.0,
        module=(wrapped or model) if given else None,
        gradient_reduction=None if given and wraps_first else "external",
        offload=OffloadPolicy(bucket_nbytes=1024),
        num_threads=1,
    )
    wrapped = wrapped or wrap()
    for step in range(NUM_STEPS):
        wrapped(batch_of(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    result = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.close()
    return result


def train_every_way(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    return [train_one_way(rank, *way) for way in itertools.product([False, True], repeat=4)]


def train_in_float64(world_size: int) -> list[torch.Tensor]:
    """Train one model on the concatenated batches, with torch's own clipping and Adam."""
    model = make_model().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, eps=EPS, foreach=False)
    for step in range(NUM_STEPS):
        batch = torch.cat([batch_of(rank, step) for rank in range(world_size)])
        model(batch.double()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def test_training_with_ddp_matches_one_process(ranks: RankPool) -> None:
    expected = train_in_float64(2)
    first, second = ranks.run(train_every_way, 2)
    for way, other in zip(first, second, strict=True):
        for weight, same, exact in zip(way, other, expected, strict=True):
            assert torch.equal(weight, same)
            # fp32 gradients below 4 are off by some 1e-7, three times, as are the roundings.
            assert torch.allclose(weight.double(), exact, rtol=0.0, atol=2e-6)
