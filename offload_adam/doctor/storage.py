"""Checks of the disk: free space, and whether a preempted run has time for its last checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from offload_adam.config.sections import CheckpointSection
from offload_adam.doctor.finding import Finding
from offload_adam.printable import show
from offload_adam.units import format_count, format_nbytes

CHECKPOINT_NBYTES = 16
"""Upper bound of a checkpoint's bytes for each parameter: value, master and both moments."""
WRITE_NBYTES = 256 * 2**20
TORCHRUN_TIMEOUT_S = 30.0
"""Default time that torchrun gives its ranks between SIGTERM and SIGKILL."""
_TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_BLOCK_NBYTES = 4 * 2**20
_LEAST_FREE_NBYTES = 10 * 2**30


def free_disk(folder: Path, num_parameters: float | None) -> Finding:
    """Return the free space where runs are written: `folder`, or its nearest existing parent.

    A run deletes an old checkpoint only after the next one is complete. So with the default of
    checkpoint.keep_last, it needs space for one checkpoint more than that.

    Args:
        folder: where runs are to be written; a parent if it does not exist yet.
        num_parameters: parameters that the ranks of this node save; None if not known.
    """
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        found, advice = f"{existing} is not writable", "set run.dir to another folder"
        return Finding("disk", found, advice, is_fatal=True)
    nbytes = shutil.disk_usage(existing).free
    found = f"{format_nbytes(nbytes)} free in {existing}"
    advice = "free some space, or set run.dir to a larger disk"
    if num_parameters is None:
        most = format_count(nbytes / CHECKPOINT_NBYTES)
        found += f": enough for one checkpoint of {most} parameters"
        return Finding("disk", found, advice if nbytes < _LEAST_FREE_NBYTES else "")
    checkpoint_nbytes = int(num_parameters * CHECKPOINT_NBYTES)
    keep_last = CheckpointSection.model_fields["keep_last"].default
    num_needed = keep_last + 1
    found += (
        f"; a checkpoint of {format_count(num_parameters)} parameters has up to "
        f"{format_nbytes(checkpoint_nbytes)}"
    )
    if nbytes < checkpoint_nbytes:
        return Finding("disk", f"{found}, which does not fit", advice, is_fatal=True)
    found += f", and {num_needed} are on the disk at once (checkpoint.keep_last is {keep_last})"
    is_short = nbytes < max(num_needed * checkpoint_nbytes, _LEAST_FREE_NBYTES)
    return Finding("disk", found, f"{advice}, or lower checkpoint.keep_last" if is_short else "")


def last_save(folder: Path, num_parameters: float | None) -> Finding:
    """Measure the disk, and return whether a preempted run can save before it is killed.

    Args:
        folder: where runs are to be written; a parent if it does not exist yet.
        num_parameters: parameters that the ranks of this node save; None if not known.
    """
    timeout = os.environ.get(_TIMEOUT_VARIABLE, TORCHRUN_TIMEOUT_S)
    try:
        timeout_s = float(timeout)
    except ValueError:
        found = f"{_TIMEOUT_VARIABLE} is {show(timeout)}, which is not a number"
        return Finding("last save", found, "set it to a number of seconds")
    gb_per_s = write_gb_per_s(_existing(folder))
    most = gb_per_s * 1e9 * timeout_s / CHECKPOINT_NBYTES
    amount = f"{format_count(most)} parameters"
    found = (
        f"the disk takes {gb_per_s:.2g} GB/s: a preempted run can save {amount} in "
        f"the {timeout_s:.0f} s before torchrun kills it"
    )
    if num_parameters is None or num_parameters <= most:
        return Finding("last save", found)
    needed_s = num_parameters * CHECKPOINT_NBYTES / gb_per_s / 1e9
    return Finding(
        "last save",
        f"{found}; saving {format_count(num_parameters)} takes {needed_s:.0f} s, so the run would "
        "be killed",
        f"start torchrun with --shutdown-timeout={2 * needed_s:.0f} (for the scripts in launch/ of "
        f"the source repository, set {_TIMEOUT_VARIABLE} to this number), and let the scheduler "
        "wait as long before it kills the job",
    )


def write_gb_per_s(folder: Path) -> float:
    """Write and sync a temporary file, and return the speed in 1e9 bytes a second.

    Raises:
        OSError: the file does not fit on the disk.
    """
    block = os.urandom(_BLOCK_NBYTES)  # random, so that the file system cannot compress it
    with tempfile.NamedTemporaryFile(dir=folder, prefix="offload_adam-", buffering=0) as file:
        start_s = time.perf_counter()
        for _ in range(WRITE_NBYTES // _BLOCK_NBYTES):
            file.write(block)
        os.fsync(file.fileno())
        return WRITE_NBYTES / (time.perf_counter() - start_s) / 1e9


def _existing(folder: Path) -> Path:
    """Return `folder` if it exists, otherwise its nearest existing parent."""
    return next(one for one in [folder.absolute(), *folder.absolute().parents] if one.exists())
