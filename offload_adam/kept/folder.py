"""Files of kept state in a folder in shared memory: `memory.keep: shared`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from offload_adam.kept.holder import unusable
from offload_adam.kept.lock import KeptLock
from offload_adam.kept.space import warn_unless_in_memory

_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


class FolderHolder:
    """A `Holder` whose file has a path. Its lock is `<path>.lock`."""

    def __init__(self, path: Path) -> None:
        """Use the file of a path; it should be on tmpfs or hugetlbfs."""
        self.place = str(path)
        self._path = path
        self._lock = KeptLock(path)

    def acquire(self, timeout_s: float) -> None:
        """See `Holder`."""
        try:
            self._lock.acquire(timeout_s)
        except OSError as error:
            raise unusable(self.place, f"cannot be opened: {error.strerror}") from error

    def release(self) -> None:
        """See `Holder`."""
        self._lock.release()

    def has_file(self) -> bool:
        """See `Holder`."""
        return self._path.exists()

    def open(self) -> int | None:
        """See `Holder`."""
        try:
            # O_NONBLOCK: the open of a device may wait.
            return os.open(self._path, os.O_RDWR | os.O_NONBLOCK | _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(self.place, f"cannot be opened: {error.strerror}") from None

    def create(self) -> int:
        """See `Holder`. Also creates the folder. Warns if it is not in memory."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        warn_unless_in_memory(self._path.parent)
        self.remove()
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)

    def remove(self) -> None:
        """See `Holder`."""
        self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """See `Holder`."""

    def names(self) -> Sequence[str]:
        """See `Holder`."""
        # The folder may have other files, which are the user's.
        return [path.name for path in self._path.parent.glob("rank-" + "[0-9]" * 5)]

    def of(self, name: str) -> FolderHolder:
        """See `Holder`."""
        return FolderHolder(self._path.with_name(name))
