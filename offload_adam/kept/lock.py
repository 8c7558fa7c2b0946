"""The lock that a process holds while it uses a kept file."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from pathlib import Path

from offload_adam.errors import KeptInUseError
from offload_adam.printable import printable

_POLL_S = 0.1
_held: dict[str, int] = {}  # path of a lock: the process that holds it, to be ignored after a fork
_held_guard = threading.Lock()


class KeptLock:
    """Keeps other processes from using the kept file of a path.

    Owns: `<path>.lock`, and a lock on it from `acquire` until `release` or the process's death. The
        lock file itself stays, because to remove it would let two processes lock two files.
    """

    # A POSIX record lock (lockf, not flock): forked children, such as data loaders that outlive
    # their killed parent, do not inherit it. It has two pitfalls. It does not conflict within a
    # process, hence `_held`. And a process loses it when it closes any descriptor of the file, so
    # nothing else may open the lock file.

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_path = path.with_name(f"{path.name}.lock")
        self._key = os.path.realpath(self._lock_path)
        self._file: int | None = None

    def acquire(self, timeout_s: float) -> None:
        """Wait until no other process, and nothing else in this process, holds the lock.

        Raises:
            KeptInUseError: it was held for `timeout_s` seconds.
            OSError: the lock file cannot be opened, for example because it is another user's.
        """
        self._lock_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline_s = time.monotonic() + timeout_s
        while (owner := self._try_acquire()) is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise KeptInUseError(
                    f"The kept state {self._path} is in use by {owner}, still after "
                    f"{timeout_s:g} s. Close that optimizer or end its process, or choose another "
                    "memory.keep_path."
                )
            time.sleep(min(_POLL_S, left_s))

    def release(self) -> None:
        """Release the lock. Idempotent."""
        with _held_guard:
            if self._file is not None:
                os.close(self._file)
                self._file = None
                _held.pop(self._key, None)

    def _try_acquire(self) -> str | None:
        """Acquire the lock and return None, or return the process that holds it."""
        with _held_guard:
            if _held.get(self._key) == os.getpid():
                return f"another optimizer of this process ({os.getpid()})"
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(self._lock_path, flags, 0o600)
            try:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):  # systems differ
                    owner = os.pread(file, 300, 0).decode(errors="replace")
                    return printable(owner) or "a process that has just begun"
                owner = f"process {os.getpid()} on {socket.gethostname()}"
                os.ftruncate(file, 0)
                os.pwrite(file, owner.encode(), 0)
                self._file, _held[self._key] = file, os.getpid()
                return None
            finally:
                if self._file != file:
                    os.close(file)
