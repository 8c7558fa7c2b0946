"""ZeRO-1 beside DistributedDataParallel, held to one process in float64 or to torch's AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from offload_adam import FailurePolicy, OffloadAdam, OffloadAdamW, OffloadPolicy, PeerFailedError
from tests.support.ranks import RankError, RankPool

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


# --- unused parameters, no_sync and communication hooks, held to AdamW in the same DDP ---


class Branching(torch.nn.Module):
    """A layer that not every forward uses, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.middle = torch.nn.Linear(6, 20), torch.nn.Linear(20, 20)
        self.last, self.never = torch.nn.Linear(20, 2), torch.nn.Linear(20, 20)

    def forward(self, batch: torch.Tensor, uses_middle: bool = True) -> torch.Tensor:
        hidden = torch.tanh(self.first(batch))
        if uses_middle:
            hidden = torch.tanh(self.middle(hidden))
        result: torch.Tensor = self.last(hidden)
        return result


def loss_of(model: DistributedDataParallel, step: int, uses_middle: bool = True) -> torch.Tensor:
    loss: torch.Tensor = model(batch_of(dist.get_rank(), step), uses_middle).square().mean()
    return loss


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def every_step(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        loss_of(model, step).backward()
        update(optimizer)


def in_turn(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        loss_of(model, step, uses_middle=step % 2 == 0).backward()
        update(optimizer)


def on_one_rank(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        loss_of(model, step, uses_middle=(step + dist.get_rank()) % 2 == 0).backward()
        update(optimizer)


def accumulated(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        with model.no_sync():
            (loss_of(model, 3 * step) / 3).backward()
            # A layer that only a backward within no_sync() has used.
            (loss_of(model, 3 * step + 1, uses_middle=False) / 3).backward()
        (loss_of(model, 3 * step + 2, uses_middle=step > 1) / 3).backward()
        update(optimizer)


def accumulated_after_a_first_step(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer
) -> None:
    loss_of(model, 0).backward()  # a static graph is recorded in the first backward
    update(optimizer)
    for step in range(1, 4):
        with model.no_sync():
            (loss_of(model, 2 * step) / 2).backward()
        (loss_of(model, 2 * step + 1) / 2).backward()
        update(optimizer)


def clipped(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        update(optimizer)


def in_fp16(state, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as text
    """Average gradients in fp16: a communication hook of a user."""
    gradients = bucket.buffer().to(torch.float16).div_(dist.get_world_size())
    future = dist.all_reduce(gradients, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


# What trains, the options of DDP, and its communication hook.
CASES: dict[str, tuple[Callable[..., None], dict[str, Any], Callable[..., Any] | None]] = {
    "unused parameters": (every_step, {"find_unused_parameters": True}, None),
    "used in turn": (in_turn, {"find_unused_parameters": True}, None),
    "used on one rank": (on_one_rank, {"find_unused_parameters": True}, None),
    "no_sync": (accumulated, {"find_unused_parameters": True}, None),
    "static graph": (every_step, {"static_graph": True}, None),
    "static graph, no_sync": (accumulated_after_a_first_step, {"static_graph": True}, None),
    "clipped": (clipped, {"find_unused_parameters": True}, None),
    "a hook of torch": (
        every_step,
        {"find_unused_parameters": True},
        default_hooks.fp16_compress_hook,
    ),
    "a hook of the user": (every_step, {"find_unused_parameters": True}, in_fp16),
}


def train_in_ddp(rank: int, world_size: int, name: str, as_view: bool) -> list[list[torch.Tensor]]:
    """Train with torch's AdamW, with ours, and with ours that is given DDP as module."""
    train, options, hook = CASES[name]
    results = []
    for kind in ("torch", "drop-in", "module"):
        model = Branching()
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_view, **options)
        if hook is not None:
            wrapped.register_comm_hook(None, hook)
        optimizer: torch.optim.Optimizer
        if kind == "torch":
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS)
        else:
            optimizer = OffloadAdamW(
                model.named_parameters(),
                lr=LR,
                eps=EPS,
                gradient_reduction="external",
                module=wrapped if kind == "module" else None,
                offload=OffloadPolicy(bucket_nbytes=512),
                num_threads=1,
            )
        train(wrapped, optimizer)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        if isinstance(optimizer, OffloadAdamW):
            optimizer.close()
    return results


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_training_equals_adamw_in_the_same_ddp(ranks: RankPool, name: str, as_view: bool) -> None:
    first, second = ranks.run(train_in_ddp, 2, name, as_view)
    initial = [parameter.detach() for parameter in Branching().parameters()]
    num_trained = sum(not torch.equal(*pair) for pair in zip(first[0], initial, strict=True))
    assert num_trained == 6  # all but the layer that is never used
    for run, other in zip(first[1:], second[1:], strict=True):
        for weight, same, expected in zip(run, other, first[0], strict=True):
            assert torch.equal(weight, same)
            assert torch.allclose(weight, expected, rtol=0.0, atol=2e-6)


def join_with_uneven_batches(rank: int, world_size: int) -> None:
    model = DistributedDataParallel(Branching(), find_unused_parameters=True)
    optimizer = OffloadAdamW(
        model.parameters(),
        gradient_reduction="external",
        failures=FailurePolicy(stuck_after=2.0),
        num_threads=1,
    )
    with Join([model]):
        for step in range(2 + rank):
            loss_of(model, step).backward()
            update(optimizer)


@pytest.mark.slow
def test_join_with_uneven_batches_raises(own_ranks: RankPool) -> None:
    """A rank without batches no longer calls step(), in which the others wait for it."""
    errors = own_ranks.run(join_with_uneven_batches, 2, expect_errors=True)
    assert isinstance(errors[1], RankError)
    assert errors[1].type is PeerFailedError
    assert "rank 0" in errors[1].message
