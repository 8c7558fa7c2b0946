"""Models sharded by FSDP2 and tensor parallelism, their batches, and training runs to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from offload_adam import OffloadAdamW
from offload_adam.step.update_tasks import UpdateTasks

LR = 1e-2
# Adam divides by |g|: with this eps, an error of d in a gradient moves a weight by LR / EPS * d.
EPS = 1e-2
MAX_NORM = 0.5
NUM_TOKENS = 11

_update = UpdateTasks.update


class Block(nn.Module):
    """A layer; by default, its sizes divide by neither 2 nor 4, so that FSDP2 pads shards."""

    def __init__(self, *, recomputes: bool = False, width: int = 33) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, width), nn.Linear(width, 16)
        self.recomputes = recomputes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (
            checkpoint(self.inner, hidden, use_reentrant=False)
            if self.recomputes
            else self.inner(hidden)
        )
        return hidden + result

    def inner(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(self.norm(hidden))))
        return result


class Model(nn.Module):
    """A language model of three layers; on four ranks one rank has no row of `gate`."""

    def __init__(self, *, recomputes: bool = False, ties: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 16)
        self.blocks = nn.ModuleList(Block(recomputes=recomputes) for _ in range(3))
        self.gate = nn.Linear(16, 3)
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(16, NUM_TOKENS, bias=False)
        if ties:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.head(hidden * self.gate(hidden).sigmoid().mean(-1, True))
        return result.flatten(0, 1).clone()


def make_model(dtype: torch.dtype = torch.float32, **options: bool) -> Model:
    torch.manual_seed(5)
    return Model(**options).to(dtype)


def shard(model: Model, **options: Any) -> Model:
    """Shard each layer and the rest of the model."""
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def batch_of(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, NUM_TOKENS, (4, 5), generator=generator)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).float(), tokens.flatten())


class Run(NamedTuple):
    """What a run shows: losses and norms in order, and all parameters at its end."""

    values: list[float]
    parameters: list[torch.Tensor]

    def equals(self, other: Run) -> bool:
        return self.values == other.values and all(
            torch.equal(one, same)
            for one, same in zip(self.parameters, other.parameters, strict=True)
        )


@contextmanager
def delayed_updates(seconds: float) -> Iterator[None]:
    """Let every bucket's update begin late."""

    def update(self: UpdateTasks, *args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        _update(self, *args, **kwargs)

    with mock.patch.object(UpdateTasks, "update", update):
        yield


def whole(model: nn.Module) -> list[torch.Tensor]:
    """Return all parameters of a sharded model, whole. Collective."""
    return [
        (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for value in model.state_dict().values()
    ]


def train(
    model: Model,
    *,
    num_steps: int,
    module: bool = True,
    overlap: bool | None = True,
    num_backwards: int = 1,
    rank: int | None = None,
    before_step: Callable[[Model], float | None] = lambda model: None,
    params: Sequence[Any] | None = None,
    **options: Any,
) -> Run:
    """Train a sharded model, and return what the run shows."""
    rank = dist.get_rank() if rank is None else rank
    optimizer = OffloadAdamW(
        list(model.parameters()) if params is None else params,
        lr=LR,
        eps=EPS,
        max_grad_norm=MAX_NORM,
        module=model if module else None,
        overlap=overlap if module else None,
        num_threads=1,
        **options,
    )
    assert optimizer.overlaps is bool(module and overlap)
    values = []
    for step in range(num_steps):
        for turn in range(num_backwards):
            loss = loss_of(model, batch_of(step * num_backwards + turn, rank))
            loss.backward()
            values.append(loss.item())
        found = before_step(model)
        values += [] if found is None else [found]
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        values.append(optimizer.last_step.total_norm)
    run = Run(values, whole(model))
    optimizer.close()
    return run


def train_plain(
    model: Model, world_size: int, *, num_steps: int, num_backwards: int = 1, rank: int = 0
) -> Run:
    """Train the unsharded model in one process in float64, with torch's AdamW and clipping."""
    model = model.double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, eps=EPS, foreach=False)
    values = []
    for step in range(num_steps):
        for turn in range(num_backwards):
            number = step * num_backwards + turn
            losses = []
            for other in range(world_size):
                tokens = batch_of(number, other)
                losses.append(nn.functional.cross_entropy(model(tokens), tokens.flatten()))
            (sum(losses, torch.zeros(())) / world_size).backward()
            values.append(losses[rank].item())
        values.append(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return Run(values, [value.clone() for value in model.state_dict().values()])


def largest_difference(run: Run, exact: Run) -> float:
    """Return the largest absolute difference of any value or parameter."""
    pairs = zip(run.values, exact.values, strict=True)
    tensors = zip(run.parameters, exact.parameters, strict=True)
    return max(
        *(abs(one - other) for one, other in pairs),
        *(float((one.double() - other).abs().max()) for one, other in tensors),
    )
