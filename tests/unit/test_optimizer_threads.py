"""Calls of one optimizer from several threads: each runs as a whole, one after the other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import Adam, OffloadAdam, OffloadPolicy, load_checkpoint, save_checkpoint

WAIT_S = 60.0
NUM_STEPS = 40

MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "OffloadAdam": lambda model: OffloadAdam(
        model.parameters(), lr=0.01, offload=OffloadPolicy(bucket_nbytes=1024)
    ),
    "Adam": lambda model: Adam(model.parameters(), 0.01, offload=OffloadPolicy(bucket_nbytes=1024)),
    "Adam, offloaded": lambda model: Adam(
        model.parameters(), 0.01, offload=OffloadPolicy(bucket_nbytes=1024), use_offload=True
    ),
}


@pytest.fixture(autouse=True)
def _threads_alternate_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def made(kind: str) -> tuple[nn.Module, Any]:
    """Return a model of eight buckets whose gradients never change, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model, MAKERS[kind](model)


def run_together(*works: Callable[[], None]) -> None:
    """Run each function in a thread of its own, and raise the first error."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def weights_by_step(kind: str) -> list[torch.Tensor]:
    """Return all weights after 0, 1, ... steps of one thread."""
    model, optimizer = made(kind)
    weights = []
    for _ in range(NUM_STEPS + 1):
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        optimizer.step()
    return weights


@pytest.mark.parametrize("kind", MAKERS)
def test_steps_of_two_threads_are_those_of_one(kind: str) -> None:
    model, optimizer = made(kind)

    def work() -> None:
        for _ in range(NUM_STEPS // 2):
            optimizer.step()

    run_together(work, work)
    assert optimizer.num_steps == NUM_STEPS
    weights = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(weights, weights_by_step(kind)[NUM_STEPS])


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_dict_beside_steps_is_that_of_one_step(kind: str) -> None:
    _, optimizer = made(kind)
    saved: list[dict[str, Any]] = []

    def step() -> None:
        for _ in range(NUM_STEPS):
            optimizer.step()

    def save() -> None:
        for _ in range(NUM_STEPS):
            saved.append(optimizer.full_state_dict())

    run_together(step, save)
    for state_dict in saved:
        entries = list(state_dict["state"].values())
        (steps,) = {float(entry["step"]) for entry in entries}
        # The gradient is always 0.5.
        expected = 0.5 * (1 - 0.9**steps)
        for entry in entries:
            mean = torch.full_like(entry["exp_avg"], expected)
            torch.testing.assert_close(entry["exp_avg"], mean, rtol=1e-5, atol=0.0)


def test_a_checkpoint_beside_steps_is_that_of_one_step(tmp_path: Path) -> None:
    kind = "OffloadAdam"
    model, optimizer = made(kind)

    def step() -> None:
        for _ in range(NUM_STEPS):
            optimizer.step()

    def save() -> None:
        for number in range(5):
            save_checkpoint(tmp_path / str(number), model=model, optimizer=optimizer)

    run_together(step, save)
    by_step = weights_by_step(kind)
    for number in range(5):
        loaded, other = made(kind)
        load_checkpoint(tmp_path / str(number), model=loaded, optimizer=other)
        weights = nn.utils.parameters_to_vector(loaded.parameters())
        assert torch.equal(weights, by_step[other.num_steps])


def test_a_closure_may_call_the_optimizer() -> None:
    model, optimizer = made("OffloadAdam")

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 16)).sum()
        loss.backward()
        return float(loss.detach())

    run_together(lambda: optimizer.step(closure))
    assert optimizer.num_steps == 1
