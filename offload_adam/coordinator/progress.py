"""How far this process is, and the record of it that its peers read while they wait."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_thread = threading.local()


@dataclass
class ProgressRecord:
    """Where the training thread is. That thread writes it, any thread reads it.

    Other threads leave it as it is: see `untracked`.

    step: the optimizer step that began last, from 1 on.
    phase: what the thread does; bucket: for which bucket, None for all.
    waiting: the thread waits in one of our collectives for other ranks.
    long_running: the phase may take long without a move (compilation, a slow disk), so it is exempt
        from `stuck_after`.
    moves: counts all changes. If it stays the same, the process makes no progress.
    """

    step: int = 0
    phase: str = "start"
    bucket: int | None = None
    waiting: bool = False
    long_running: bool = False
    moves: int = 0

    @property
    def where(self) -> str:
        """Phase, bucket and step, for a message."""
        of_bucket = "" if self.bucket is None else f" of bucket {self.bucket}"
        return f"{self.phase}{of_bucket}, step {self.step}"

    @contextmanager
    def at(
        self, phase: str, bucket: int | None = None, *, long_running: bool = False
    ) -> Iterator[None]:
        """Record `phase` for the body. If the body raises, the phase and bucket of the error stay.

        Args:
            long_running: see the field; a phase inside a long-running one is long-running too.
        """
        outer = self.phase, self.bucket, self.long_running
        self._move(phase, bucket, self.long_running or long_running)
        try:
            yield
        except BaseException:
            if not _is_untracked():
                self.long_running = outer[2]
            raise
        self._move(*outer)

    @contextmanager
    def untracked(self) -> Iterator[None]:
        """Ignore what the calling thread does in the body: it is not the training thread."""
        before = _is_untracked()
        _thread.is_untracked = True
        try:
            yield
        finally:
            _thread.is_untracked = before

    @contextmanager
    def awaiting(self, *, peers: bool) -> Iterator[None]:
        """Record that the body waits for other ranks, through a thread of ours, if `peers`."""
        if not peers:
            yield
            return
        self.wait(True)
        try:
            yield
        finally:
            self.wait(False)

    def wait(self, waiting: bool) -> None:
        """Record that the thread begins, or ends, to wait for other ranks."""
        if _is_untracked():
            return
        self.waiting = waiting
        self.moves += 1

    def move(self) -> None:
        """Record progress within a phase, also from a thread that is not tracked.

        An update that waits for a checkpoint makes progress.
        """
        self.moves += 1

    def begin_step(self, step: int) -> None:
        """Record that this optimizer step begins."""
        self.step = step
        self.moves += 1

    def _move(self, phase: str, bucket: int | None, long_running: bool) -> None:
        if _is_untracked():
            return
        self.phase, self.bucket, self.long_running = phase, bucket, long_running
        self.moves += 1


def _is_untracked() -> bool:
    return getattr(_thread, "is_untracked", False)


PROGRESS = ProgressRecord()
"""The progress of this process: it trains one model, on one thread."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a machine.

    machine: boot id of the kernel and pid namespace, within which `pid` is valid.
    born: creation time, which tells the process from a later one with the same pid.
    """

    host: str
    machine: str
    pid: int
    born: float

    @classmethod
    def own(cls) -> Process:
        """Return this process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), psutil.Process().create_time())

    def is_gone(self, seen_from: Process) -> bool:
        """Return whether the process has certainly ended; False on another machine."""
        if self.machine != seen_from.machine:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.born or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What a rank publishes with each heartbeat.

    beat: counts the heartbeats.
    progress: a copy, taken with the heartbeat.
    still_s: seconds since its training thread last made progress.
    left: None while the rank runs; then its last error, or "" if it ended without one.
    """

    rank: int
    process: Process
    beat: int
    progress: ProgressRecord
    still_s: float
    left: str | None = None

    def to_json(self) -> str:
        """Return the record as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> PeerRecord:
        """Read the output of `to_json`."""
        values = json.loads(text)
        process = Process(**values.pop("process"))
        return cls(process=process, progress=ProgressRecord(**values.pop("progress")), **values)

    @property
    def address(self) -> str:
        """Process id and host, for a message."""
        return f"process {self.process.pid} on {self.process.host}"


def _machine() -> str:
    """Return an id of this kernel and pid namespace; containers on one host differ in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
