"""A small training that uses much of the optimizer, and says the bits of all that it has."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from offload_adam import OffloadAdam, OffloadPolicy, begin_checkpoint
from offload_adam.checkpoint.background import PendingCheckpoint
from offload_adam.coordinator.agreement import Notice
from tests.support.devices import HOST_AS_DEVICE

Digests = dict[str, str]
"""A digest of each tensor, and the other values, by name."""

SAVING = "saving.lock"
"""File beside the kept state that exists while a checkpoint is being written."""
_LR = (1e-2, 3e-3)  # of each group


class Case(NamedTuple):
    """What is trained, and how its state is stored.

    streams: pass the model to the optimizer.
    simulated: parameters are on a simulated device, and updates overlap with the next forward.
    width: the model has about 2.2 * width**2 parameters.
    saves: while state is kept, checkpoints are written in the background, one after the other. For
        one rank.
    """

    name: str
    dtype: torch.dtype = torch.float32
    state_format: str = "fp32"
    amsgrad: bool = False
    streams: bool = True
    simulated: bool = False
    num_ranks: int = 1
    width: int = 512
    saves: bool = False


class Model(nn.Module):
    """Has buffers, dropout, odd sizes, and a layer without a gradient in some steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(40, width + 5)
        self.norm = nn.BatchNorm1d(width + 5)
        self.drop = nn.Dropout(0.1)
        self.sometimes = nn.Linear(width + 5, width + 5)
        self.wide = nn.Linear(width + 5, width + 37)
        self.last = nn.Linear(width + 37, 3)

    def forward(self, x: torch.Tensor, *, uses_all: bool) -> torch.Tensor:
        x = self.drop(self.norm(self.first(x)).relu())
        if uses_all:
            x = x + self.sometimes(x)
        out: torch.Tensor = self.last(self.wide(x).relu())
        return out


class _OnSimulatedDevice(OffloadAdam):
    _backend = HOST_AS_DEVICE


class Training:
    """A model, its optimizer and their loop on one rank.

    Attributes:
        step: number of the last step, 0 before the first.
        construction_s: seconds that the optimizer's constructor took.

    Args:
        folder: of the kept state; None to train without.
        num_threads: of the update.
    """

    def __init__(
        self,
        case: Case,
        folder: Path | None,
        rank: int = 0,
        *,
        num_threads: int = 2,
        attach_timeout: float = 20.0,
    ) -> None:
        logging.getLogger("offload_adam").setLevel(logging.ERROR)  # steps are skipped on purpose
        torch.manual_seed(5)
        self._case, self._rank = case, rank
        self.model = Model(case.width).to(case.dtype)
        torch.manual_seed(50 + rank)  # of dropout
        rest = [p for name, p in self.model.named_parameters() if name != "wide.weight"]
        groups = [
            {"params": [self.model.wide.weight], "weight_decay": 0.02, "lr": _LR[0]},
            {"params": rest, "betas": (0.8, 0.99), "lr": _LR[1]},
        ]
        policy = OffloadPolicy(
            bucket_nbytes=case.width**2 * case.dtype.itemsize,
            keep="none" if folder is None else "shared",
            keep_path=None if folder is None else str(folder),
            attach_timeout=attach_timeout,
        )
        start_s = time.perf_counter()
        self.optimizer = (_OnSimulatedDevice if case.simulated else OffloadAdam)(
            groups,
            amsgrad=case.amsgrad,
            decoupled_weight_decay=True,
            max_grad_norm=0.5,
            module=self.model if case.streams else None,
            state_format=case.state_format,  # type: ignore[arg-type]
            num_threads=num_threads,
            offload=policy,
        )
        self.construction_s = time.perf_counter() - start_s
        self._saving = None if folder is None else folder / SAVING
        self._pending: PendingCheckpoint | None = None
        self.step = 0
        resumed = self.optimizer.resumed_step
        if resumed is not None:
            self.step = resumed.step
            torch.set_rng_state(resumed.extra["rng"])
            assert resumed.extra["step"] == resumed.step
            if not case.streams:
                self.model.load_state_dict(resumed.extra["buffers"], strict=False)

    def train(self) -> None:
        """Take one step, which is skipped in some cases."""
        self.step += 1
        step, generator = self.step, torch.Generator(device="cpu")
        generator.manual_seed(1000 * step + self._rank)
        x = torch.randn(4, 40, generator=generator, dtype=torch.float32, device="cpu")
        for group, lr in zip(self.optimizer.param_groups, _LR, strict=True):
            group["lr"] = lr / (1 + step % 5)
        out = self.model(x.to(self._case.dtype), uses_all=step % 3 != 0)
        loss = out.float().square().mean()
        if step % 7 == 4 and self._rank == 0:
            loss = loss * math.inf
        loss.backward()
        extra: dict[str, Any] = {"step": step, "rng": torch.get_rng_state()}
        if not self._case.streams:
            extra["buffers"] = dict(self.model.named_buffers())
        self.optimizer.kept_extra = extra
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._case.saves and self._saving is not None:
            if self._pending is not None and self._pending.commit_if_written():
                self._end_save()
            if self._pending is None:
                self._checkpoint = TemporaryDirectory()
                self._saving.touch()
                path = Path(self._checkpoint.name) / "checkpoint"
                self._pending = begin_checkpoint(path, model=self.model, optimizer=self.optimizer)

    def _end_save(self) -> None:
        assert self._saving is not None
        self._saving.unlink()
        self._checkpoint.cleanup()
        self._pending = None

    def close(self) -> None:
        """Finish the checkpoint, and close the optimizer."""
        if self._pending is not None:
            self._pending.wait()
            self._end_save()
        self.optimizer.close()

    def digests(self) -> Digests:
        """Return the digests of all state of this rank after the last step."""
        self.optimizer.synchronize()
        core = self.optimizer._alive()
        found = {name: _digest(tensor) for name, tensor in self.model.state_dict().items()}
        for state in core.states:
            name = f"bucket {state.layout.index}"
            for field in fields(state.planes):
                plane = getattr(state.planes, field.name)
                if plane is not None and field.name != "gradient_shard":
                    found[f"{name} {field.name}"] = _digest(plane)
            found[f"{name} step_counts"] = str(state.step_counts.tolist())
            if state.scales is not None:
                found[f"{name} scales"] = str(state.scales.tolist())
        found["groups"] = str([[g["lr"], g["betas"]] for g in self.optimizer.param_groups])
        found["rng"] = _digest(torch.get_rng_state())
        found["steps"] = str([self.step, core.num_steps, self.optimizer.skipped_steps])
        report = self.optimizer.last_step
        found["report"] = str(report and replace(report, timings={}, notice=Notice()))
        return found


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def pid_of(_: int, __: int) -> int:
    """Return the id of this process."""
    return os.getpid()


def references(rank: int, _: int, case: Case, num_steps: int) -> list[Digests]:
    """Return the digests before the first step and after each step, without kept state."""
    training = Training(case, None, rank)
    found = [training.digests()]
    for _ in range(num_steps):
        training.train()
        found.append(training.digests())
    training.optimizer.close()
    return found


def train_until(rank: int, world_size: int, case: Case, folder: Path, end: Path) -> int:
    """Train until a file exists, and return the number of steps."""
    training = Training(case, folder, rank)
    flag = torch.zeros(1, dtype=torch.float32, device="cpu")
    while not flag.item():
        training.train()
        flag.fill_(end.exists())
        if world_size > 1:
            dist.all_reduce(flag)
    training.close()
    return training.step


def recover(
    rank: int, _: int, case: Case, folders: list[Path], num_further: int
) -> list[tuple[int, list[Digests]]]:
    """Construct the optimizer from each folder of kept state.

    Returns:
        For each folder the step that was resumed, 0 if none was, then the digests after it and
        after each of `num_further` steps.
    """
    return [_recover(rank, case, *one, num_further) for one in enumerate(folders)]


def _recover(
    rank: int, case: Case, number: int, folder: Path, num_further: int
) -> tuple[int, list[Digests]]:
    # The number of threads may be another one than that of the killed process.
    training = Training(case, folder, rank, num_threads=1 + number % 2)
    step = training.step
    found = [training.digests()]
    for _ in range(num_further):
        training.train()
        found.append(training.digests())
    training.close()
    return step, found


def differences(found: Digests, expected: Digests) -> Iterator[str]:
    """Yield the names of the values that differ."""
    for name in {**found, **expected}:
        if found.get(name) != expected.get(name):
            yield name
