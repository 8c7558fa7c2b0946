"""Reads files of unknown origin: within bounded time and memory."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def read_regular_file(path: Path, max_nbytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file cannot be read, is larger, or is not regular: a read of a pipe or a device
            may never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read(max_nbytes + 1)
    if len(content) > max_nbytes:
        raise OSError(errno.EFBIG, f"larger than {max_nbytes:,} bytes", str(path))
    return content
