"""Updates that overlap with the next forward, on ranks that differ, give the sequential bits."""

from __future__ import annotations

import gc
import io
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam, OffloadPolicy, PeerFailedError
from offload_adam.layout.schedule import Operation
from tests.support.ranks import RankError, RankPool
from tests.support.scenario import bits_of
from tests.support.updates import running_first
from tests.unit.overlap.lazy_worker import Lazy

pytestmark = pytest.mark.distributed

WIDTH = 40
NUM_STEPS = 5


class Blocks(nn.Module):
    """Blocks; each rank may leave out different ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, left_out: set[int]) -> torch.Tensor:
        x = self.entry(x)
        for number, block in enumerate(self.blocks):
            if number not in left_out:
                x = torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def left_out(rank: int, step: int, how: str) -> set[int]:
    """Return the blocks that this rank leaves out; its peers leave out different ones."""
    if how == "apart":
        return {(rank + step) % 4, (rank + 2 * step) % 4}
    if how == "last_rank_all" and rank > 0 and step % 2:
        return {0, 1, 2, 3}
    return set()


def train(
    rank: int, world_size: int, how: str, maker: type[OffloadAdam], overlap: bool, dtype: str
) -> list[bytes]:
    model = Blocks().to(getattr(torch, dtype))
    optimizer = maker(
        model.parameters(),
        lr=1e-2,
        module=model,
        overlap=overlap,
        max_grad_norm=1.0,
        offload=OffloadPolicy(bucket_nbytes=4096),
        num_threads=1,
    )
    for step in range(NUM_STEPS):
        x = batch(rank, step).to(model.entry.weight.dtype)
        if how == "skips_backward" and rank == 0 and step == 2:
            model(x, set())
        else:
            model(x, left_out(rank, step, how)).float().square().mean().backward()
        optimizer.step()
        if how == "evaluates" and rank == 0:
            with torch.no_grad():
                model(x, set())
        if how == "saves" and rank == 1:
            model.state_dict()
        optimizer.zero_grad()
    optimizer.synchronize()
    found = [bits_of(parameter) for parameter in model.parameters()]
    optimizer.close()
    return found


HOWS = ["alike", "apart", "last_rank_all", "skips_backward", "evaluates", "saves"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_that_use_different_blocks_keep_one_order_and_the_sequential_bits(
    ranks: RankPool, how: str, dtype: str
) -> None:
    expected = ranks.run(train, 2, how, OffloadAdam, False, dtype)
    assert expected[0] == expected[1]
    for maker in (OffloadAdam, Lazy):
        assert ranks.run(train, 2, how, maker, True, dtype) == expected


def test_three_ranks_that_use_different_blocks(ranks: RankPool) -> None:
    expected = ranks.run(train, 3, "apart", OffloadAdam, False, "bfloat16")
    assert ranks.run(train, 3, "apart", Lazy, True, "bfloat16") == expected


def train_interrupted(rank: int, world_size: int, at: str | None) -> list[bytes]:
    """Interrupt rank 0's wait for the first gather, or in it, and let it go on."""
    model = Blocks()
    optimizer = Lazy(
        model.parameters(),
        lr=1e-2,
        module=model,
        overlap=True,
        offload=OffloadPolicy(bucket_nbytes=4096),
    )
    interrupts = iter([True] if rank == 0 and at is not None else [])

    def interrupted(operation: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*given: object) -> None:
            if operation == at and given[0] is Operation.GATHER and next(interrupts, False):
                raise KeyboardInterrupt
            original(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        stream_waits = optimizer._alive().stream_waits
        for operation in ("wait_before", "record"):
            original = getattr(stream_waits, operation)
            patch.setattr(stream_waits, operation, interrupted(operation, original))
        for step in range(NUM_STEPS):
            x = batch(rank, step)
            try:
                loss = model(x, set()).square().mean()
            except KeyboardInterrupt:
                loss = model(x, set()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
    found = [bits_of(parameter) for parameter in model.parameters()]
    optimizer.close()
    return found


@pytest.mark.parametrize("at", ["wait_before", "record"])
def test_an_interrupted_wait_forgets_no_gather(ranks: RankPool, at: str) -> None:
    expected = ranks.run(train_interrupted, 2, None)
    assert ranks.run(train_interrupted, 2, at) == expected


def drop_in_the_middle(rank: int, world_size: int) -> str:
    """Drop an optimizer whose parameters are still to be gathered; return what was logged."""
    model = Blocks()
    optimizer = Lazy(
        model.parameters(), module=model, overlap=True, offload=OffloadPolicy(bucket_nbytes=4096)
    )
    model(batch(rank, 0), set()).square().mean().backward()
    optimizer.step()
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("offload_adam").addHandler(handler)
    del optimizer
    gc.collect()
    logging.getLogger("offload_adam").removeHandler(handler)
    return logged.getvalue()


def test_dropping_an_optimizer_before_its_gathers_is_reported(ranks: RankPool) -> None:
    for logged in ranks.run(drop_in_the_middle, 2):
        assert "they now differ between ranks. Call synchronize() or close()" in logged


def train_with_one_fallen_back(rank: int, world_size: int) -> tuple[list[bytes], bool]:
    """Rank 0's first forward runs no hook, so that it waits in step(); rank 1 overlaps."""
    model = Blocks()
    optimizer = Lazy(
        model.parameters(),
        lr=1e-2,
        module=model,
        overlap=True,
        offload=OffloadPolicy(bucket_nbytes=4096),
    )
    hooks = optimizer._core.forward_hooks if optimizer._core is not None else None
    assert hooks is not None
    if rank == 0:
        hooks.remove()
    left_running = False
    for step in range(NUM_STEPS):
        model(batch(rank, step), set()).square().mean().backward()
        optimizer.step()
        left_running |= optimizer._core.executor.is_pending  # type: ignore[union-attr]
        optimizer.zero_grad()
    optimizer.synchronize()
    found = [bits_of(parameter) for parameter in model.parameters()]
    optimizer.close()
    return found, left_running


def test_a_rank_that_waits_in_step_and_one_that_overlaps_agree(ranks: RankPool) -> None:
    results = ranks.run(train_with_one_fallen_back, 2)
    assert results[0][0] == results[1][0]
    assert [left_running for _, left_running in results] == [False, True]


def fail_in_update(rank: int, world_size: int) -> str:
    """Raise in rank 1's update thread; return this rank's error and the call that raised it."""
    model = Blocks()
    optimizer = OffloadAdam(
        model.parameters(),
        module=model,
        overlap=True,
        offload=OffloadPolicy(bucket_nbytes=4096),
        num_threads=1,
    )
    model(batch(rank, 0), set()).square().mean().backward()
    optimizer.step()
    optimizer.synchronize()
    if rank == 1:
        assert optimizer._core is not None
        update = optimizer._core.tasks.updates[0]

        def fail() -> None:
            raise ZeroDivisionError("inside the update")

        update.prepare = running_first(update.prepare, fail)  # type: ignore[method-assign]
    try:
        model(batch(rank, 1), set()).square().mean().backward()
        optimizer.step()
        model(batch(rank, 2), set()).square().mean().backward()
    finally:
        optimizer.close()
    raise AssertionError("the forward has waited for nothing")


@pytest.mark.fault
def test_an_error_in_the_update_thread_ends_all_ranks_and_is_named() -> None:
    with RankPool() as pool:
        results = pool.run(fail_in_update, 2, timeout=60.0, expect_errors=True)
    errors = [result for result in results if isinstance(result, RankError)]
    assert [error.rank for error in errors] == [0, 1]
    assert issubclass(errors[1].type, ZeroDivisionError)
    assert "in fail" in errors[1].traceback
    assert issubclass(errors[0].type, PeerFailedError), errors[0]
    assert "rank 1" in errors[0].message.lower()
