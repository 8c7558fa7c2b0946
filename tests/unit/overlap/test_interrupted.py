"""Ctrl-C, or another signal handler that raises, while `step()` waits for the update thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from offload_adam import OffloadAdamW, OffloadPolicy
from offload_adam.step.executor import Executor


@pytest.mark.parametrize("interrupted", ["reduce", "norm"])
def test_zero_grad_waits_for_what_still_reads_the_gradients(
    interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(2)])

    model, expected = make(), make().double()
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3}
    optimizer = OffloadAdamW(
        model.parameters(),
        **options,
        module=model,
        overlap=True,
        offload=OffloadPolicy(bucket_nbytes=1 << 14),
    )
    oracle = torch.optim.AdamW(expected.parameters(), **options, foreach=False)

    def backward(one: torch.nn.Module) -> None:
        one(torch.ones(2, 64, dtype=next(one.parameters()).dtype)).square().sum().backward()

    submitted: list[str] = []
    ended: list[str] = []
    may_run = threading.Semaphore(0)
    submit, wait = Executor._submit, Executor._await

    def submit_later(self: Executor, what: str, job: Any) -> Any:
        def run() -> None:
            assert may_run.acquire(timeout=60)
            job()
            ended.append(what)

        submitted.append(what)
        return submit(self, what, run)

    def interrupt(self: Executor, job: Any, phase: str, **options: Any) -> None:
        if phase == interrupted and not self._copy_jobs:  # the last of its phase
            raise KeyboardInterrupt
        may_run.release()
        wait(self, job, phase, **options)

    monkeypatch.setattr(Executor, "_submit", submit_later)
    backward(model)
    monkeypatch.setattr(Executor, "_await", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.setattr(Executor, "_await", wait)
    threading.Timer(0.2, may_run.release, [1000]).start()
    optimizer.zero_grad()
    assert submitted
    assert ended == submitted
    for one, stepper in ((model, optimizer), (expected, oracle)):
        for _ in range(2):
            backward(one)
            stepper.step()
            stepper.zero_grad()
    optimizer.synchronize()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-6
