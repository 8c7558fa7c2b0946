"""What runs a schedule: one task after the other, or updates beside the next forward."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.coordinator.waiting import SLICE_S
from offload_adam.errors import UnreadyParameterError
from offload_adam.gradients.gradient_copy import GradientCopy
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Operation, Schedule, Task
from offload_adam.params.bucket import BucketState
from offload_adam.spans import Spans, span
from offload_adam.step.messages import UpdateMasks
from offload_adam.step.tasks import Tasks

logger = logging.getLogger(__name__)

_exiting = threading.Event()


class Executor(ABC):
    """Runs the tasks of a schedule.

    Before the agreement backward drives it, bucket by bucket (`start_copy`, `sum_in_place`). After
    the agreement it gets the rest at once (`apply`). Both executors give the same bits.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks

    def extend(self, states: Sequence[BucketState], schedule: Schedule) -> None:
        """Take further buckets in, and a schedule for all of them."""
        self.finish_copies(wait=True)
        self.settle()
        self.tasks.extend(states, schedule, self._wait_for_update)

    @abstractmethod
    def start_copy(self, gradient_copy: GradientCopy) -> None:
        """Start to copy a bucket's gradients to their shard. Never waits."""

    @abstractmethod
    def sum_in_place(self, number: int, gradients: BucketGradients) -> None:
        """Start to sum squares of gradients that stay where autograd left them. Never waits."""

    @abstractmethod
    def finish_copies(self, *, wait: bool) -> None:
        """Finish, in order, the copies that are over; with `wait` all copies."""

    def sum_of_squares(self, gradients: Sequence[BucketGradients]) -> float:
        """Return this rank's sum of squares in float64, added up bucket by bucket as scheduled.

        The order is fixed, whenever each bucket's sum was taken: so the result is deterministic.
        """
        total = 0.0
        for operation, number in self.tasks.schedule.before_agreement:
            if operation is Operation.SUM_SQUARES:
                total += self.tasks.sum_of_squares(number, gradients[number])
        return total

    @abstractmethod
    def non_finite_indices(self, gradients: Sequence[BucketGradients]) -> npt.NDArray[np.int64]:
        """Return the indices of parameters whose gradient, in this rank's shard, is not finite."""

    @abstractmethod
    def apply(self, gradients: Sequence[BucketGradients], masks: UpdateMasks, spans: Spans) -> None:
        """Update, copy up and gather every bucket that has an active parameter."""

    @property
    @abstractmethod
    def is_pending(self) -> bool:
        """Whether some parameters may not be read yet."""

    @abstractmethod
    def wait_for_buckets(self, buckets: Collection[int]) -> None:
        """Return when these buckets' parameters may be read. By the model's own thread.

        On a device the stream waits, not the host, for what has been issued.
        """

    @abstractmethod
    def settle(self) -> None:
        """Return when all parameters may be read, and no update is under way.

        Raises:
            Exception: what an update has raised.
        """

    @abstractmethod
    def run_with_updates(self, what: str, job: Callable[[], None]) -> None:
        """Do something on the thread that launches the updates, and return when it is done."""

    @abstractmethod
    def close(self) -> None:
        """End what runs beside the caller. Idempotent."""

    @abstractmethod
    def _wait_for_update(self, task: Task) -> None:
        """Block until an update that runs beside the caller is over."""


class SequentialExecutor(Executor):
    """Runs the two halves of a schedule on the calling thread."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__(tasks)
        self._gradient_copies: deque[GradientCopy] = deque()

    def start_copy(self, gradient_copy: GradientCopy) -> None:
        """Start it, and finish the copies that are over."""
        self.tasks.start_copy(gradient_copy)
        self._gradient_copies.append(gradient_copy)
        self.finish_copies(wait=False)

    def sum_in_place(self, number: int, gradients: BucketGradients) -> None:
        """Leave the sum for the step."""

    def finish_copies(self, *, wait: bool) -> None:
        """Finish copies in the order in which they were started."""
        while self._gradient_copies and (wait or self.tasks.has_arrived(self._gradient_copies[0])):
            self.tasks.finish_copy(self._gradient_copies.popleft())

    def non_finite_indices(self, gradients: Sequence[BucketGradients]) -> npt.NDArray[np.int64]:
        """Look now, one bucket after the other."""
        return find_non_finite(self.tasks, range(len(gradients)), gradients)

    def apply(self, gradients: Sequence[BucketGradients], masks: UpdateMasks, spans: Spans) -> None:
        """Run the second half, and return when it is done."""
        self.tasks.release()
        for operation, number in self.tasks.schedule.after_agreement:
            state = self.tasks.states[number]
            active = masks.active[state.indices]
            if is_idle(state, active):
                if operation is Operation.UPDATE:
                    masks.count(state, active)
                    self.tasks.skip_copy_up(number)
            elif operation is Operation.UPDATE:
                self.tasks.update(number, gradients[number], active, masks, spans)
            elif operation is Operation.GATHER:
                self.tasks.gather(number, spans)
        for number in self.tasks.schedule.forward_order:
            self.tasks.use(number, spans)

    @property
    def is_pending(self) -> bool:
        """Nothing ever is when `apply` has returned."""
        return False

    def wait_for_buckets(self, buckets: Collection[int]) -> None:
        """Return: they may be read."""

    def settle(self) -> None:
        """Return: all may be read."""

    def run_with_updates(self, what: str, job: Callable[[], None]) -> None:
        """Do it here."""
        job()

    def close(self) -> None:
        """Return: nothing runs beside the caller."""

    def _wait_for_update(self, task: Task) -> None:
        """Return: the calling thread has made it."""


def is_idle(state: BucketState, active: npt.NDArray[np.bool_]) -> bool:
    """Tell whether a step leaves a bucket as it is: no active parameter, or no element."""
    return not active.any() or state.layout.numel == 0


def find_non_finite(
    tasks: Tasks, buckets: Iterable[int], gradients: Sequence[BucketGradients]
) -> npt.NDArray[np.int64]:
    """Return the indices of these buckets' parameters whose gradient here is not finite."""
    found = [tasks.non_finite(number, gradients[number]) for number in buckets]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


class Job(Protocol):
    """One job under way; see `update_thread.Ticket`."""

    what: str

    def is_over(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool: ...


class Worker(Protocol):
    """What runs jobs beside the caller, in order; see `update_thread.UpdateThread`."""

    def submit(self, what: str, job: Callable[[], None]) -> Job: ...

    def close(self) -> None: ...


class OverlappedExecutor(Executor):
    """Gives gradient copies, sums and updates to a worker, and waits only for what is needed.

    The worker alone launches kernels and issues copies. The calling thread issues every collective.
    After `apply` the updates run in forward order. `wait_for_buckets` is called before a part of
    the model reads its parameters, and waits for the buckets of that part alone. It issues all
    gathers before them that have not been issued, so that ranks that skip layers keep one order,
    and the next gather ahead where its bucket is ready.

    Owns: the worker, and what is still to be waited for.
    """

    def __init__(
        self,
        tasks: Tasks,
        worker: Worker,
        ranks: RankGroup,
        spans: Spans,
        arrived: Callable[[int], None],
    ) -> None:
        """Begin with nothing under way.

        Args:
            spans: told of work that is done on the worker, and of waits in `wait_for_buckets`.
            arrived: told of each bucket when its parameters may be read again.
        """
        super().__init__(tasks)
        self._worker = worker
        self._ranks = ranks
        self._spans = spans
        self._arrived = arrived
        self._copy_jobs: deque[Job] = deque()
        self._device_copies: deque[GradientCopy] = deque()
        self._updates: dict[int, Job] = {}
        self._to_gather: deque[int] = deque()
        self._to_use: dict[int, int] = {}
        self._pid = os.getpid()
        _notice_exit()

    @property
    def is_pending(self) -> bool:
        """Whether some parameters may not be read yet."""
        return bool(self._to_use)

    def start_copy(self, gradient_copy: GradientCopy) -> None:
        """Let the worker finish the copy, and take its sum of squares."""
        number = gradient_copy.state.layout.index
        self.tasks.start_copy(gradient_copy)
        if not gradient_copy.state.plan.location.is_host:
            self._device_copies.append(
                gradient_copy
            )  # for the model's own lane, which must not wait here
            self._finish_device_copies(wait=False)
            return

        def finish() -> None:
            self.tasks.finish_copy(gradient_copy)
            self._sum(number, gradient_copy.gradients)

        self._copy_jobs.append(self._give(f"the gradient copy of bucket {number}", finish))

    def sum_in_place(self, number: int, gradients: BucketGradients) -> None:
        """Let the worker take the sum of squares while backward goes on."""
        if self.tasks.states[number].plan.location.is_host:
            job = self._give(f"the norm of bucket {number}", lambda: self._sum(number, gradients))
            self._copy_jobs.append(job)

    def _sum(self, number: int, gradients: BucketGradients) -> None:
        with span("norm", number):
            self.tasks.sum_of_squares(number, gradients)

    def finish_copies(self, *, wait: bool) -> None:
        """Wait for the worker, with `wait`; it finishes its copies without the caller."""
        while wait and self._copy_jobs:
            self._await(self._copy_jobs.popleft(), "reduce")
        self._finish_device_copies(wait=wait)

    def _finish_device_copies(self, *, wait: bool) -> None:
        """Finish, in order, the copies that are over of buckets with state on a device."""
        while self._device_copies and (wait or self._device_copies[0].is_ready()):
            self.tasks.finish_copy(self._device_copies.popleft())

    def sum_of_squares(self, gradients: Sequence[BucketGradients]) -> float:
        """Add up what the worker has taken, or takes now."""
        for number in self._numbers(hosted=False):
            self.tasks.sum_of_squares(number, gradients[number])
        found: list[float] = []
        self.run_with_updates(
            "the norm", lambda: found.append(Executor.sum_of_squares(self, gradients))
        )
        return found[0]

    def non_finite_indices(self, gradients: Sequence[BucketGradients]) -> npt.NDArray[np.int64]:
        """Let the worker look, but on a device."""
        found = [find_non_finite(self.tasks, self._numbers(hosted=False), gradients)]
        hosted = self._numbers(hosted=True)
        self.run_with_updates(
            "the search for what is not finite",
            lambda: found.append(find_non_finite(self.tasks, hosted, gradients)),
        )
        return np.concatenate(found)

    def _numbers(self, *, hosted: bool) -> list[int]:
        states = self.tasks.states
        return [s.layout.index for s in states if s.plan.location.is_host is hosted]

    def apply(self, gradients: Sequence[BucketGradients], masks: UpdateMasks, spans: Spans) -> None:
        """Give the worker every update, in forward order, and return."""
        self.tasks.release()
        for position, number in enumerate(self.tasks.schedule.forward_order):
            state = self.tasks.states[number]
            active = masks.active[state.indices]
            if is_idle(state, active):
                masks.count(state, active)
                if state.plan.stages_parameters:
                    self._give(
                        f"the turn of bucket {number}", partial(self.tasks.skip_copy_up, number)
                    )
                continue
            if state.plan.location.is_host:
                self._updates[number] = self._give_update(number, gradients[number], active, masks)
            else:
                self.tasks.update(number, gradients[number], active, masks, spans)
            if state.plan.gathers:
                self._to_gather.append(number)
            self._to_use[number] = position

    def _give_update(
        self,
        number: int,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
    ) -> Job:
        return self._give(
            f"the update of bucket {number}",
            lambda: self.tasks.update(number, gradients, active, masks, self._spans),
        )

    def wait_for_buckets(self, buckets: Collection[int]) -> None:
        """Wait for these buckets, and issue the gathers up to them, and one ahead."""
        self._bound_backlog()
        if not self._to_use:
            return
        needed = [number for number in buckets if number in self._to_use]
        if not needed:
            return
        self._refuse_forked()
        with self._spans.span("update wait"):
            last = max(self._to_use[number] for number in needed)
            while self._to_gather and self._to_use[self._to_gather[0]] <= last:
                self._gather_next()
            for number in sorted(needed, key=self._to_use.__getitem__):
                self.tasks.use(number, self._spans)
                del self._to_use[number]
                self._arrived(number)
        self._gather_ahead()

    def _refuse_forked(self) -> None:
        if os.getpid() != self._pid:
            raise UnreadyParameterError(
                "this process was forked while parameters were being updated, by a thread that it "
                "has not: call synchronize() on the optimizer before you fork, or spawn"
            )

    def _bound_backlog(self) -> None:
        """Let no more than two backwards' gradients be on their way.

        Backward never waits, so a forward does where several of them add up on the host.
        """
        while len(self._copy_jobs) > 2 * len(self.tasks.states):
            self._await(self._copy_jobs.popleft(), "reduce")

    def settle(self) -> None:
        """Wait for everything."""
        self.wait_for_buckets(list(self._to_use))
        assert not self._to_gather, "what is gathered is used"
        self._updates.clear()

    def close(self) -> None:
        """End the worker when it has done what it was given."""
        self._worker.close()
        if self._to_gather and not _exiting.is_set():
            logger.error(
                "the optimizer was dropped before all parameters were gathered, so they differ "
                "between ranks now: call synchronize() or close() before"
            )

    def _gather_next(self) -> None:
        # Forgotten only when it is issued: after an interrupt it is still to come on this rank too.
        with torch.no_grad():
            self.tasks.gather(self._to_gather[0], self._spans)
        self._to_gather.popleft()

    def _gather_ahead(self) -> None:
        """Issue the next gather if nothing need be waited for."""
        if self._to_gather:
            job = self._updates.get(self._to_gather[0])
            if job is None or job.is_over():
                self._gather_next()

    def _wait_for_update(self, task: Task) -> None:
        job = self._updates.get(task.bucket)
        if job is not None:
            self._await(job, "update", task.bucket)

    def _give(self, what: str, job: Callable[[], None]) -> Job:
        def run() -> None:
            # Gradients are on by default in every thread.
            with torch.no_grad(), PROGRESS.untracked():
                job()

        return self._worker.submit(what, run)

    def run_with_updates(self, what: str, job: Callable[[], None]) -> None:
        """Let the worker do it, and wait for it."""
        self._await(self._give(what, job), "norm")

    def _await(self, job: Job, phase: str, bucket: int | None = None) -> None:
        """Wait for a job, and raise an error if a peer fails meanwhile.

        Raises:
            Exception: what the job raised.
            PeerFailedError: naming the ranks that have failed.
        """
        if job.wait(0.0):
            return
        with PROGRESS.at(phase, bucket), PROGRESS.awaiting(peers=phase == "reduce"):
            self._ranks.wait_until(lambda: job.wait(SLICE_S))


@functools.cache
def _notice_exit() -> None:
    """Know of the interpreter's exit before what was made earlier is finalized by it."""
    atexit.register(_exiting.set)
