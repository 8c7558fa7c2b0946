"""Room and leave to write what a run writes, and whether a last checkpoint is in time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from offload_adam.doctor.finding import Finding, failed, ok, warning
from offload_adam.units import format_nbytes

_LITTLE_NBYTES = 10 * 2**30
CHECKPOINT_NBYTES = 16
"""Bytes a parameter at most: parameter, master weight and both moments."""


WRITE_NBYTES = 256 * 2**20
_BLOCK_NBYTES = 4 * 2**20
TORCHRUN_TIMEOUT_S = 30.0
"""What torchrun gives its ranks between SIGTERM and SIGKILL, unless it is told otherwise."""
_TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def free_disk(folder: Path) -> Finding:
    """Return the room where runs are written: in the folder, or its nearest parent that exists."""
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return failed("disk", f"{existing} cannot be written to", "set run.dir to another folder")
    nbytes = shutil.disk_usage(existing).free
    found = (
        f"{format_nbytes(nbytes)} free in {existing}: "
        f"a checkpoint of {nbytes / CHECKPOINT_NBYTES:.2g} parameters"
    )
    if nbytes < _LITTLE_NBYTES:
        return warning("disk", found, "make room, or set run.dir to a larger disk")
    return ok("disk", found)


def last_save(folder: Path, num_parameters: float | None) -> Finding:
    """Measure the disk, and tell whether a preempted run can save before torchrun ends its ranks.

    Args:
        num_parameters: those that this node's ranks save; None for what would be in time.
    """
    try:
        timeout_s = float(os.environ.get(_TIMEOUT_VARIABLE, TORCHRUN_TIMEOUT_S))
    except ValueError:
        return warning("last save", f"{_TIMEOUT_VARIABLE} is no number", "set it to seconds")
    return save_in_time(write_gb_per_s(_existing(folder)), timeout_s, num_parameters)


def save_in_time(gb_per_s: float, timeout_s: float, num_parameters: float | None) -> Finding:
    """Compare the time of a checkpoint with what a preempted run has for it."""
    topic, most = "last save", gb_per_s * 1e9 * timeout_s / CHECKPOINT_NBYTES
    found = (
        f"{gb_per_s:.2g} GB/s to the disk: {most:.2g} parameters in the {timeout_s:.0f} s that "
        "torchrun gives a preempted run"
    )
    if num_parameters is None or num_parameters <= most:
        return ok(topic, found)
    needed_s = num_parameters * CHECKPOINT_NBYTES / gb_per_s / 1e9
    return warning(
        topic,
        f"{found}; a save of {num_parameters:.2g} takes {needed_s:.0f} s and would be killed",
        f"start torchrun with --shutdown-timeout={2 * needed_s:.0f}, or launch/ with "
        f"{_TIMEOUT_VARIABLE} set to it, and let the scheduler wait as long",
    )


def write_gb_per_s(folder: Path) -> float:
    """Return how fast a file gets to the disk in a folder, in 1e9 bytes a second; it is removed.

    Raises:
        OSError: there is no room for it.
    """
    block = os.urandom(_BLOCK_NBYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="offload_adam-", buffering=0) as file:
        start_s = time.perf_counter()
        for _ in range(WRITE_NBYTES // _BLOCK_NBYTES):
            file.write(block)
        os.fsync(file.fileno())
        return WRITE_NBYTES / (time.perf_counter() - start_s) / 1e9


def _existing(folder: Path) -> Path:
    """Return a folder, or its nearest parent that exists."""
    return next(one for one in [folder.absolute(), *folder.absolute().parents] if one.exists())
