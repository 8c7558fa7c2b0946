"""What a rank publishes about itself, and which processes of this machine are gone."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from offload_adam.coordinator.progress import ProgressRecord


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
    The rest is its `ProgressRecord`.
    """

    rank: int
    process: Process
    beat: int
    step: int
    phase: str
    bucket: int | None
    waiting: bool
    long_running: bool
    still_s: float
    left: str | None = None

    @classmethod
    def of(
        cls,
        rank: int,
        process: Process,
        beat: int,
        place: ProgressRecord,
        still_s: float,
        left: str | None,
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
            place.long_running,
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
