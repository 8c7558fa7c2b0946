"""Takes the space of a kept file from its file system, which should be in memory."""

from __future__ import annotations

import errno
import functools
import mmap
import os
from pathlib import Path

from offload_adam.errors import HostMemoryError, warn_user
from offload_adam.layout.flat import align
from offload_adam.units import format_nbytes

_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG)


def map_new(file: int, place: str, nbytes: int, reserved_nbytes: int) -> mmap.mmap:
    """Set the size of a new file, and map it.

    Args:
        file: its descriptor.
        place: names the file in the message of an error.
        nbytes: the least size. Files on hugetlbfs consist of whole huge pages.
        reserved_nbytes: allocate the pages of these first bytes.

    Raises:
        HostMemoryError: the file system has less space.
        OSError: the file system does not work.
    """
    system = os.fstatvfs(file)
    size = align(nbytes, system.f_bsize)
    free_nbytes = system.f_bavail * system.f_frsize
    try:
        # A mount without a limit has 0 blocks.
        if system.f_blocks and size > free_nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(file, size)
        allocate(file, reserved_nbytes)
        return mmap.mmap(file, size)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = f"The kept state {place} needs {format_nbytes(size)}"
        if not system.f_blocks:
            raise HostMemoryError(
                f"{needed}, which this node or container does not have ({error.strerror}). Choose "
                "a smaller optimizer.state_format, or use more nodes."
            ) from error
        raise HostMemoryError(
            f"{needed}, but its file system has {format_nbytes(free_nbytes)} free "
            f"({error.strerror}). Enlarge it (docker: --shm-size; Kubernetes: an emptyDir volume "
            "with medium Memory), choose another memory.keep_path, or set memory.keep: keeper, "
            "which needs no file system. Kept state counts towards the memory limit of a container."
        ) from error


def allocate(file: int, nbytes: int) -> None:
    """Allocate the pages of a file's first bytes, if its file system has a call for that.

    If a page cannot be allocated at its first access instead, the process ends by SIGBUS.
    """
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@functools.cache  # one warning a folder
def warn_unless_in_memory(folder: Path) -> None:
    """Warn if a folder is known to be on a file system that is not in memory."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: unknown
        return
    # Each line: id, parent, device, root, mount point, options ... "-", type, source, options.
    # See proc_pid_mountinfo(5). Some disks, such as btrfs, have other numbers than their mount.
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split(" ")[2:3] == [number] and rest.split(" ")[0] in _IN_MEMORY:
            return
    warn_user(
        f"{folder} is not in memory, so the kept state there is written to a disk again and again, "
        "and steps become slow. Choose a memory.keep_path in /dev/shm."
    )
