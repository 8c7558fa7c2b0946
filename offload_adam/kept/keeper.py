"""The keeper: a small process that holds the kept files of a run while no rank of it does.

    rank --- create: memfd ---> keeper          the rank is killed; the keeper's descriptor remains
    rank <-- open: memfd ------ keeper          the next process of the rank maps the same memory

`keeper_client` starts this file as a script, without the package and its imports, so that the
process is small and starts at once. It outlives its parent. It ends after a time without a client,
or by SIGTERM. The files are anonymous memory: no file system limits their size.

A client is a connection to the socket in the run's folder. Each message is one packet of JSON, with
up to one descriptor. Only processes of the same user are served.

Source: the idea is that of the file descriptor store of systemd, see sd_notify(3), FDSTORE=1.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

SOCKET_NAME = "keeper.sock"
PROTOCOL = 1
MAX_MESSAGE_NBYTES = 128 * 1024
READY, OTHER = "ready", "another keeper has the folder"
_MAX_FILES, _MAX_NAME_LENGTH = 500, 100
_EMPTY_S = 10.0
"""Seconds after which a keeper without files and clients ends."""
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def send(connection: socket.socket, message: dict[str, Any], file: int | None = None) -> None:
    """Send a message, with a descriptor or without.

    Raises:
        OSError: the connection is closed, or the peer does not read.
    """
    socket.send_fds(connection, [json.dumps(message).encode()], [] if file is None else [file])


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Receive a message and its descriptor, which the caller closes.

    Raises:
        ConnectionError: the connection is closed.
        OSError: nothing was received in time.
        ValueError: the message is not JSON.
    """
    content, files, _, _ = socket.recv_fds(
        connection, MAX_MESSAGE_NBYTES, 1, socket.MSG_CMSG_CLOEXEC
    )
    file = files[0] if files else None
    try:
        if not content:
            raise ConnectionResetError("the connection is closed")
        message = json.loads(content)
        if not isinstance(message, dict):
            raise ValueError("the message is no object")
    except BaseException:
        if file is not None:
            os.close(file)
        raise
    return message, file


def credentials(connection: socket.socket) -> tuple[int, int]:
    """Return process and user of the other end, as the kernel has recorded them."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return pid, uid


def address(folder: int) -> str:
    """Return the socket's path in an open folder: the folder's own may exceed 107 bytes."""
    return f"/proc/self/fd/{folder}/{SOCKET_NAME}"


class _Client:
    """One connection, and a descriptor that becomes readable when its process has ended.

    program: random text of the program that the process runs; `exec` changes it, but not `pid`.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection: socket.socket | None = connection
        self.pid = pid
        self.program = ""
        self.process: int | None = None
        with suppress(AttributeError, OSError):  # an old kernel, or another PID namespace
            # A forked child, such as a data loader that outlives its killed parent, keeps the
            # connection open. And a process that is being killed closes its files one after the
            # other: a GPU may still write to the memory after the connection was closed.
            self.process = os.pidfd_open(pid)


class Keeper:
    """Serves the clients of one folder. Single-threaded."""

    def __init__(self, listener: socket.socket) -> None:
        self._files: dict[str, int] = {}
        self._created_s: dict[str, float] = {}
        self._owners: dict[str, _Client] = {}
        self._keep_for_s = 0.0
        self._idle_since_s = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Answer clients, until there were none for the time that the last one has asked for."""
        while (left_s := self._left_s()) > 0:
            for key, _ in self._selector.select(min(left_s, 3600.0)):
                client: _Client | None = key.data
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # an event before this one has removed the client
                if client is None:
                    self._accept(key.fileobj)
                elif key.fd == client.process:
                    self._forget(client)
                else:
                    assert client.connection is not None
                    self._answer(client, client.connection)

    def _left_s(self) -> float:
        if self._owners:
            return float("inf")
        wait_s = self._keep_for_s if self._files else _EMPTY_S
        return self._idle_since_s + wait_s - time.monotonic()

    def _accept(self, listener: Any) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # too many open files; the client waits
            time.sleep(0.1)
            return
        connection.setblocking(False)  # a client that does not read its answers is dropped
        pid, user = credentials(connection)
        if user != os.geteuid():
            connection.close()
            return
        client = _Client(connection, pid)
        self._selector.register(connection, selectors.EVENT_READ, client)
        if client.process is not None:
            self._selector.register(client.process, selectors.EVENT_READ, client)

    def _answer(self, client: _Client, connection: socket.socket) -> None:
        file = None
        try:
            request, file = receive(connection)
            send(connection, *self._reply(client, request, file))
        except Exception:  # whatever a client sends, the keeper continues
            self._disconnect(client)
        finally:
            if file is not None:
                os.close(file)

    def _reply(
        self, client: _Client, request: dict[str, Any], file: int | None
    ) -> tuple[dict[str, Any], int | None]:
        """Return the answer to a request, and the descriptor to send with it."""
        operation = request["do"]
        if operation == "describe":
            return self._describe(), None
        name: str = request["name"]
        if operation == "open":
            if not request["looks"]:  # a process that is about to acquire the file
                self._idle_since_s = time.monotonic()
            return {}, self._files.get(name)
        owner = self._owners.get(name)
        is_same_process = owner is not None and owner.connection is None and owner.pid == client.pid
        if operation == "acquire":
            if owner is not None:
                if not is_same_process or owner.program == request["program"]:
                    return {"pid": owner.pid}, None
                self._forget(owner)  # `exec` has unmapped the file
            keep_for_s = float(request["keep_for_s"])
            if not 0 < keep_for_s < float("inf"):
                raise ValueError("keep_for_s is not positive and finite")
            self._keep_for_s = keep_for_s
            client.program = request["program"]
            self._owners[name] = client
            return {}, None
        if operation == "release" and is_same_process:  # it has lost its connection
            assert owner is not None
            if owner.program == request["program"]:
                self._forget(owner)
                return {}, None
        if owner is not client:
            raise ValueError(f"{name} is not this client's")
        if operation == "create":
            self._remove(name)
            if file is None or len(self._files) >= _MAX_FILES or len(name) > _MAX_NAME_LENGTH:
                raise ValueError("no file, too many files, or too long a name")
            self._files[name], self._created_s[name] = os.dup(file), time.monotonic()
        elif operation == "remove":
            self._remove(name)
        elif operation == "release":
            self._release(name)
        return {}, None

    def _describe(self) -> dict[str, Any]:
        now_s = time.monotonic()
        left_s = self._left_s()
        return {
            "protocol": PROTOCOL,
            "left_s": None if self._owners else left_s,
            "files": {
                name: {
                    "nbytes": os.fstat(file).st_size,
                    "age_s": now_s - self._created_s[name],
                    "pid": self._owners[name].pid if name in self._owners else None,
                }
                for name, file in self._files.items()
            },
        }

    def _remove(self, name: str) -> None:
        if name in self._files:
            os.close(self._files.pop(name))
            del self._created_s[name]

    def _release(self, name: str) -> None:
        del self._owners[name]
        self._idle_since_s = time.monotonic()

    def _disconnect(self, client: _Client) -> None:
        """Close a connection. A file that its process uses stays in use until the process ends."""
        if client.connection is not None:
            self._selector.unregister(client.connection)
            client.connection.close()
            client.connection = None
        if client.process is None or client not in self._owners.values():
            self._forget(client)

    def _forget(self, client: _Client) -> None:
        """Let others use the files of a client, and drop its connection."""
        for name in [name for name, owner in self._owners.items() if owner is client]:
            self._release(name)
        if client.process is not None:
            self._selector.unregister(client.process)
            os.close(client.process)
            client.process = None
        if client.connection is not None:
            self._disconnect(client)


def _end(*_: object) -> None:
    raise SystemExit


def main(folder: str) -> None:
    """Detach from the parent, and serve the clients of a folder.

    Prints READY once clients can connect, OTHER if another keeper has the folder, or an error.
    """
    if os.fork() > 0:
        os._exit(0)  # the child has no parent that would have to wait for it
    signal.signal(signal.SIGTERM, _end)
    os.umask(0o077)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Until this process ends. A lock file would have to stay forever.
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(OTHER, flush=True)
        return
    path = address(directory)
    if os.path.lexists(path):
        os.unlink(path)  # of a keeper that was killed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        try:
            listener.listen(128)
            print(READY, flush=True)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for standard in range(3):
                os.dup2(nowhere, standard)
            os.close(nowhere)
            Keeper(listener).serve()
        finally:
            with suppress(OSError):  # somebody has deleted the folder
                os.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1])
