"""Folders of saves in progress: `<checkpoint>.<node>-<process>-<random>.partial`.

The name says which process writes. So a later save can remove what a killed one has left, and never
touches the folder of a save that still runs.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from offload_adam.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}" + re.escape(PARTIAL_SUFFIX))

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links answer."""

_in_progress: set[str] = set()
"""Names that this process is writing to."""


def partial_name(name: str) -> str:
    """Return a new name for what this process writes before it is renamed to `name`.

    It counts as in progress until `publish` or `discard`.
    """
    own = f"{name}.{_node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
    _in_progress.add(own)
    return own


def publish(partial: Path, target: Path) -> None:
    """Rename a completed file or folder to its target.

    Raises:
        CheckpointError: another process has written a folder there meanwhile.
    """
    try:
        _rename(partial, target)
    except OSError as error:
        if not os.path.lexists(target):
            raise
        raise CheckpointError(
            f"{target} was written by another process meanwhile, and this one's is discarded: give "
            "each job a path of its own"
        ) from error
    _in_progress.discard(partial.name)


def _rename(partial: Path, target: Path) -> None:
    """Rename atomically, unless there is something at the target: of several saves one succeeds."""
    if partial.is_file():
        # A rename would replace another file, a link does not.
        try:
            os.link(partial, target)
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(target):
                raise
        else:
            partial.unlink()
            return
    partial.rename(target)  # a folder replaces no folder with files in it


def discard(partial: Path) -> None:
    """Remove what will not be published; what cannot be removed now is left to a later save."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink()
    _in_progress.discard(partial.name)


def remove_abandoned(target: Path) -> None:
    """Remove the folders of earlier saves to `target` that no process writes any more.

    Only processes of this node can be looked for: what a process of another one has left stays.
    """
    for partial in target.parent.glob(f"{glob.escape(target.name)}.*{PARTIAL_SUFFIX}"):
        owner = _OWNER.fullmatch(partial.name.removeprefix(target.name))
        if owner is None or owner[1] != _node():
            continue
        process = int(owner[2])
        ours = process == os.getpid()
        if partial.name not in _in_progress if ours else not psutil.pid_exists(process):
            discard(partial)


def _node() -> str:
    """Return what tells apart where process ids mean the same processes: host, boot, container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = [
        socket.gethostname(),
        boot.read_text(encoding="ascii") if boot.exists() else "",
        os.readlink(namespace) if namespace.exists() else "",
    ]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:8]
