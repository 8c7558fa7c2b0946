"""`accumulate="auto"` on several ranks, which may run different numbers of backwards."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdam
from offload_adam.coordinator import node_memory
from tests.support.accumulation import SHAPES, THREE, Backward, Step, gradients, make, train
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, Weights, outcome_of

pytestmark = pytest.mark.distributed

BF16, FP32 = torch.bfloat16, torch.float32

CASES: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "host bf16": (2, BF16, {}),
    "host fp32": (2, FP32, {"overlap": True}),
    "offloaded bf16": (2, BF16, {"on_device": True, "overlap": True}),
    "offloaded fp32": (3, FP32, {"on_device": True, "overlap": False}),
    "reduced in fp32": (2, BF16, {"on_device": True, "reduce_dtype": torch.float32}),
    "staging": (2, BF16, {"on_device": True, "overlap": True, "offload": {"pin": "staging"}}),
    "partly": (2, BF16, {"on_device": True, "offload": {"offload_fraction": 0.5}}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_memory_that_was_planned(ranks: RankPool, name: str) -> None:
    world_size, dtype, options = CASES[name]
    auto = ranks.run(train, world_size, dtype, options)
    host = ranks.run(train, world_size, dtype, {**options, "accumulate": "host"})
    for one, other in zip(auto, host, strict=True):
        assert one.steps == other.steps
        assert one.weights == other.weights
        assert one.state == other.state
        assert one.weights == auto[0].weights
    assert [skipped for _, _, skipped in auto[0].steps] == [number == 2 for number in range(9)]
    assert all(one.bytes_taken > 0 for one in auto) == (name != "host fp32")


UNEVEN = [
    Step([Backward()]),
    Step(THREE),
    Step([Backward()] * 2),
    Step([Backward()]),
    Step(THREE, clips=0.25),
]


@pytest.mark.parametrize(("on_device", "overlap"), [(False, False), (True, True)])
def test_ranks_may_run_fewer_backwards_or_none(
    ranks: RankPool, on_device: bool, overlap: bool
) -> None:
    """Rank 1 runs one backward less than rank 0, and rank 2 two less."""
    # At most three buckets: a simulated device blocks backward for a slot of the ring, which other
    # ranks may empty only in `step()`.
    offload = {"bucket_nbytes": 1200}
    options = {"on_device": on_device, "overlap": overlap, "offload": offload}

    def run(accumulate: str) -> list[Any]:
        return ranks.run(_train_unevenly, 3, {**options, "accumulate": accumulate})

    auto, host = run("auto"), run("host")
    for one, other in zip(auto, host, strict=True):
        assert one.steps == other.steps
        assert (one.weights, one.state) == (other.weights, other.state)
        assert one.weights == auto[0].weights


def _train_unevenly(rank: int, world_size: int, options: dict[str, Any]) -> Any:
    return train(rank, world_size, BF16, options, steps=UNEVEN, fewer_on_others=True)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def log_on_every_rank(rank: int, world_size: int) -> tuple[list[str], int]:
    handler, logger = _Lines(), logging.getLogger("offload_adam")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train(rank, world_size, BF16, {}, steps=[Step(THREE)] * 2)
        result = train(rank, world_size, BF16, {}, steps=[Step(THREE)] * 2)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in handler.lines if "several backwards" in line], result.bytes_taken


def test_rank_0_logs_its_bytes_once(ranks: RankPool) -> None:
    (lines, nbytes), (others, _) = ranks.run(log_on_every_rank, 2)
    assert others == []
    assert [f"({nbytes} bytes)" in line for line in lines] == [True, True]  # two optimizers


def lack_memory_on_one(rank: int, world_size: int, late: bool) -> list[Outcome]:
    """Rank 1 lacks memory: in its second backward, or in `step()` if it runs one backward less."""
    model = Weights(SHAPES, BF16)
    optimizer = make(model, on_device=True, overlap=True, offload={})
    outcomes = []

    def run_backwards(number: int) -> None:
        for count in range(2 - (late and rank == 1)):
            model(gradients(model, (rank + 1, number, count), THREE[0], 1.0)).backward()

    available = node_memory.available_memory
    if rank == 1:
        node_memory.available_memory = lambda: (1000, "of the machine")
    try:
        outcomes.append(outcome_of(lambda: run_backwards(1)))
        outcomes.append(outcome_of(optimizer.step))
    finally:
        node_memory.available_memory = available
    outcomes.append(_step_alone(model, optimizer, run_backwards))
    optimizer.close()
    return outcomes


def _step_alone(model: Weights, optimizer: OffloadAdam, run_backwards: Any) -> Outcome:
    optimizer.zero_grad()
    run_backwards(2)
    return outcome_of(optimizer.step)


def test_a_rank_without_memory_fails_on_all_ranks(ranks: RankPool) -> None:
    first, second = ranks.run(lack_memory_on_one, 2, True)
    assert [one.error for one in first] == ["", "PeerError", ""]
    assert "rank(s) [1] raised an error" in first[1].message
    assert [one.error for one in second] == ["", "HostMemoryError", ""]
    assert "1000 bytes are available" in second[1].message.replace("1000 B", "1000 bytes")


def test_ranks_may_be_ahead_again_after_zero_grad(ranks: RankPool) -> None:
    steps = [Step([*THREE[:2], Backward(drops=True), *THREE]), Step(THREE[:1])]
    auto = ranks.run(_train_these, 2, {}, steps)
    host = ranks.run(_train_these, 2, {"accumulate": "host"}, steps)
    for one, other in zip(auto, host, strict=True):
        assert (one.weights, one.state, one.steps) == (other.weights, other.state, other.steps)


def _train_these(rank: int, world_size: int, options: dict[str, Any], steps: list[Step]) -> Any:
    return train(rank, world_size, BF16, options, steps=steps)
