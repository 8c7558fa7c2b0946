"""Joining and leaving under torchrun: restarts, and what happens when the agent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

JOIN = """
import os, sys, time
import torch, torch.distributed as dist
from offload_adam.coordinator.startup import joined_world

with joined_world() as world:
    total = torch.tensor(float(world.rank + 1))
    dist.all_reduce(total)
    assert total.item() == world.world_size * (world.world_size + 1) / 2
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"joined-{world.rank}-{attempt}", "w").close()
    dist.barrier()
    if MODE == "restart" and attempt == "0":
        sys.exit(3 * world.rank)
    if MODE == "wait":
        time.sleep(120)
assert not dist.is_initialized()
"""


def start(folder: Path, mode: str, *options: str) -> subprocess.Popen[str]:
    script = folder / "join.py"
    script.write_text(f"MODE = {mode!r}\n{JOIN}", encoding="utf-8")
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node=2", *options, str(script)),
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return what the process printed, after it has ended within the bound."""
    try:
        return process.communicate(timeout=90)[0]
    finally:
        process.kill()


def test_ranks_that_are_restarted_find_each_other(tmp_path: Path) -> None:
    process = start(tmp_path, "restart", "--max-restarts=1")
    printed = finish(process)
    assert process.returncode == 0, printed
    joined = sorted(path.name for path in tmp_path.glob("joined-*"))
    assert joined == ["joined-0-0", "joined-0-1", "joined-1-0", "joined-1-1"]


@pytest.mark.fault
def test_workers_end_with_their_agent(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    paths = [tmp_path / f"joined-{rank}-0" for rank in range(2)]
    deadline_s = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline_s, finish(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    start_s = time.monotonic()
    finish(process)  # the pipe closes when the last worker has ended
    assert time.monotonic() - start_s < 10
