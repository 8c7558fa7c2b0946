"""Updates of several buckets without a pause of the kernels, on two threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from offload_adam.coordinator.waiting import SLICE_S
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Operation, Task
from offload_adam.spans import Stopwatch
from offload_adam.step.messages import UpdateInputs
from offload_adam.step.update_tasks import PreparedUpdate, UpdateTasks

FIRST_LAUNCH_S = 0.01
"""Most seconds that `step()` lets the update thread take to begin the first update."""


class Job(Protocol):
    """A submitted job; see `update_thread.Ticket`."""

    what: str

    def is_over(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool: ...

    def wait_until_begun(self, timeout_s: float) -> None: ...


class Worker(Protocol):
    """Runs jobs in order on another thread; see `update_thread.UpdateThread`."""

    def submit(self, what: str, job: Callable[[], object]) -> Job: ...

    def is_current(self) -> bool: ...

    def close(self) -> bool: ...


class BucketInputs(NamedTuple):
    """What the update of one bucket reads.

    active: (num parameters,) bool, by position in the bucket. If none is, the bucket is skipped.
    """

    number: int
    gradients: BucketGradients
    active: npt.NDArray[np.bool_]

    @property
    def is_skipped(self) -> bool:
        """Whether no parameter is updated."""
        return not self.active.any()


@dataclass(eq=False)
class _Running:
    """One update on its way through both threads.

    launches: the jobs of the update thread, one for each part.
    """

    given: BucketInputs
    prepared: PreparedUpdate | None = None
    launches: list[Job] = field(default_factory=list)


class UpdatePipeline:
    """Runs the updates of a step, in forward order, so that one kernel follows another at once.

    Between two kernels there is no time for Python, whose code and data the kernels have displaced
    from the caches. So a second thread prepares the launches of the next bucket, and issues the
    H2D copies of the last one, while the update thread runs a kernel:

        update thread   | kernel 3              | kernel 2              | kernel 1 ...
        copy thread       prepare 2 |             copy 3, prepare 1 |     copy 2, prepare 0 |

    Before a bucket is launched, the H2D copy of the bucket that had its staging slot before has
    been issued. The launch then waits for this copy.

    Args:
        update, copy: the two threads.
        stopwatch: times the work of both.
    """

    def __init__(
        self, update: Worker, copy: Worker, tasks: UpdateTasks, stopwatch: Stopwatch
    ) -> None:
        self._update = update
        self._copy = copy
        self._tasks = tasks
        self._stopwatch = stopwatch
        self._last_copy: Job | None = None  # the last job of the copy thread
        self._last_launch: Job | None = None  # the last one that it has given the update thread

    def start(self, buckets: Sequence[BucketInputs], inputs: UpdateInputs) -> dict[int, Job]:
        """Start the updates of these buckets, in this order, without waiting for any.

        Returns:
            For each bucket that is updated, the job that has ended when its shard is updated and
            its H2D copy is issued.
        """
        jobs: dict[int, Job] = {}
        before: _Running | None = None
        is_first = True  # the copy thread has no job yet

        def finish_before() -> None:
            nonlocal before
            if before is not None:
                number, finish = before.given.number, partial(self._finish, before)
                jobs[number] = self._submit_copy(f"the update of bucket {number}", finish)
            before = None

        for given in buckets:
            number = given.number
            if given.is_skipped:
                finish_before()
                if self._tasks.states[number].plan.stages_parameters:
                    # The next user of the slot waits for an event of this bucket. It must come
                    # after the H2D copies of earlier buckets.
                    is_first = False
                    skip = partial(self._tasks.skip_copy_h2d, number)
                    self._submit_copy(f"the skipped update of bucket {number}", skip)
                continue
            if before is not None and self._needs_slot_of(number, before.given.number):
                finish_before()
            running = _Running(given)
            if is_first:
                is_first = False
                # Here, to save the time until another thread wakes. Then Python has to be left to
                # the update thread, or it would wait for it for up to 5 ms.
                self._prepare(running, inputs)
                running.launches[0].wait_until_begun(FIRST_LAUNCH_S)
            else:
                prepare = partial(self._prepare, running, inputs)
                self._submit_copy(f"the preparation of bucket {number}", prepare)
            finish_before()
            before = running
        finish_before()
        return jobs

    def finish(self) -> None:
        """Wait until both threads have finished their jobs, also after an interrupted `start`.

        Raises:
            Exception: the error of an update.
        """
        try:
            if self._last_copy is not None:
                _await(self._last_copy)
        finally:
            if self._last_launch is not None:
                _await(self._last_launch)

    def _submit_copy(self, what: str, job: Callable[[], object]) -> Job:
        def run() -> None:
            try:
                job()
            except BaseException:
                if self._last_launch is not None:  # when an error is raised, no kernel runs
                    _await(self._last_launch)
                raise

        self._last_copy = self._copy.submit(what, run)
        return self._last_copy

    def _needs_slot_of(self, number: int, other: int) -> bool:
        """Return whether a bucket's update waits for another one's H2D copy."""
        waits = self._tasks.stream_waits.schedule.waits[Task(Operation.UPDATE, number)]
        return Task(Operation.COPY_H2D, other) in waits

    def _prepare(self, running: _Running, inputs: UpdateInputs) -> None:
        given = running.given
        update = running.prepared = self._tasks.prepare(*given, inputs)
        for part in update.launches.parts:
            launch = partial(self._tasks.launch, update, part, self._stopwatch)
            what = f"the update of bucket {given.number}"
            self._last_launch = self._update.submit(what, launch)
            running.launches.append(self._last_launch)

    def _finish(self, running: _Running) -> None:
        """Wait for each part of an update, and finish it."""
        update = running.prepared
        assert update is not None
        for part, job in zip(update.launches.parts, running.launches, strict=True):
            _await(job)
            self._tasks.finish(update, part, self._stopwatch)

    def is_current(self) -> bool:
        """Return whether the caller runs on one of the threads."""
        return self._update.is_current() or self._copy.is_current()

    def close(self) -> bool:
        """Let both threads finish their jobs and end; return whether they have. Idempotent."""
        # First the one whose jobs wait for the other's.
        return self._copy.close() and self._update.close()


def _await(job: Job) -> None:
    """Wait for a job, which waits for no other rank.

    Raises:
        Exception: the job's error.
    """
    while not job.wait(SLICE_S):
        pass
