"""The folder of a run: its files, and the lock that keeps two runs from mixing them.

<run.dir>/<run.name>/config.yaml, metrics.jsonl, lock, checkpoints/step-<n>/
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import SoftFileLease, Timeout

from offload_adam.checkpoint.commit import make_folder
from offload_adam.config import ConfigError, RunConfig, dump_config
from offload_adam.coordinator.launcher import launched
from offload_adam.errors import RunFolderLostError
from offload_adam.profiling.json_lines import read_objects
from offload_adam.train.records import StepRecord

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
LOCK_NAME = "lock"

LEASE_S = 30.0
"""Seconds without a refresh after which the lock of a process on another host is taken over.

A live process that pauses for longer, such as in a hung network file system, may lose its folder to
another start. A start after a crash on another host waits this long.
"""
# Refreshes per lease. A second start is rejected at the owner's next refresh, so after a tenth of
# the lease at most.
_REFRESHES = 10
_POLL_S = 0.1  # between looks at the lock file; refreshes are 3 s apart


def run_folder(config: RunConfig) -> Path:
    """Return `<run.dir>/<run.name>`."""
    return Path(config.run.dir) / config.run.name


def require_writable(config: RunConfig) -> None:
    """Check that the run's folder can be created, without creating it.

    Raises:
        ConfigError: the folder cannot be created or written to.
    """
    folder = run_folder(config)
    present = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        # Create the missing part of the path in a temporary folder next to its real place. Only a
        # try shows whether the file system allows it.
        with tempfile.TemporaryDirectory(prefix=".offload-adam-", dir=present) as place:
            (place / folder.relative_to(present)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError.at(
            "run.dir", f"{folder} cannot be written to ({reason}): choose a writable folder"
        ) from error


def open_run_folder(config: RunConfig, last_step: int) -> TextIO:
    """Create the folder, write the whole configuration to it, and open the file of records.

    Args:
        last_step: the step of the checkpoint that the run resumes from. Records of later steps are
            dropped, since the run repeats these steps, and so are damaged lines. If 0, a new run
            begins, and files of an earlier run are renamed to `metrics-<n>.jsonl` and
            `config-<n>.yaml`.

    Returns:
        The file to append records to. It is line-buffered, so that a killed run keeps its records.
    """
    folder = run_folder(config)
    make_folder(folder)
    path = folder / METRICS_NAME
    if last_step == 0:
        _rename_earlier_files(folder)
    else:
        kept = [line for line, record in read_objects(path, "step") if _is_kept(record, last_step)]
        _replace(path, b"".join(line.strip() + b"\n" for line in kept))
    _replace(folder / CONFIG_NAME, dump_config(config).encode())
    return path.open("a", encoding="utf-8", buffering=1)


def has_record(config: RunConfig, record: StepRecord) -> bool:
    """Return whether the file of records already has this one, whatever its timings."""
    lines = read_objects(run_folder(config) / METRICS_NAME, "step")
    return any(record.is_recorded_in(line) for line, _ in lines)


def _is_kept(record: Mapping[str, Any], last_step: int) -> bool:
    """Return whether a record is of one of the steps up to `last_step`."""
    step = record["step"]
    return type(step) is int and 1 <= step <= last_step


def _replace(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: a killed process leaves the previous file.

    A pipe or a device of this name, which could block the run, is replaced too.
    """
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(content)
    partial.replace(path)


def _rename_earlier_files(folder: Path) -> None:
    present = [path for name in (METRICS_NAME, CONFIG_NAME) if (path := folder / name).exists()]
    if not present:
        return
    number = 1
    while list(folder.glob(f"metrics-{number}.*")) or list(folder.glob(f"config-{number}.*")):
        number += 1
    moved = [path.rename(path.with_stem(f"{path.stem}-{number}")).name for path in present]
    logger.info("Renamed the files of an earlier run in %s to %s", folder, " and ".join(moved))


@contextmanager
def locked_run_folder(config: RunConfig) -> Iterator[Callable[[], None]]:
    """Hold the lock of the run's folder on rank 0. Other ranks do nothing.

    The lock is a file whose modification time its owner refreshes, so it also works on file systems
    without `flock`. If the owner is a dead process of this host, the lock is taken over at once. If
    the owner is on another host or in another container, this takes `LEASE_S` seconds without a
    refresh.

    Yields:
        A function that raises `RunFolderLostError` once another job has taken the folder over.

    Raises:
        ConfigError: another process holds the lock; names its host and process id.
    """
    if launched("RANK") != 0:
        yield lambda: None
        return
    folder = run_folder(config)
    make_folder(folder)
    lock = SoftFileLease(
        folder / LOCK_NAME,
        lease_duration=LEASE_S,
        heartbeat_interval=LEASE_S / _REFRESHES,
        on_compromise=lambda loss: logger.warning(
            "Lost the lock %s (%s). Another run may start in this folder, and would end this one",
            loss.lock_file,
            loss.reason,
        ),
        thread_local=False,
    )
    try:
        _acquire(lock, folder)
        yield lambda: _require_held(lock, folder)
    finally:
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # fails unless the folder is empty


def _acquire(lock: SoftFileLease, folder: Path) -> None:
    """Acquire the lock; raise an error as soon as its owner refreshes it, or after two leases.

    After one lease without a refresh, `acquire` takes the lock over. The second lease is a margin.
    """
    began, first_refresh_ns = time.monotonic(), None
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            pass
        except OSError as error:
            place = folder / LOCK_NAME
            reason = error.strerror or error
            raise ConfigError.at("run.dir", f"{place} cannot be created: {reason}") from error
        with suppress(FileNotFoundError):
            refresh_ns = (folder / LOCK_NAME).stat().st_mtime_ns
            first_refresh_ns = refresh_ns if first_refresh_ns is None else first_refresh_ns
            if refresh_ns != first_refresh_ns or time.monotonic() - began > 2 * LEASE_S:
                raise ConfigError.at(
                    "run.name",
                    f"{folder} is in use by {_owner_of(lock)}: wait until that run has ended, or "
                    "choose another run.name",
                )
        time.sleep(_POLL_S)


def _owner_of(lock: SoftFileLease) -> str:
    owner = lock.owner
    return "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"


def _require_held(lock: SoftFileLease, folder: Path) -> None:
    """Raise an error if another process owns the lock now."""
    # Look twice: while another start checks whether the lock is stale, filelock replaces the file
    # for a moment.
    for _ in range(2):
        owner = lock.owner
        if owner is None or owner.token == lock.token:
            return
        time.sleep(_POLL_S)
    raise RunFolderLostError(
        f"{folder} was taken over by {_owner_of(lock)}, because this process did not refresh its "
        f"lock for {LEASE_S:.0f} s. This run ends, so that two runs do not mix their files. To run "
        "both, start this one again with another run.name."
    )
