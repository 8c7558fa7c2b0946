"""The phase and step of this process, and the record in which its peers read them."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_thread = threading.local()
_counts = threading.Lock()
_NOTHING = nullcontext()


@dataclass
class ProgressRecord:
    """The current phase of the training thread. That thread writes the record, any thread reads it.

    Inside `untracked`, phases and waits of the calling thread are ignored; `move` still counts.

    step: the optimizer step that began last, from 1 on.
    phase: the operation that the thread runs, such as "update".
    bucket: the bucket that the phase works on, None for all.
    waiting: the thread waits for other ranks, in one of our collectives or for a thread in one.
    long_running: number of open phases that may take long without a change (compilation, a slow
        disk). While there is one, the process is exempt from `stuck_after`.
    moves: counts all changes. If it stays the same, the process makes no progress.
    """

    step: int = 0
    phase: str = "start"
    bucket: int | None = None
    waiting: bool = False
    long_running: int = 0
    moves: int = 0

    @property
    def where(self) -> str:
        """Phase, bucket and step, for a message."""
        of_bucket = "" if self.bucket is None else f" of bucket {self.bucket}"
        return f"{self.phase}{of_bucket}, step {self.step}"

    def at(
        self, phase: str, bucket: int | None = None, *, long_running: bool = False
    ) -> AbstractContextManager[None]:
        """Record `phase` for the body.

        After an error in the body, its phase and bucket stay, so that messages name them.

        Args:
            long_running: see the field. A phase inside a long-running one is long-running too.
        """
        return _NOTHING if _is_untracked() else self._at(phase, bucket, long_running)

    @contextmanager
    def _at(self, phase: str, bucket: int | None, long_running: bool) -> Iterator[None]:
        outer = self.phase, self.bucket
        if long_running:
            self._add_long_running(1)
        try:
            self._move(phase, bucket)
            yield
            self._move(*outer)
        finally:
            if long_running:  # otherwise `stuck_after` would never apply again
                self._add_long_running(-1)

    @contextmanager
    def untracked(self) -> Iterator[None]:
        """Ignore the calling thread's phases and waits: it is not the training thread."""
        before = _is_untracked()
        _thread.is_untracked = True
        try:
            yield
        finally:
            _thread.is_untracked = before

    @contextmanager
    def awaiting(self, *, peers: bool) -> Iterator[None]:
        """Record that the body waits for a thread of ours that itself waits for other ranks.

        Args:
            peers: False records nothing: the thread does not depend on other ranks.
        """
        if not peers:
            yield
            return
        self.wait(True)
        try:
            yield
        finally:
            self.wait(False)

    def wait(self, waiting: bool) -> None:
        """Record that the thread begins (True) or ends (False) a wait for other ranks."""
        if _is_untracked():
            return
        self.waiting = waiting
        self.moves += 1

    def move(self) -> None:
        """Record progress within a phase, also from an untracked thread.

        For example, an update that waits for a checkpoint is not hung.
        """
        # `+=` is not atomic, so two threads may together add only 1. That is enough: the watch only
        # tests whether the count has changed.
        self.moves += 1

    def begin_step(self, step: int) -> None:
        """Record that this optimizer step begins."""
        self.step = step
        self.moves += 1

    def _move(self, phase: str, bucket: int | None) -> None:
        self.phase, self.bucket = phase, bucket
        self.moves += 1

    def _add_long_running(self, change: int) -> None:
        # Several threads may save checkpoints at once, and `+=` is not atomic. A count, because a
        # flag that each thread restores to its former value may stay set.
        with _counts:
            self.long_running += change


def _is_untracked() -> bool:
    return getattr(_thread, "is_untracked", False)


PROGRESS = ProgressRecord()
"""The progress of this process. One record is enough, because one thread trains one model."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a machine.

    machine: boot id of the kernel and pid namespace; `pid` is valid only within them.
    born: start time, in clock ticks since boot on Linux. It tells apart processes that reuse a pid.
    """

    host: str
    machine: str
    pid: int
    born: float

    @classmethod
    def own(cls) -> Process:
        """Return this process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return a process of this machine."""
        return cls(socket.gethostname(), _machine(), pid, _state_and_start(pid)[1])

    def is_gone(self, seen_from: Process) -> bool:
        """Return whether the process has certainly ended; False on another machine."""
        if self.machine != seen_from.machine:
            return False
        try:
            state, born = _state_and_start(self.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return True
        except (OSError, psutil.Error):  # such as a process of another user: its heartbeats decide
            return False
        # A zombie has ended, but its parent has not read its exit code yet.
        return born != self.born or state in ("Z", psutil.STATUS_ZOMBIE)

    def resume(self, seen_from: Process) -> None:
        """Send SIGCONT if the process is on this machine; changes nothing unless it is stopped.

        A process that a debugger has stopped stays stopped.
        """
        if self.machine != seen_from.machine:
            return
        # Only if the start time can be read, so that no other process with its id is continued.
        with suppress(OSError, psutil.Error):
            if _state_and_start(self.pid)[1] == self.born:
                os.kill(self.pid, signal.SIGCONT)


def _state_and_start(pid: int) -> tuple[str, float]:
    """Return the state and the start time of a process of this machine."""
    # psutil adds the time of the boot, which changes when the wall clock is set.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # it has ended, or this is not Linux
        process = psutil.Process(pid)
        return process.status(), process.create_time()
    # The name of the program, in parentheses, may contain any character. See proc_pid_stat(5).
    state, *rest = fields.rpartition(")")[2].split()
    return state, int(rest[18])


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """The record that a rank publishes with each heartbeat.

    rank: in the default group.
    beat: number of this heartbeat.
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
    """Return an id of this kernel and pid namespace; it differs between containers on one host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
