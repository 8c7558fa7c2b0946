"""Checks of the disk: free space, and whether a preempted run has time for its last checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from offload_adam.doctor.finding import Finding, failed, ok, warning
from offload_adam.units import format_nbytes

CHECKPOINT_NBYTES = 16
"""Upper bound of a checkpoint's bytes for each parameter: value, master and both moments."""
WRITE_NBYTES = 256 * 2**20
TORCHRUN_TIMEOUT_S = 30.0
"""Default time that torchrun gives its ranks between SIGTERM and SIGKILL."""
_TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_BLOCK_NBYTES = 4 * 2**20
_LEAST_FREE_NBYTES = 10 * 2**30


def free_disk(folder: Path) -> Finding:
    """Return the free space where runs are written: `folder`, or its nearest existing parent."""
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return failed("disk", f"{existing} is not writable", "set run.dir to another folder")
    nbytes = shutil.disk_usage(existing).free
    found = (
        f"{format_nbytes(nbytes)} free in {existing}: "
        f"a checkpoint of {nbytes / CHECKPOINT_NBYTES:.2g} parameters"
    )
    if nbytes < _LEAST_FREE_NBYTES:
        return warning("disk", found, "free some space, or set run.dir to a larger disk")
    return ok("disk", found)


def last_save(folder: Path, num_parameters: float | None) -> Finding:
    """Measure the disk, and return whether a preempted run can save before it is killed.

    Args:
        num_parameters: number that the ranks of this node save; None if it is not known.
    """
    try:
        timeout_s = float(os.environ.get(_TIMEOUT_VARIABLE, TORCHRUN_TIMEOUT_S))
    except ValueError:
        found = f"{_TIMEOUT_VARIABLE} is {os.environ[_TIMEOUT_VARIABLE]!r}, which is not a number"
        return warning("last save", found, "set it to a number of seconds")
    return save_in_time(write_gb_per_s(_existing(folder)), timeout_s, num_parameters)


def save_in_time(gb_per_s: float, timeout_s: float, num_parameters: float | None) -> Finding:
    """Compare the time of a checkpoint with the time that a preempted run has for it."""
    most = gb_per_s * 1e9 * timeout_s / CHECKPOINT_NBYTES
    found = (
        f"{gb_per_s:.2g} GB/s to the disk: {most:.2g} parameters in the {timeout_s:.0f} s that "
        "torchrun gives a preempted run"
    )
    if num_parameters is None or num_parameters <= most:
        return ok("last save", found)
    needed_s = num_parameters * CHECKPOINT_NBYTES / gb_per_s / 1e9
    return warning(
        "last save",
        f"{found}; saving {num_parameters:.2g} takes {needed_s:.0f} s, so the run would be killed",
        f"start torchrun with --shutdown-timeout={2 * needed_s:.0f} (launch/: set "
        f"{_TIMEOUT_VARIABLE}), and let the scheduler wait as long before it kills the job",
    )


def write_gb_per_s(folder: Path) -> float:
    """Write and sync a temporary file, and return the speed in 1e9 bytes a second.

    Raises:
        OSError: the file does not fit on the disk.
    """
    block = os.urandom(_BLOCK_NBYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="offload_adam-", buffering=0) as file:
        start_s = time.perf_counter()
        for _ in range(WRITE_NBYTES // _BLOCK_NBYTES):
            file.write(block)
        os.fsync(file.fileno())
        return WRITE_NBYTES / (time.perf_counter() - start_s) / 1e9


def _existing(folder: Path) -> Path:
    """Return `folder` if it exists, otherwise its nearest existing parent."""
    return next(one for one in [folder.absolute(), *folder.absolute().parents] if one.exists())
