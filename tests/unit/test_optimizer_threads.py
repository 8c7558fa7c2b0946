"""Calls of one optimizer from several threads: each runs as a whole, one after the other."""

from __future__ import annotations

import copy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import (
    Adam,
    OffloadAdam,
    OffloadAdamW,
    OffloadPolicy,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.step.build import Backend
from offload_adam.step.external_edits import ExternalEdits
from offload_adam.step.update_thread import Ticket, UpdateThread

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


class SlowUpdates(UpdateThread):
    """Takes so long for each job that several threads come to wait for the same one."""

    def submit(self, what: str, job: Callable[[], object]) -> Ticket:
        def run() -> None:
            time.sleep(0.002)
            job()

        return super().submit(what, run)


class Overlapped(OffloadAdamW):
    """Its updates run slowly, beside the next forward."""

    _backend = Backend(make_workers=SlowUpdates.pair)


def overlapped() -> tuple[nn.Module, OffloadAdamW, Callable[[int], None]]:
    """Return a model of eight buckets, its optimizer, and a check of its weights after some steps.

    The check trains a copy with torch's AdamW in float64.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))
    reference = copy.deepcopy(model).double()
    optimizer = Overlapped(
        model.parameters(),
        lr=0.01,
        eps=1e-3,
        module=model,
        overlap=True,
        offload=OffloadPolicy(bucket_nbytes=1024),
    )

    def check(num_steps: int) -> None:
        optimizer.synchronize()
        torch_adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, eps=1e-3)
        for number in range(num_steps):
            torch_adamw.zero_grad()
            loss(reference, number).backward()
            torch_adamw.step()
        for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert (ours - expected).abs().max() < 1e-6

    return model, optimizer, check


def loss(model: nn.Module, step: int) -> torch.Tensor:
    data = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
    result: torch.Tensor = model(data.to(next(model.parameters()).dtype)).square().mean()
    return result


CALLS: dict[str, Callable[[nn.Module, OffloadAdamW], object]] = {
    "synchronize": lambda _, optimizer: optimizer.synchronize(),
    "state_dict": lambda _, optimizer: optimizer.state_dict(),
    "full_state_dict": lambda _, optimizer: optimizer.full_state_dict(),
    "model.state_dict": lambda model, _: model.state_dict(),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_run_beside_the_forwards_of_another_thread(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_update = ExternalEdits.after_update

    def slowly(edits: ExternalEdits, bucket: int) -> None:
        # A forward that reads the bucket before its version is bumped has an error in backward.
        time.sleep(0.001)
        after_update(edits, bucket)

    monkeypatch.setattr(ExternalEdits, "after_update", slowly)
    model, optimizer, check = overlapped()
    is_over = threading.Event()

    def train() -> None:
        try:
            for number in range(8):
                time.sleep(number * 0.002)  # the other thread has waited for some of the buckets
                loss(model, number).backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            is_over.set()

    def call() -> None:
        while not is_over.is_set():
            CALLS[name](model, optimizer)

    run_together(train, call)
    check(8)


def test_a_closure_may_run_its_forward_in_another_thread() -> None:
    model, optimizer, check = overlapped()
    for number in range(3):

        def closure(number: int = number) -> float:
            optimizer.zero_grad()
            losses: list[torch.Tensor] = []
            # It waits for the last step's updates, while this thread holds the optimizer's lock.
            run_together(lambda: losses.append(loss(model, number)))
            losses[0].backward()
            return losses[0].item()

        run_together(lambda closure=closure: optimizer.step(closure))  # type: ignore[misc]
    check(3)


def test_a_signal_handler_may_synchronize_while_a_forward_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer, check = overlapped()
    num_handled = 0

    def handle(*_: object) -> None:
        nonlocal num_handled
        num_handled += 1
        optimizer.synchronize()

    wait = Ticket.wait

    def interrupted(ticket: Ticket, timeout_s: float) -> bool:
        if timeout_s > 0 and num_handled == 0:
            signal.raise_signal(signal.SIGUSR1)
        return wait(ticket, timeout_s)

    loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        monkeypatch.setattr(Ticket, "wait", interrupted)
        loss(model, 1).backward()
    finally:
        signal.signal(signal.SIGUSR1, before)
    optimizer.step()
    check(2)
    assert num_handled == 1
