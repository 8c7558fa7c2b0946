"""The update thread: runs the updates of an overlapped step, one after another."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

_NAME = "offload_adam update"

CLOSE_TIMEOUT_S = 30.0
"""Seconds that `close` waits for unfinished jobs, when an optimizer is dropped or at exit."""


class Ticket:
    """A handle to wait for one job of the update thread."""

    __slots__ = ("_error", "_over", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self._over = threading.Event()
        self._error: BaseException | None = None

    def is_over(self) -> bool:
        """Return, without waiting, whether the job has ended, with or without an error."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the job to end; return whether it has.

        Raises:
            BaseException: the job's error, with its traceback from the update thread.
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
    """The queue that the thread shares with its owner.

    The thread holds this object, not the owner: a thread that held the owner would keep it alive.
    """

    def __init__(self) -> None:
        # No limit is needed here. The updates of a step end before those of the next begin, and
        # `Executor.start_copy` and `_bound_backlog` limit the unfinished gradient copies.
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
    """Runs submitted jobs on a thread of its own, in order.

    After a job has raised an error, later jobs are skipped and raise the same error: the state may
    be half updated.

    Owns: a daemon thread, started by the first job.
    Lifecycle: ends with `close`, or when this object is garbage-collected.
    """

    def __init__(self) -> None:
        self._jobs = _Jobs()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, _close, self._jobs)

    def submit(self, what: str, job: Callable[[], None]) -> Ticket:
        """Append a job to the queue. Never blocks.

        Args:
            what: names the job in a note on its error, such as "the update of bucket 3".
        """
        ticket = Ticket(what)
        if self._thread is None:
            # Daemon: a job that hangs must not keep the interpreter from exiting.
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name=_NAME, daemon=True
            )
            self._thread.start()
        with self._jobs.changed:
            self._jobs.waiting.append((job, ticket))
            self._jobs.changed.notify()
        return ticket

    def close(self) -> bool:
        """Let the thread finish its jobs and end, for at most `CLOSE_TIMEOUT_S`. Idempotent.

        Returns:
            Whether the thread has ended. If not, its job may still use the optimizer's memory.
        """
        self._end()
        if self._thread is None or self._thread is threading.current_thread():
            # The garbage collector may finalize the owner on the update thread itself, which cannot
            # join itself. No kernel is running then.
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
        # These locals refer to the optimizer, and would keep it alive until the next job.
        del found, job, ticket
