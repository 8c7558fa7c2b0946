"""What runs a step's tasks: all on the calling thread, or updates beside the next forward."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.coordinator.waiting import SLICE_S
from offload_adam.errors import UnreadyParameterError
from offload_adam.gradients.gradient_transfer import GradientCopy, GradientTransfer
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.budget import (
    NUM_FOLD_BUFFERS,
    NUM_FOLDS_IN_FLIGHT,
    NUM_SLOTS_IN_FLIGHT,
)
from offload_adam.layout.schedule import Operation, Task
from offload_adam.params.bucket import BucketState
from offload_adam.spans import Stopwatch, span
from offload_adam.step.messages import UpdateInputs
from offload_adam.step.update_tasks import UpdateTasks

logger = logging.getLogger(__name__)

_exiting = threading.Event()


class Job(Protocol):
    """One job under way; see `update_thread.Ticket`."""

    what: str

    def is_over(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool: ...


class Worker(Protocol):
    """What runs jobs beside the caller, in order; see `update_thread.UpdateThread`."""

    def submit(self, what: str, job: Callable[[], None]) -> Job: ...

    def close(self) -> bool: ...


class Executor:
    """Runs the tasks of a step, in the order of the schedule.

    Backward drives it bucket by bucket (`start_copy`, `sum_local`). After the agreement it gets
    the rest at once (`apply`).

    Without a worker everything runs on the calling thread, and all parameters may be read when
    `apply` returns. With a worker, the worker alone launches kernels and issues copies, and `apply`
    returns before the updates are over. They run in forward order; `wait_for_buckets` is called
    before a part of the model reads its parameters, and waits for the buckets of that part alone.
    The calling thread issues every collective. It issues all-gathers in forward order up to the
    needed buckets, also on ranks that skip layers, and the next one if its update is over. Both
    ways give the same bits.

    Owns: the worker, and everything that is still to be waited for.
    """

    def __init__(
        self,
        transfer: GradientTransfer,
        tasks: UpdateTasks,
        worker: Worker | None,
        ranks: RankGroup,
        stopwatch: Stopwatch,
        arrived: Callable[[int], None],
    ) -> None:
        """Begin with nothing under way.

        Args:
            worker: None to run everything on the calling thread.
            stopwatch: told of work that is done on the worker, and of waits in `wait_for_buckets`.
            arrived: told of each bucket when its parameters may be read again after `apply` has
                returned.
        """
        self._transfer = transfer
        self._tasks = tasks
        self._worker = worker
        self._ranks = ranks
        self._stopwatch = stopwatch
        self._arrived = arrived
        # Those that the calling thread finishes: to shards on a device, and on the host.
        self._copies: tuple[deque[GradientCopy], deque[GradientCopy]] = (deque(), deque())
        self._lost: BaseException | None = None  # what has ended one of them
        self._copy_jobs: deque[Job] = deque()
        self._begun: GradientCopy | None = None  # the copy that the worker finishes next
        self._has_begun = False  # there may be one
        self._updates: dict[int, Job] = {}
        self._to_gather: deque[int] = deque()
        self._to_use: dict[int, int] = {}
        self._used_on: dict[int, set[Hashable]] = {}  # the streams that have waited for a bucket
        self._pid = os.getpid()
        _notice_exit()

    @property
    def is_pending(self) -> bool:
        """Whether some parameters may not be read yet."""
        return bool(self._to_use)

    # Before the agreement.

    def start_copy(self, copy: GradientCopy) -> None:
        """Start to copy a bucket's gradients to their shard.

        Never waits for another rank, and in a world of one only where the host has fallen behind.
        """
        self._transfer.start_copy(copy)
        if not self._runs_on_worker(copy.state):
            # The calling thread must not wait here: it finishes copies that have arrived.
            self._copies[copy.state.plan.location.is_host].append(copy)
            self._finish_own_copies(wait=False)
            return
        what = f"the gradient copy of bucket {copy.state.layout.index}"
        self._copy_jobs.append(self._submit(what, partial(self._advance, copy)))
        self._has_begun |= self._transfer.goes_through_buffer(copy)
        while self._waits_for_host_alone(copy) and len(self._copy_jobs) > NUM_FOLDS_IN_FLIGHT:
            self._await(self._copy_jobs.popleft(), "reduce")

    def _waits_for_host_alone(self, copy: GradientCopy) -> bool:
        """Tell whether a copy waits for nothing but this process's own host.

        No stream can wait for the host to cast or add gradients. So backward must, or one that is
        faster than the host would hold all of its gradients on the device.
        """
        return self._ranks.world_size == 1 and self._transfer.goes_through_buffer(copy)

    def _advance(self, copy: GradientCopy | None) -> None:
        """Begin a copy, and finish the one before it, so that both get on at once. By the worker.

        Args:
            copy: None if no other follows.
        """
        before, self._begun = self._begun, copy
        if copy is not None:
            self._transfer.begin_copy(copy)
        self._finish(before)
        if copy is not None and copy.through is None:  # nothing of it goes on by itself
            self._begun = None
            self._finish(copy)

    def _finish(self, copy: GradientCopy | None) -> None:
        if copy is not None:
            self._transfer.finish_copy(copy)
            self._sum(copy.state.layout.index, copy.gradients)

    def sum_local(self, number: int, gradients: BucketGradients) -> None:
        """Let a worker sum squares of gradients that stay where autograd left them. Never waits."""
        if self._runs_on_worker(self._tasks.states[number]):
            what = f"the norm of bucket {number}"
            self._copy_jobs.append(self._submit(what, partial(self._sum, number, gradients)))

    def _sum(self, number: int, gradients: BucketGradients) -> None:
        with span("norm", number):
            self._tasks.sum_of_squares(number, gradients)

    def finish_copies(self, *, wait: bool) -> None:
        """Finish, in order, the copies that have arrived; with `wait` all copies.

        Raises:
            RuntimeError: the copy of a gradient of this step has ended with an error before.
        """
        if wait and self._lost is not None:
            raise RuntimeError(
                "gradients of this step are missing, for an error has ended their copy to the "
                "gradient shard: call zero_grad() on the optimizer and run the backward again"
            ) from self._lost
        if wait and self._has_begun:
            self._has_begun = False
            what = "the last gradient copy"
            self._copy_jobs.append(self._submit(what, partial(self._advance, None)))
        while wait and self._copy_jobs:
            self._await(self._copy_jobs.popleft(), "reduce", needs_peers=True)
        self._finish_own_copies(wait=wait)

    def _finish_own_copies(self, *, wait: bool) -> None:
        for copies in self._copies:
            while copies:
                for copy in islice(copies, NUM_FOLD_BUFFERS):
                    if wait or copy.state.plan.pins_staging:  # else CUDA would block this thread
                        self._transfer.begin_copy(copy)
                if not (wait or self._transfer.has_arrived(copies[0]) or self._holds_many(copies)):
                    break
                self._finish_oldest(copies)

    def _finish_oldest(self, copies: deque[GradientCopy]) -> None:
        try:
            self._transfer.finish_copy(copies.popleft())
        except BaseException as error:
            self._lost = error
            raise

    def drop_lost_copies(self) -> None:
        """Go on without gradients whose copy has ended with an error: nobody wants them now."""
        self._lost = None

    def _holds_many(self, copies: Sequence[GradientCopy]) -> bool:
        """Tell whether the oldest copy must be waited for, to free its slot or its gradients.

        Otherwise a reduction, or a fold, that is slower than backward would hold all gradients on
        the device.
        """
        if self._waits_for_host_alone(copies[0]):
            return len(copies) > NUM_FOLDS_IN_FLIGHT
        too_many = len(copies) >= NUM_SLOTS_IN_FLIGHT
        return too_many and self._transfer.waits_on_stream_alone(copies[0])

    def sum_of_squares(self, gradients: Sequence[BucketGradients]) -> float:
        """Return this rank's sum of squares in float64.

        The buckets' sums are added up in one order, whenever each was taken, so that the result is
        deterministic.
        """
        if self._worker is not None:
            # The calling thread waits for the device while the worker still finishes copies.
            for number in self._numbers(on_host=False):
                self._tasks.sum_of_squares(number, gradients[number])
            on_host = self._numbers(on_host=True)
            self.run_on_worker(
                "norm", lambda: [self._tasks.sum_of_squares(n, gradients[n]) for n in on_host]
            )
        total = 0.0
        for number, given in enumerate(gradients):
            total += self._tasks.sum_of_squares(number, given)
        return total

    def non_finite_indices(self, gradients: Sequence[BucketGradients]) -> npt.NDArray[np.int64]:
        """Return the indices of parameters whose gradient, in this rank's shard, is not finite."""
        found = [np.zeros(0, dtype=np.int64)]

        def find(numbers: Iterable[int]) -> None:
            found.extend(self._tasks.non_finite(number, gradients[number]) for number in numbers)

        find(self._numbers(on_host=False))
        search = partial(find, self._numbers(on_host=True))
        self.run_on_worker("search for non-finite gradients", search)
        return np.concatenate(found)

    def _numbers(self, *, on_host: bool) -> list[int]:
        states = self._tasks.states
        return [s.layout.index for s in states if s.plan.location.is_host is on_host]

    # After the agreement.

    def apply(
        self, gradients: Sequence[BucketGradients], inputs: UpdateInputs, stopwatch: Stopwatch
    ) -> None:
        """Update, copy and gather every bucket that has an active parameter, in forward order.

        With a worker, its jobs are submitted before the calling thread launches the updates of
        state on a device: see `Schedule.after_agreement`.

        Args:
            stopwatch: told of what the calling thread does before this returns.
        """
        self._tasks.record_last_read()
        to_launch: list[Callable[[Stopwatch], None]] = []
        for position, number in enumerate(self._tasks.stream_waits.schedule.forward_order):
            state = self._tasks.states[number]
            active = inputs.active[state.indices]
            if not active.any() or state.layout.numel == 0:
                inputs.count_step(state, active)
                self._skip_update(state)
                continue
            update = partial(self._tasks.update, number, gradients[number], active, inputs)
            if self._worker is None:
                update(stopwatch)
            elif state.plan.location.is_host:
                what = f"the update of bucket {number}"
                self._updates[number] = self._submit(what, partial(update, self._stopwatch))
            else:
                to_launch.append(update)
            if state.plan.gathers:
                self._to_gather.append(number)
            self._to_use[number] = position
            self._used_on.pop(number, None)
            if self._worker is None:
                self._gather_ahead(stopwatch)
        # After the loop, because launching takes this thread a while (some 25 kernels for a million
        # elements), and the host's updates run meanwhile.
        for launch in to_launch:
            launch(stopwatch)
        if self._worker is None:
            for number in list(self._to_use):
                self._use(number, stopwatch)

    def _skip_update(self, state: BucketState) -> None:
        """Keep a skipped bucket's turn among those that use staging slots."""
        if not state.plan.stages_parameters:
            return
        number = state.layout.index
        skip = partial(self._tasks.skip_copy_h2d, number)
        if self._runs_on_worker(state):
            self._submit(f"the turn of bucket {number}", skip)
        else:
            skip()

    def wait_for_buckets(self, buckets: Collection[int]) -> None:
        """Return when these buckets' parameters may be read. By the model's own thread.

        On a device the stream waits, not the host, for what has been issued.
        """
        self._bound_backlog()
        self._wait_on_other_streams(buckets)
        if not self._to_use:
            return
        needed = [number for number in buckets if number in self._to_use]
        if not needed:
            return
        self._reject_forked()
        # Before the wait for an update, which may wait until a capture is over.
        self._tasks.stream_waits.streams_of(needed[0]).reject_capture()
        with self._stopwatch.span("update wait"):
            last = max(self._to_use[number] for number in needed)
            while self._to_gather and self._to_use[self._to_gather[0]] <= last:
                self._gather_next(self._stopwatch)
            for number in sorted(needed, key=self._to_use.__getitem__):
                self._use(number, self._stopwatch)
                self._arrived(number)
        self._gather_ahead(self._stopwatch)

    def _wait_on_other_streams(self, buckets: Collection[int]) -> None:
        """Let a stream that has not waited for these buckets wait, where another one has.

        The model may run parts that share a bucket on several streams.
        """
        for number in buckets:
            used_on = self._used_on.get(number)
            if used_on is not None:
                stream = self._tasks.stream_waits.streams_of(number).current()
                if stream not in used_on:
                    used_on.add(stream)
                    self._tasks.stream_waits.wait_before(Operation.USE, number)

    def _reject_forked(self) -> None:
        if os.getpid() != self._pid:
            raise UnreadyParameterError(
                "this process was forked while parameters were being updated, by a thread that it "
                "has not: call synchronize() on the optimizer before you fork, or spawn"
            )

    def _bound_backlog(self) -> None:
        """Let no more than two backwards' gradients be on their way.

        With several ranks a backward does not wait after its first hook, so a forward does where
        several backwards add up on the host.
        """
        while len(self._copy_jobs) > 2 * len(self._tasks.states):
            self._await(self._copy_jobs.popleft(), "reduce", needs_peers=True)

    def _use(self, number: int, stopwatch: Stopwatch) -> None:
        self._tasks.wait_for_parameters(number, stopwatch)
        del self._to_use[number]
        stream = self._tasks.stream_waits.streams_of(number).current()
        if stream is not None:
            self._used_on[number] = {stream}

    def _gather_next(self, stopwatch: Stopwatch) -> None:
        # Forgotten only when it is issued: after an interrupt it is still to come on this rank too.
        with torch.no_grad():
            self._tasks.gather(self._to_gather[0], stopwatch)
        self._to_gather.popleft()

    def _gather_ahead(self, stopwatch: Stopwatch) -> None:
        """Issue the next gather if nothing need be waited for."""
        if self._to_gather:
            job = self._updates.get(self._to_gather[0])
            if job is None or job.is_over():
                self._gather_next(stopwatch)

    def forget_streams(self) -> None:
        """Let any stream read parameters without a wait: the host has waited until all are there.

        A CUDA graph could not capture such a wait.
        """
        self._used_on.clear()

    def finish_updates(self) -> None:
        """Return when all parameters may be read, and no update is under way.

        Raises:
            Exception: what an update has raised.
        """
        self.wait_for_buckets(list(self._to_use))
        assert not self._to_gather, "what is gathered is used"
        self._updates.clear()

    def close(self) -> bool:
        """End the worker when it has done what it was given; tell if it has. Idempotent."""
        has_ended = self._worker is None or self._worker.close()
        if self._to_gather and not _exiting.is_set():
            logger.error(
                "the optimizer was dropped before all parameters were gathered, so they differ "
                "between ranks now: call synchronize() or close() before"
            )
        return has_ended

    # The worker.

    def run_on_worker(self, phase: str, job: Callable[[], object]) -> None:
        """Do something on the thread that launches the updates, and return when it is done."""
        if self._worker is None:
            job()
        else:
            self._await(self._submit(f"the {phase}", job), phase)

    def _runs_on_worker(self, state: BucketState) -> bool:
        """Tell whether the worker, not the calling thread, finishes copies and runs updates."""
        return self._worker is not None and state.plan.location.is_host

    def _submit(self, what: str, job: Callable[[], object]) -> Job:
        def run() -> None:
            # Gradients are on by default in every thread.
            with torch.no_grad(), PROGRESS.untracked():
                job()

        assert self._worker is not None
        return self._worker.submit(what, run)

    def wait_for_update(self, task: Task) -> None:
        """Block the calling thread until an update that the worker runs, if any, is over."""
        job = self._updates.get(task.bucket)
        if job is not None:
            self._await(job, "update", bucket=task.bucket)

    def _await(
        self, job: Job, phase: str, *, bucket: int | None = None, needs_peers: bool = False
    ) -> None:
        """Wait for a job, and raise an error if a peer fails meanwhile.

        Args:
            phase: for error messages.
            needs_peers: the job itself waits for other ranks.

        Raises:
            Exception: what the job raised.
            PeerFailedError: naming the ranks that have failed.
        """
        if job.wait(0.0):
            return
        with PROGRESS.at(phase, bucket), PROGRESS.awaiting(peers=needs_peers):
            self._ranks.wait_until(lambda: job.wait(SLICE_S))


@functools.cache
def _notice_exit() -> None:
    """Know of the interpreter's exit before what was made earlier is finalized by it."""
    atexit.register(_exiting.set)
