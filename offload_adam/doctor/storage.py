"""Room and leave to write what a run writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from offload_adam.doctor.finding import Finding, failed, ok, warning
from offload_adam.units import format_nbytes

_LITTLE_NBYTES = 10 * 2**30
CHECKPOINT_NBYTES = 16
"""Bytes a parameter at most: parameter, master weight and both moments."""


def free_disk(folder: Path) -> Finding:
    """Return the room where runs are written: in the folder, or its nearest parent that exists."""
    existing = next(one for one in [folder.absolute(), *folder.absolute().parents] if one.exists())
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
