"""Processes that end in the middle of something: in bounded time, with their own exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from offload_adam import OffloadAdam, save_checkpoint
from offload_adam.checkpoint.load import verify_checkpoint

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

SCRIPT = """
import os, signal, sys, threading, time
import torch
from offload_adam import OffloadAdam, OffloadPolicy, begin_checkpoint
from offload_adam.checkpoint.save import Save
from offload_adam.step import build

def make():
    global model, optimizer
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    policy = OffloadPolicy(bucket_nbytes=1)
    optimizer = OffloadAdam(model.parameters(), module=model, overlap=True, offload=policy)

def step():
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()

def slowed(function):
    def slow(*arguments, **options):
        time.sleep(0.2)
        return function(*arguments, **options)
    return slow

def begin():
    make()
    step()
    tasks = optimizer._alive().tasks
    tasks.launch = slowed(tasks.launch)
    Save.write_bucket = slowed(Save.write_bucket)
    pending = begin_checkpoint(sys.argv[1], model=model, optimizer=optimizer)
    step()
    return pending

def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)

"""

BODIES = {
    "ends during a checkpoint and an update": ("begin()", 0),
    "sys.exit during a checkpoint and an update": ("begin(); sys.exit(3)", 3),
    "os._exit in backward": (
        "make(); model[1].weight.register_hook(lambda g: os._exit(4)); step()",
        4,
    ),
    "Ctrl-C during construction": ("build.HostArena = interrupt; make()", -signal.SIGINT),
    "Ctrl-C in wait": (
        "pending = begin(); threading.Timer(0.3, interrupt).start(); pending.wait()",
        -signal.SIGINT,
    ),
    "an error while a thread trains": (
        "make()\n"
        "def train():\n    while True: step()\n"
        "threading.Thread(target=train, daemon=True).start(); time.sleep(0.5); raise ValueError",
        1,
    ),
}
"""What a script does, and the exit code that its process should have."""


class Ended(NamedTuple):
    code: int
    errors: str
    checkpoint: Path


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Run all scripts at once, because most of their time is that of imports."""
    running = {}
    for name, (body, _) in BODIES.items():
        checkpoint = tmp_path_factory.mktemp("case") / "c"
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT + body, checkpoint],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        running[name] = process, checkpoint
    found = {}
    for name, (process, checkpoint) in running.items():
        try:
            _, errors = process.communicate(timeout=100)
        finally:
            process.kill()
        found[name] = Ended(process.returncode, errors, checkpoint)
    return found


@pytest.mark.parametrize("name", BODIES)
def test_a_process_that_ends_in_the_middle_has_its_own_exit_code(
    ended: dict[str, Ended], name: str
) -> None:
    code, errors, checkpoint = ended[name]
    assert code == BODIES[name][1], errors
    assert "Fatal Python error" not in errors
    if code in (0, 3):
        assert errors == ""
    # Neither a checkpoint of half the bytes, nor anything that keeps the next save from its path.
    assert not checkpoint.exists()
    model = torch.nn.Linear(3, 2)
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(checkpoint, model=model, optimizer=optimizer)
    optimizer.close()
    verify_checkpoint(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["c"]
