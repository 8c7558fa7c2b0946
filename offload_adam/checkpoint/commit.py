"""Turns a partial folder into a checkpoint by one rename; removes folders that killed saves left.

A save writes into `<checkpoint>.<node>-<process>-<random>.partial`. This name identifies the
process that writes: a later save removes the folder of a killed process, but not that of a save
that still runs.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from offload_adam.checkpoint.format import MANIFEST_NAME, Manifest, parse_manifest, sealed
from offload_adam.checkpoint.reader import VerifiedFile
from offload_adam.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}" + re.escape(PARTIAL_SUFFIX))
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without hard links."""
_NO_FLUSH = (errno.EINVAL, errno.EACCES)
"""Errors of file systems that cannot flush a folder, and of folders that may only be written to."""

_in_progress: set[str] = set()
"""Names of the partial files and folders that this process is writing."""


def partial_name(name: str) -> str:
    """Return a new name for a file or folder that this process later renames to `name`.

    The name is in progress until `publish` or `discard`, so `remove_abandoned` keeps the file.
    """
    own = f"{name}.{_node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
    _in_progress.add(own)
    return own


@contextmanager
def partial_output(out: Path) -> Iterator[Path]:
    """Yield a path to write to. The body publishes it as `out`; after an error it is removed.

    Missing parent folders of `out` are created.

    Raises:
        CheckpointError: `out` exists.
    """
    require_new(out)
    make_folder(out.parent)
    remove_abandoned(out)
    partial = out.with_name(partial_name(out.name))
    try:
        yield partial
    except BaseException:
        discard(partial)
        raise


def require_new(target: Path) -> None:
    """Check that nothing exists at the path of a new checkpoint or file.

    Raises:
        CheckpointError: `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists and is never overwritten. Choose another path.")


def commit_files(partial: Path, target: Path, manifest: Manifest) -> None:
    """Check that no file is missing, write the manifest, and rename `partial` to `target`.

    Raises:
        CheckpointError: a file is missing, since a rank wrote to another disk or its disk was
            unmounted; or another process has written `target` in the meantime.
    """
    text = sealed(manifest.model_dump())
    # Parsing checks that the pieces of all ranks together cover every tensor exactly once.
    parse_manifest(text, str(target))
    # Rank 0 must see every rank's file at its full length: a rank may have lost its mount.
    for name, entry in manifest.files.items():
        VerifiedFile(partial, name, entry).close()
    with (partial / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    publish(partial, target)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and flush their names to the disk.

    Otherwise a power failure could remove the folder together with its checkpoints.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk, where that is possible.

    fsync of a file does not flush its name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def publish(partial: Path, target: Path) -> None:
    """Rename a complete file or folder to its target, and flush the new name to the disk.

    Args:
        partial: its files must be flushed; the names in a folder need not be.

    Raises:
        CheckpointError: the target exists, since another process has written it in the meantime.
    """
    # A rename may reach the disk before the data. So the files and their names are flushed first:
    # after a power failure, a folder without `.partial` in its name is complete.
    if partial.is_dir():
        flush(partial)
    try:
        _rename(partial, target)
    except OSError as error:
        # The codes of this error differ between file systems, so look for the target instead.
        if not os.path.lexists(target):
            raise
        raise CheckpointError(
            f"{target} was written by another process in the meantime. This checkpoint is "
            "discarded: give each job its own path."
        ) from error
    _in_progress.discard(partial.name)
    flush(target.parent)  # makes the rename itself durable


def _rename(partial: Path, target: Path) -> None:
    """Rename atomically, or fail if the target exists: only one of several saves succeeds."""
    if partial.is_file():
        # A rename would replace an existing file; a hard link raises an error.
        try:
            os.link(partial, target)
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(target):
                raise
        else:
            partial.unlink()
            return
    # Raises an error if the target is a folder with files in it, as every checkpoint is.
    partial.rename(target)


def discard(partial: Path) -> None:
    """Remove a partial file or folder. A later save removes what cannot be removed now."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink()
    _in_progress.discard(partial.name)


def remove_abandoned(target: Path) -> None:
    """Remove the partial folders that killed saves to `target` have left.

    Process ids can only be checked on this node, so folders of other nodes are kept.
    """
    for partial in target.parent.glob(f"{glob.escape(target.name)}.*{PARTIAL_SUFFIX}"):
        owner = _OWNER.fullmatch(partial.name.removeprefix(target.name))
        if owner is None or owner[1] != _node():
            continue
        process = int(owner[2])
        if process == os.getpid():
            # A failed save of this process, or of an earlier one that had the same id.
            is_abandoned = partial.name not in _in_progress
        else:
            is_abandoned = not psutil.pid_exists(process)
        if is_abandoned:
            discard(partial)


def _node() -> str:
    """Return a hash of host, boot and PID namespace, in which a process id identifies a process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = [
        socket.gethostname(),
        boot.read_text(encoding="ascii") if boot.exists() else "",
        os.readlink(namespace) if namespace.exists() else "",
    ]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:8]
