"""Files of kept state that a keeper process holds: `memory.keep: keeper`."""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from offload_adam.errors import KeptInUseError, KeptStateError
from offload_adam.kept import keeper
from offload_adam.kept.file import peek
from offload_adam.kept.holder import unusable
from offload_adam.kept.record import step_of

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_ANSWER_S = 20.0
"""Seconds to wait for a keeper to start, and for each answer."""
_ISOLATED = ["-I", "-S"]
"""Options of Python for a keeper, which imports only the standard library."""
_PROGRAM = secrets.token_hex(8)
"""Tells a keeper whether a process has replaced itself by `exec`, which unmaps its files."""


class _NoKeeperError(Exception):
    """No keeper serves the folder: if there was one, its files are gone."""


class KeeperHolder:
    """See `Holder`. The file is anonymous memory; a keeper process has a descriptor of it, too.

    Owns: a connection to the keeper, from `acquire` to `release`. The keeper itself goes on.
    A forked child does not use its parent's connection: there, the methods do nothing.
    """

    def __init__(self, folder: Path, name: str, keep_for_s: float | None) -> None:
        """Use the file of a name at the keeper of a folder.

        Args:
            folder: of the run, on a file system of this node; has the keeper's socket.
            keep_for_s: seconds after which a keeper without clients frees the files and ends. None
                to look at the file only, which does not begin these seconds again.
        """
        self.place = f"{name} of the keeper in {folder}"
        self._folder = folder.absolute()
        self._name = name
        self._keep_for_s = keep_for_s
        self._own: socket.socket | None = None
        self._socket_file: tuple[int, int] | None = None
        self._is_acquired = False
        self._process = os.getpid()

    def acquire(self, timeout_s: float) -> None:
        """See `Holder`. Starts a keeper if there is none."""
        if not hasattr(os, "memfd_create"):
            raise KeptStateError("memory.keep: keeper needs Linux. Choose shared, or none.")
        deadline_s = time.monotonic() + timeout_s
        while (owner := self._try_acquire()) is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self._disconnect()
                own = "another optimizer of this process" if owner == os.getpid() else "process"
                raise KeptInUseError(
                    f"The kept state {self.place} is in use by {own} {owner} on "
                    f"{socket.gethostname()}, still after {timeout_s:g} s. Close that optimizer or "
                    "end its process, or choose another memory.keep_path."
                )
            time.sleep(min(_POLL_S, left_s))

    def _try_acquire(self) -> int | None:
        """Acquire the file and return None, or return the process that uses it."""
        deadline_s = time.monotonic() + _ANSWER_S
        while True:
            try:
                if self._own is None:
                    self._own = _connect(self._folder) or _start(self._folder)
                answer, _ = self._ask("acquire", keep_for_s=self._keep_for_s)
            except _NoKeeperError as error:  # one is starting or ending
                if time.monotonic() > deadline_s:
                    raise unusable(
                        self._folder,
                        "is locked, but has no keeper that can be reached. `offload-adam keeper "
                        "list` shows keepers, and `keeper stop` ends them. The folder must be on a "
                        "file system of this node, such as /tmp, and this user's own",
                    ) from error
                time.sleep(_POLL_S)
            else:
                self._is_acquired = "pid" not in answer
                self._socket_file = _identity_of(self._folder / keeper.SOCKET_NAME)
                return answer.get("pid")

    def release(self) -> None:
        """See `Holder`."""
        if not self._is_acquired or self._process != os.getpid():
            return
        self._is_acquired = False
        try:
            if self._own is None:  # it was lost: the keeper was slow, or is another one now
                self._own = _connect(self._folder)
            if self._own is not None:
                self._ask("release")
        except (_NoKeeperError, KeptStateError):
            pass  # this process's death releases the file, too
        self._disconnect()

    def has_file(self) -> bool:
        """See `Holder`."""
        try:
            file = self.open()
        except KeptStateError:
            return True  # a keeper that is slow
        if file is not None:
            os.close(file)
        return file is not None

    def open(self) -> int | None:
        """See `Holder`."""
        try:
            if self._is_connected:
                return self._ask("open")[1]
            connection = _connect(self._folder)
            if connection is None:
                return None
            with closing(connection):
                return _ask(connection, self._request("open"))[1]
        except _NoKeeperError:
            return None

    def create(self) -> int:
        """See `Holder`. The memory counts towards the limits of this process, not of the keeper."""
        file = os.memfd_create(f"offload_adam {self._name}", os.MFD_CLOEXEC)
        try:
            self._ask_or_warn("create", file)
        except BaseException:
            os.close(file)
            raise
        return file

    def remove(self) -> None:
        """See `Holder`."""
        self._ask_or_warn("remove")

    def check(self) -> None:
        """See `Holder`."""
        if self._is_connected:
            assert self._own is not None
            poll = select.poll()
            # The keeper sends nothing unasked: if there is something to read, it is the end.
            poll.register(self._own, select.POLLIN)
            path = self._folder / keeper.SOCKET_NAME
            if poll.poll(0) or _identity_of(path) != self._socket_file:
                self._warn()

    def names(self) -> Sequence[str]:
        """See `Holder`."""
        try:
            return list(self._ask("describe")[0]["files"]) if self._is_connected else []
        except _NoKeeperError:
            return []

    def of(self, name: str) -> KeeperHolder:
        """See `Holder`."""
        return KeeperHolder(self._folder, name, self._keep_for_s)

    @property
    def _is_connected(self) -> bool:
        return self._own is not None and self._process == os.getpid()

    def _ask(
        self, operation: str, file: int | None = None, **values: Any
    ) -> tuple[dict[str, Any], int | None]:
        assert self._own is not None
        try:
            return _ask(self._own, self._request(operation) | values, file)
        except (_NoKeeperError, KeptStateError):
            self._disconnect()  # a late answer would be taken for that to the next request
            raise

    def _request(self, operation: str) -> dict[str, Any]:
        looks = self._keep_for_s is None
        return {"do": operation, "name": self._name, "program": _PROGRAM, "looks": looks}

    def _ask_or_warn(self, operation: str, file: int | None = None) -> None:
        """Ask, if this process is connected. Training goes on without a keeper."""
        if self._is_connected:
            try:
                self._ask(operation, file)
            except _NoKeeperError:
                self._warn()

    def _warn(self) -> None:
        self._disconnect()
        logger.warning(
            "The keeper in %s has ended, or its socket was deleted. Training continues, but the "
            "state of this process is no longer kept: after a kill, the newest checkpoint is used",
            self._folder,
        )

    def _disconnect(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None


class HeldFile(NamedTuple):
    """A file at a keeper.

    age_s: seconds since it was created.
    pid: the process that uses it, None if it is unused.
    step: the step that was decided last, None if there is none.
    """

    nbytes: int
    age_s: float
    pid: int | None
    step: int | None


class RunningKeeper(NamedTuple):
    """A keeper of this user.

    files: None if the keeper does not answer.
    left_s: seconds until it frees the files; None while some are in use.
    """

    pid: int
    folder: Path
    files: dict[str, HeldFile] | None
    left_s: float | None


def running_keepers() -> list[RunningKeeper]:
    """Return the keepers of this user that this process can see, in order of their folders."""
    found = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        command, uids = process.info["cmdline"] or [], process.info["uids"]
        is_keeper = (
            len(command) == 5
            and command[1:3] == _ISOLATED
            and command[3].endswith("/offload_adam/kept/keeper.py")
        )
        if is_keeper and uids is not None and uids.effective == os.geteuid():
            found.append(_describe(process.pid, Path(command[-1])))
    return sorted(found, key=lambda one: one.folder)


def _describe(pid: int, folder: Path) -> RunningKeeper:
    try:
        connection = _connect(folder)
        if connection is not None:
            with closing(connection):
                if keeper.credentials(connection)[0] == pid:
                    answer, _ = _ask(connection, {"do": "describe"})
                    files = {
                        name: HeldFile(**values, step=_step(KeeperHolder(folder, name, None)))
                        for name, values in answer["files"].items()
                    }
                    return RunningKeeper(pid, folder, files, answer["left_s"])
    except (_NoKeeperError, KeptStateError):
        pass
    return RunningKeeper(pid, folder, None, None)


def _step(holder: KeeperHolder) -> int | None:
    prepared = peek(holder)
    return None if prepared is None else step_of(prepared)


def _connect(folder: Path) -> socket.socket | None:
    """Connect to the keeper of a folder; None if there is none.

    Raises:
        KeptStateError: the folder cannot be used, or its keeper is of another user or version.
    """
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(folder, f"cannot be opened: {error.strerror}") from None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_ANSWER_S)
        connection.connect(keeper.address(directory))
        _, user = keeper.credentials(connection)
        if user != os.geteuid():
            raise unusable(folder, f"has the keeper of user {user}")
        protocol = _ask(connection, {"do": "describe"})[0]["protocol"]
        if protocol != keeper.PROTOCOL:
            raise unusable(
                folder,
                f"has a keeper of another version of this package ({protocol}, not "
                f"{keeper.PROTOCOL}): `offload-adam keeper stop {folder}`",
            )
    except (FileNotFoundError, ConnectionRefusedError, _NoKeeperError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise unusable(folder, f"has no keeper that can be reached: {error}") from None
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(directory)
    return connection


def _start(folder: Path) -> socket.socket:
    """Start a keeper for a folder, and connect to it, or to another that was faster.

    Raises:
        KeptStateError: it cannot be started.
        _NoKeeperError: another keeper is starting or ending.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, *_ISOLATED, keeper.__file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_ANSWER_S,
            cwd="/",  # it would keep a file system busy
            start_new_session=True,  # signals to this process's group do not reach it
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise unusable(folder, f"cannot have a keeper: {error}") from None
    answer = done.stdout.strip()
    if answer not in (keeper.READY, keeper.OTHER):
        lines = answer.splitlines() or [f"{sys.executable} ended with {done.returncode}"]
        raise unusable(folder, f"cannot have a keeper: {lines[-1]}")
    connection = _connect(folder)
    if connection is None:
        raise _NoKeeperError
    return connection


def _ask(
    connection: socket.socket, request: dict[str, Any], file: int | None = None
) -> tuple[dict[str, Any], int | None]:
    try:
        keeper.send(connection, request, file)
        return keeper.receive(connection)
    except TimeoutError:
        pid, _ = keeper.credentials(connection)
        raise KeptStateError(
            f"The keeper of kept state, process {pid}, does not answer within {_ANSWER_S:g} s. If "
            f"it is stopped, continue it, or give its state up: kill -9 {pid}"
        ) from None
    except (OSError, ValueError) as error:
        raise _NoKeeperError from error


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from others that have its path later; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
