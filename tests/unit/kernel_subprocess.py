"""Runs a test's source in a fresh interpreter: for what only the start of a process decides."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import offload_adam

CHECKOUT = Path(offload_adam.__file__).parent.parent


def run_python(
    source: str, *, root: Path = CHECKOUT, timeout_s: float = 60, **environment: str
) -> str:
    """Return what the source prints; an exit code other than 0 fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ONE_UPDATE = """
import numpy as np
from offload_adam.kernels import adam, threads
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.scalars import NUM_SCALARS, Hyperparameters, scalar_row

hyper = Hyperparameters(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0,
                        decoupled_weight_decay=False, nesterov=False, maximize=False)
gradient = np.ones(256, np.float32)
weight, exp_avg, exp_avg_sq = (np.zeros(256, np.float32) for _ in range(3))

def run_one_update():
    threads.use_threads(1)
    adam.compile_kernel(FloatFormat.FLOAT32, None, False)
    adam.update(FloatFormat.FLOAT32, np.array([gradient.ctypes.data]), np.array([0]),
                  np.array([0, 256]), np.array([0]), scalar_row(hyper, 1, 1.0)[None],
                  weight, None, exp_avg, exp_avg_sq, None, None, None, None, 2)
"""
"""Defines `run_one_update`, after which `weight` is -0.1 everywhere."""
