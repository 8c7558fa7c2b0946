"""The threads of an overlapped step: one launches the kernels, one prepares and copies."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Self

import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.kernels.threads import claim_thread

_RAISED = "raised on the"

CLOSE_TIMEOUT_S = 30.0
"""Seconds that `close` waits for unfinished jobs, when an optimizer is dropped or at exit."""


class Ticket:
    """A handle to wait for one job of the update thread."""

    __slots__ = ("_begun", "_error", "_is_over", "_over", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        # Locks, held until then: `threading.Event`, in Python, would take longer between kernels.
        self._begun, self._over = threading.Lock(), threading.Lock()
        self._begun.acquire()
        self._over.acquire()
        self._is_over = False
        self._error: BaseException | None = None

    def is_over(self) -> bool:
        """Return, without waiting, whether the job has ended, with or without an error."""
        return self._is_over

    def wait_until_begun(self, timeout_s: float) -> None:
        """Let the thread begin the job: Python runs one thread at a time. For one caller."""
        self._begun.acquire(timeout=timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the job to end; return whether it has.

        Raises:
            BaseException: the job's error, with its traceback from the update thread.
        """
        if not self._is_over:
            if not self._over.acquire(timeout=timeout_s):
                return False
            self._over.release()  # for the next caller
        if self._error is not None:
            raise self._error
        return True

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._is_over = True
        self._over.release()


class _Jobs:
    """The queue that the thread shares with its owner.

    The thread holds this object, not the owner: a thread that held the owner would keep it alive.
    """

    def __init__(self) -> None:
        # None ends the thread. No limit is needed here: the updates of a step end before those of
        # the next begin, and `Executor.start_copy` and `_bound_backlog` limit the unfinished
        # gradient copies. A SimpleQueue may be closed by the collector in the middle of a `put`.
        self.waiting = SimpleQueue[tuple[Callable[[], object], Ticket] | None]()
        self.failure: BaseException | None = None


class UpdateThread:
    """Runs submitted jobs on a thread of its own, in order and without autograd.

    After a job has raised an error, later jobs are skipped and raise the same error: the state may
    be half updated.

    Owns: a daemon thread, started by the first job.
    Lifecycle: ends with `close`, or when this object is garbage-collected.
    """

    def __init__(self, name: str = "update") -> None:
        """Construct without starting the thread.

        Args:
            name: for debuggers and messages.
        """
        self._name = name
        self._jobs = _Jobs()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, _close, self._jobs)
        self._end.atexit = False  # at exit, the other threads may still give this one jobs

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Return an update thread, and a copy thread whose jobs wait for those of the former."""
        return cls("update"), cls("copy")

    def submit(self, what: str, job: Callable[[], object]) -> Ticket:
        """Append a job to the queue. Never blocks.

        Args:
            what: names the job in a note on its error, such as "the update of bucket 3".
        """
        ticket = Ticket(what)
        if self._thread is None:
            # Daemon: a job that hangs must not keep the interpreter from exiting.
            name = f"offload_adam {self._name}"
            self._thread = threading.Thread(
                target=_run, args=(self._jobs, self._name), name=name, daemon=True
            )
            self._thread.start()
        self._jobs.waiting.put((job, ticket))
        return ticket

    def is_current(self) -> bool:
        """Return whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def close(self) -> bool:
        """Let the thread finish its jobs and end, for at most `CLOSE_TIMEOUT_S`. Idempotent.

        Not for a job of the thread itself, or of one that it waits for.

        Returns:
            Whether the thread has ended. If not, its job may still use the optimizer's memory.
        """
        self._end()
        if self._thread is None:
            return True
        self._thread.join(CLOSE_TIMEOUT_S)
        return not self._thread.is_alive()


def _close(jobs: _Jobs) -> None:
    jobs.waiting.put(None)


def _run(jobs: _Jobs, name: str) -> None:
    claim_thread()
    # Autograd is on by default in every thread. PROGRESS shows the training thread alone.
    with torch.no_grad(), PROGRESS.untracked():
        while _run_next(jobs, name):
            pass


def _run_next(jobs: _Jobs, name: str) -> bool:
    """Run one job; return False if there will be no more."""
    found = jobs.waiting.get()
    if found is None:
        return False
    job, ticket = found  # in a function of their own: they keep the optimizer alive
    if jobs.failure is None:
        ticket._begun.release()
        try:
            job()
        except BaseException as error:
            # A job of the copy thread raises the error of the kernel that it waits for.
            if not any(note.startswith(_RAISED) for note in getattr(error, "__notes__", ())):
                error.add_note(f"{_RAISED} {name} thread, in {ticket.what}")
            jobs.failure = error
    ticket._end(jobs.failure)
    return True
