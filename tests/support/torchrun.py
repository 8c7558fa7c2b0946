"""A command of the package, or a script around it, under torchrun on two ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two_ranks(arguments: list[str], folder: Path, *, timeout_s: float) -> str:
    """Run torchrun with these arguments in this folder, and return its standard output.

    Raises:
        AssertionError: the exit code is not 0; the message has the whole output.
        subprocess.TimeoutExpired: it took longer.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
