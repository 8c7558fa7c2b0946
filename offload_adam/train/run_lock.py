"""One job at a time writes to a run's folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from offload_adam.config import ConfigError, RunConfig
from offload_adam.errors import RunFolderLostError
from offload_adam.train.run_folder import run_folder

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"

LEASE_S = 30.0
"""Seconds without a refresh after which the lock of a process on another host is taken over."""

_REFRESHES = 10  # in one lease, so that a second start is rejected after a tenth of it
_POLL_S = 0.1


@contextmanager
def locked_run_folder(config: RunConfig) -> Iterator[Callable[[], None]]:
    """Hold the lock of the run's folder on rank 0; other ranks do nothing.

    The lock is a file that its owner refreshes, so it needs no `flock`. A dead process of this host
    loses it at once, one of another host or container after `LEASE_S` seconds without a refresh.

    Yields:
        What raises `RunFolderLostError` once another job has taken the folder over.

    Raises:
        ConfigError: another process holds the folder; with its host and process id.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda: None
        return
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(
        folder / LOCK_NAME,
        lease_duration=LEASE_S,
        heartbeat_interval=LEASE_S / _REFRESHES,
        on_compromise=_warn,
        thread_local=False,
    )
    try:
        try:
            _acquire(lock, folder)
        except OSError as error:
            raise ConfigError.at(
                "run.dir", f"{folder / LOCK_NAME} cannot be made: {error}"
            ) from error
        yield lambda: _require_held(lock, folder)
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # only where nothing has been written


def _acquire(lock: SoftFileLease, folder: Path) -> None:
    """Acquire the lock, or see that its owner refreshes it."""
    began, first_seen = time.monotonic(), None
    while True:
        with suppress(Timeout):
            lock.acquire(timeout=0)
            return
        with suppress(FileNotFoundError):
            refreshed = (folder / LOCK_NAME).stat().st_mtime_ns
            first_seen = refreshed if first_seen is None else first_seen
            if refreshed != first_seen or time.monotonic() - began > 2 * LEASE_S:
                raise ConfigError.at(
                    "run.name",
                    f"{folder} is in use by {_owner_of(lock)}: wait until that run has ended, or "
                    "choose another run.name",
                )
        time.sleep(_POLL_S)


def _owner_of(lock: SoftFileLease) -> str:
    owner = lock.owner
    return "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"


def _warn(loss: LeaseCompromise) -> None:
    logger.warning(
        "the lock %s was lost (%s): another run may start in this folder",
        loss.lock_file,
        loss.reason,
    )


def _require_held(lock: SoftFileLease, folder: Path) -> None:
    """Raise where another process owns the lock now."""
    for _ in range(2):  # a start that is rejected may exchange the file for a moment
        owner = lock.owner
        if owner is None or owner.token == lock.token:
            return
        time.sleep(_POLL_S)
    raise RunFolderLostError(
        f"{folder} was taken over by {_owner_of(lock)}: this process seemed dead, as one that is "
        f"stopped for {LEASE_S:.0f} s does. This run ends, so that two runs do not mix their files"
    )
