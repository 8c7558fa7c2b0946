"""The command line with one fault in it: `faulty_train.py ACTION@PLACE[/STEP] train CONFIG ...`.

Run under torchrun. The fault happens once, on rank 1 of the first attempt, at PLACE of STEP; where
rank 0 alone comes to PLACE, on that one.
"""

from __future__ import annotations

import importlib
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from offload_adam.cli.app import main
from offload_adam.coordinator import agreement, progress, startup
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.transfer import collectives

RANK = os.environ.get("RANK", "0")
IS_FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
IS_FAULTY = RANK == "1" and IS_FIRST_ATTEMPT


class Fault:
    """A fault and its step; it happens once."""

    def __init__(self, action: str, step: int, rank: str = "1") -> None:
        self._action = action
        self._step = step
        self._is_due = rank == RANK and IS_FIRST_ATTEMPT

    def __call__(self) -> None:
        if not self._is_due or PROGRESS.step < self._step:
            return
        self._is_due = False
        print(f"fault on rank {RANK}: {self._action} in {PROGRESS.phase}", flush=True)
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action in ("stop", "vanish"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self._action == "hang":
            time.sleep(300)
        elif self._action == "raise":
            raise RuntimeError("a fault of the test's")
        elif self._action == "fill":
            # What a disk that is full does: it takes a part, and then nothing.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif self._action == "unmount":
            (folder,) = (word.partition("=")[2] for word in sys.argv if "--run.dir=" in word)
            place = f"{folder}/tiny/checkpoints"
            subprocess.run(["umount", "--lazy", place], check=True, timeout=20)
        elif self._action == "clock":
            set_clock(-10_000 if RANK == "1" else 10_000)


def set_clock(by_s: int) -> None:
    """Shift the wall clock of this process, and what psutil derives from it."""
    clock, clock_ns, boot = time.time, time.time_ns, psutil._pslinux.boot_time
    time.time = lambda: clock() + by_s
    time.time_ns = lambda: clock_ns() + by_s * 10**9
    psutil._pslinux.boot_time = lambda: boot() + by_s


def before(owner: Any, name: str, fault: Callable[[], None]) -> None:
    """Call `fault` before each call of a function, also where the function is imported later."""
    original = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        fault()
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def spoil_loss(value: float, step: int) -> None:
    """Multiply one loss by a non-finite number."""
    loop: Any = importlib.import_module("offload_adam.train.loop")
    original = loop.next_token_loss

    def spoiled(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = original(model, batch)
        return loss * value if IS_FAULTY and PROGRESS.step == step else loss

    loop.next_token_loss = spoiled


def differ(kind: str) -> None:
    """Give rank 1 another model or another configuration."""
    if not IS_FAULTY:
        return
    from offload_adam.train import job

    if kind == "configuration":
        sys.argv.append("--train.batch_size=3")
        return
    original = job._distributed

    def changed(config: Any, world: Any, model: torch.nn.Module) -> torch.nn.Module:
        model = original(config, world, model)
        if kind == "dtype":
            return model.to(torch.bfloat16)
        longer = torch.zeros(33)
        next(
            m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)
        ).weight = torch.nn.Parameter(longer)
        return model

    job._distributed = changed


def lack_memory() -> None:
    """Make rank 1 measure less available memory than any state needs."""
    if not IS_FAULTY:
        return
    node_memory: Any = importlib.import_module("offload_adam.coordinator.node_memory")
    node_memory.available_memory = lambda: (100_000, "of a small machine")


def take_memory() -> None:
    """Leave this rank no address space for its state; the memory check does not notice this."""
    if not IS_FAULTY:
        return
    construction: Any = importlib.import_module("offload_adam.step.build")
    arena = construction.HostArena

    def lacking(nbytes: int, **options: Any) -> Any:
        held_nbytes = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (held_nbytes, resource.RLIM_INFINITY))
        try:
            return arena(nbytes, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    construction.HostArena = lacking


def install_in_save(action: str, place: str, step: int) -> None:
    """Put the fault into the first save of a checkpoint at or after STEP."""
    from offload_adam.checkpoint import save
    from offload_adam.train import loop

    if place == "write":
        before(save.Save, "write_bucket", Fault(action, step))
    elif place == "written":
        before(save.Save, "commit", Fault(action, step))
    elif place == "commit":
        before(save, "commit_files", Fault(action, step, rank="0"))
    elif place == "rename":
        before(Path, "rename", Fault(action, step, rank="0"))
    elif place == "committed":
        before(loop, "_run_step", Fault(action, step))


def install(action: str, place: str, step: int) -> None:
    """Install the fault."""
    if action == "vanish":
        # Ranks on different machines cannot continue each other.
        progress._machine = lambda: f"machine of rank {RANK}"
    if action == "differ":
        differ(place)
    elif action in ("nan", "inf"):
        spoil_loss(math.nan if action == "nan" else math.inf, step)
    elif action == "lack":
        lack_memory()
    elif action == "take":
        take_memory()
    elif action == "clock":
        before(
            importlib.import_module("offload_adam.train.loop"),
            "next_token_loss",
            Fault(action, step, RANK),
        )
    elif place in ("write", "written", "commit", "rename", "committed"):
        install_in_save(action, place, step)
    elif place == "start":
        before(startup, "_open_default_group", Fault(action, 0))
    elif place == "reduce":
        before(collectives.Collectives, "mean", Fault(action, step))
    elif place == "gather":
        before(collectives.Collectives, "gather", Fault(action, step))
    elif place == "agree":
        before(agreement, "agree", Fault(action, step))
    elif place == "update":
        from offload_adam.kernels import adam

        before(adam, "update", Fault(action, step))
    elif place == "backward":
        from offload_adam.step.reducer import GradientReduction

        before(GradientReduction, "gradients_ready", Fault(action, step))
    elif place == "forward":
        from offload_adam.train import loop

        before(loop, "next_token_loss", Fault(action, step))


if __name__ == "__main__":
    what, _, where = sys.argv.pop(1).partition("@")
    where, _, number = where.partition("/")
    install(what, where, int(number or 3))
    main()
