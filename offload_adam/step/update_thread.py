"""The one thread on which an overlapped step's updates run, one after the other."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

_NAME = "offload_adam update"

CLOSE_TIMEOUT_S = 30.0
"""Seconds to wait for the jobs of an optimizer that is dropped, or alive at exit."""


class Ticket:
    """One job of the update thread, to be waited for."""

    __slots__ = ("_error", "_over", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self._over = threading.Event()
        self._error: BaseException | None = None

    def is_over(self) -> bool:
        """Tell, without waiting, whether the job has ended, well or not."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the job to end; tell whether it has.

        Raises:
            BaseException: what the job raised, with the traceback from its own thread.
        """
        if not self._over.wait(timeout_s):
            return False
        if self._error is not None:
            raise self._error
        return True

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._over.set()


class _Jobs:
    """What the thread and its owner share, so that the thread does not keep the owner alive.

    The queue is bounded by who fills it: a step's updates are over before the next one's begin, a
    forward waits where the copies of more than two backwards are not finished, and in a world of
    one a backward does where the host has fallen behind. With other ranks a hook could not wait.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], None], Ticket]] = deque()
        self.changed = threading.Condition()
        self.is_closed = False
        self.failure: BaseException | None = None

    def next(self) -> tuple[Callable[[], None], Ticket] | None:
        with self.changed:
            while not self.waiting:
                if self.is_closed:
                    return None
                self.changed.wait()
            return self.waiting.popleft()


class UpdateThread:
    """Runs jobs one after the other, beside the thread that gives them.

    After a job has raised, later jobs are skipped and raise the same error: state may be half
    updated.

    Owns: a daemon thread, started with the first job.
    Lifecycle: ends with `close`, or when this object is collected.
    """

    def __init__(self) -> None:
        self._jobs = _Jobs()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, _close, self._jobs)

    def submit(self, what: str, job: Callable[[], None]) -> Ticket:
        """Give the thread a job; never blocks.

        Args:
            what: added to an error that the job raises, such as "the update of bucket 3".
        """
        ticket = Ticket(what)
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name=_NAME, daemon=True
            )
            self._thread.start()
        with self._jobs.changed:
            self._jobs.waiting.append((job, ticket))
            self._jobs.changed.notify()
        return ticket

    def close(self) -> bool:
        """End the thread when it has done what it was given. Idempotent.

        Returns:
            Whether no job is running. If False, one may still use the memory that it was given.
        """
        self._end()
        if self._thread is None or self._thread is threading.current_thread():
            # If the collector has dropped the owner on this very thread, no kernel runs now.
            return True
        self._thread.join(CLOSE_TIMEOUT_S)
        return not self._thread.is_alive()


def _close(jobs: _Jobs) -> None:
    with jobs.changed:
        jobs.is_closed = True
        jobs.changed.notify()


def _run(jobs: _Jobs) -> None:
    while True:
        found = jobs.next()
        if found is None:
            return
        job, ticket = found
        if jobs.failure is None:
            try:
                job()
            except BaseException as error:
                error.add_note(f"raised on the update thread, in {ticket.what}")
                jobs.failure = error
        ticket._end(jobs.failure)
        del found, job, ticket
