"""Start the training command under torchrun with a fault in it, and report how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.yaml"
PATIENCE = ("--coordinator.dead_after=6", "--coordinator.stuck_after=3")


class Ended(NamedTuple):
    """How a run ended; `took_s` counts from the fault, or from the start if none was reported."""

    code: int
    printed: str
    took_s: float
    records: list[dict[str, Any]]


def start(
    folder: Path,
    fault: str,
    *overrides: str,
    ranks: int = 2,
    options: tuple[str, ...] = (),
    within: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """Start the tiny job; its output goes to `folder/printed`.

    Args:
        within: the words of a command that runs the one that follows them.
    """
    command = [*within, sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "--shutdown-timeout=5", *options]
    command += [str(ROOT / "tests" / "fault" / "faulty_train.py"), fault or "none@none"]
    command += ["train", str(TINY), f"--run.dir={folder}", *PATIENCE, *overrides]
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def wait_for(folder: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait until the run has printed something."""
    deadline_s = time.monotonic() + 60
    while text not in (folder / "printed").read_text():
        assert process.poll() is None, (folder / "printed").read_text()
        assert time.monotonic() < deadline_s, (folder / "printed").read_text()
        time.sleep(0.05)


def wait_for_steps(folder: Path, process: subprocess.Popen[str], num_steps: int = 3) -> None:
    """Wait until the run has written so many records."""
    metrics = folder / "tiny" / "metrics.jsonl"
    deadline_s = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= num_steps):
        assert process.poll() is None, (folder / "printed").read_text()
        assert time.monotonic() < deadline_s, (folder / "printed").read_text()
        time.sleep(0.05)


def finish(folder: Path, process: subprocess.Popen[str], timeout_s: float = 90) -> Ended:
    """Wait for the end of a run, and check that it leaves no process behind."""
    start_s = time.monotonic()
    try:
        code = process.wait(timeout=timeout_s)
        took_s = time.monotonic() - start_s
        left = processes_of(folder)
        assert not left, left
    finally:
        for survivor in processes_of(folder):
            survivor.kill()
        process.kill()
    metrics = folder / "tiny" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    printed = (folder / "printed").read_text()
    return Ended(code, printed, took_s, [json.loads(line) for line in lines])


def run(
    folder: Path,
    fault: str,
    *overrides: str,
    ranks: int = 2,
    options: tuple[str, ...] = (),
    within: tuple[str, ...] = (),
) -> Ended:
    """Run the tiny job with a fault to its end, and return how long it took after the fault."""
    process = start(folder, fault, *overrides, ranks=ranks, options=options, within=within)
    if fault.partition("@")[0] in ("kill", "stop", "vanish", "hang", "raise"):
        wait_for(folder, "fault on rank", process)
    return finish(folder, process)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that belong to the run in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if f"--run.dir={folder}" in words:
            found.append(process)
    return found
