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
class Place:
    """The training thread's place in the run, written by that thread and read by any other.

    What a thread does beside it moves no place: see `beside`.

    step: the optimizer step that was last begun, from 1 on.
    phase: what is being done; bucket: with which bucket, None for none.
    waiting: in a collective of ours, for the other ranks.
    patient: in work that may take long without a sign: compilation, a slow disk.
    moves: how often any of this has changed. A process that stands still shows by it.
    """

    step: int = 0
    phase: str = "start"
    bucket: int | None = None
    waiting: bool = False
    patient: bool = False
    moves: int = 0

    @contextmanager
    def at(self, phase: str, bucket: int | None = None, *, patient: bool = False) -> Iterator[None]:
        """Be in `phase` inside the context; where it raises, the place of the error stays."""
        outer = self.phase, self.bucket, self.patient
        self._move(phase, bucket, self.patient or patient)
        try:
            yield
        except BaseException:
            if not _is_beside():
                self.patient = outer[2]
            raise
        self._move(*outer)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let nothing that the calling thread does inside be taken for the training thread's."""
        _thread.is_beside = True
        try:
            yield
        finally:
            _thread.is_beside = False

    @contextmanager
    def awaiting(self, *, peers: bool) -> Iterator[None]:
        """Wait inside for a thread beside this one, which itself waits for the other ranks."""
        if not peers:
            yield
            return
        self.wait(True)
        try:
            yield
        finally:
            self.wait(False)

    def wait(self, waiting: bool) -> None:
        """Begin, or end, to wait for the other ranks."""
        if _is_beside():
            return
        self.waiting = waiting
        self.moves += 1

    def move(self) -> None:
        """Show that long work gets on."""
        self.moves += 1

    def begin_step(self, step: int) -> None:
        """Begin the optimizer step of this number."""
        self.step = step
        self.moves += 1

    def _move(self, phase: str, bucket: int | None, patient: bool) -> None:
        if _is_beside():
            return
        self.phase, self.bucket, self.patient = phase, bucket, patient
        self.moves += 1


def _is_beside() -> bool:
    return getattr(_thread, "is_beside", False)


HERE = Place()
"""This process's place: one process trains one model, by one thread."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that can be found again: `born` tells it from a later one with the same pid.

    machine: where the pid means something: the boot of a kernel, and the pid namespace.
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
        """Tell whether the process has certainly ended; False from another machine."""
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
    """A rank as it last described itself.

    beat: grows with every record. still_s: how long the rank's training thread has not moved.
    left: None, or how the rank ended: "" for a plain end, else its last error.
    The rest is its `Place`.
    """

    rank: int
    process: Process
    beat: int
    step: int
    phase: str
    bucket: int | None
    waiting: bool
    patient: bool
    still_s: float
    left: str | None = None

    @classmethod
    def of(
        cls, rank: int, process: Process, beat: int, place: Place, still_s: float, left: str | None
    ) -> PeerRecord:
        """Describe this process."""
        return cls(
            rank,
            process,
            beat,
            place.step,
            place.phase,
            place.bucket,
            place.waiting,
            place.patient,
            still_s,
            left,
        )

    def to_json(self) -> str:
        """Return the record as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> PeerRecord:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "process": Process(**values["process"])})

    @property
    def where(self) -> str:
        """Say where the rank is, for a message."""
        return describe_place(self.step, self.phase, self.bucket)

    @property
    def address(self) -> str:
        """Say which process it is, for a message."""
        return f"process {self.process.pid} on {self.process.host}"


def describe_place(step: int, phase: str, bucket: int | None) -> str:
    """Say where a rank is: phase, bucket, step."""
    of_bucket = "" if bucket is None else f" of bucket {bucket}"
    return f"{phase}{of_bucket}, step {step}"


def _machine() -> str:
    """Return what tells this kernel and pid namespace from others, also between containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
