"""Where this process is: what its peers read while they wait for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
