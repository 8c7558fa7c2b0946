"""Run a step's tasks on the calling thread, or on the update thread during the next forward."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

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
from offload_adam.step.update_pipeline import BucketInputs, Job, UpdatePipeline, Worker
from offload_adam.step.update_tasks import UpdateTasks

logger = logging.getLogger(__name__)

# Set when the interpreter exits. `close` then logs no error about parameters that were not
# gathered, because no code will read them.
EXITING = threading.Event()


class Executor:
    """Runs the tasks of a step, in the order of the schedule.

    During backward, hooks start the copies bucket by bucket (`start_copy`, `sum_local`). After the
    agreement, `apply` starts all updates at once.

    Without a worker, everything runs on the calling thread, and all parameters may be read when
    `apply` returns.

    With a worker, `apply` returns while the updates still run on the worker, in forward order. Here
    the forward reads bucket 3 first:

        worker           update 3   update 2   update 1   update 0
        calling thread   apply | wait 3, gather 3, gather 2 | forward of 3 | wait 2, gather 1 | ...

    - For state on the host, the worker alone launches kernels. `UpdatePipeline` keeps it busy.
    - `wait_for_buckets` runs before a unit reads parameters, and waits only for their buckets.
    - The calling thread issues every collective. It issues all-gathers in forward order up to the
      needed buckets, also on ranks that skip layers, so that all ranks issue the same sequence. It
      then issues those whose updates have finished, as does every forward hook (`gather_ready`).

    The results have the same bits with and without a worker.

    Owns: the worker, and the lists of copies, updates and all-gathers to wait for.
    Threads: several threads may wait for updates at once: forward hooks and, with the optimizer's
        lock, its methods. Hooks must not take that lock, whose holder may run a closure that waits
        for a forward in another thread. The executor's own lock is held only while updates are
        started or waited for. Neither the worker nor the thread that reads a checkpoint takes it.
    """

    def __init__(
        self,
        transfer: GradientTransfer,
        tasks: UpdateTasks,
        workers: tuple[Worker, Worker] | None,
        ranks: RankGroup,
        stopwatch: Stopwatch,
        on_waited: Callable[[int], None],
    ) -> None:
        """Construct an executor without any task.

        Args:
            workers: an update thread, which is the worker, and a copy thread. None to run
                everything on the calling thread.
            stopwatch: times updates on the worker, and the waits in `wait_for_buckets`.
            on_waited: called with each bucket that `wait_for_buckets` has waited for.
        """
        self._transfer = transfer
        self._tasks = tasks
        self._worker = None if workers is None else workers[0]
        self._pipeline: UpdatePipeline | None = None
        if workers is not None:
            self._pipeline = UpdatePipeline(*workers, tasks, stopwatch)
        self._ranks = ranks
        self._stopwatch = stopwatch
        self._on_waited = on_waited
        # Copies that the calling thread finishes: [0] to shards on a device, [1] on the host.
        self._copies: tuple[deque[GradientCopy], deque[GradientCopy]] = (deque(), deque())
        self._copy_error: BaseException | None = None  # the error that ended one of `_copies`
        self._copy_jobs: deque[Job] = deque()
        self._unfinished: GradientCopy | None = None  # the copy that the worker finishes next
        self._may_have_unfinished = False  # the worker may have set `_unfinished`
        self._updates: dict[int, Job] = {}  # by bucket
        self._to_gather: deque[int] = deque()  # in forward order
        self._to_use: dict[int, int] = {}  # buckets not waited for yet: their forward positions
        self._used_on: dict[int, set[Hashable]] = {}  # the streams that have waited for a bucket
        self._lock = threading.RLock()  # for the last four; reentrant, for signal handlers
        self._pid = os.getpid()
        _notice_exit()

    @property
    def is_pending(self) -> bool:
        """Whether some parameters may not be read yet."""
        return bool(self._to_use)

    @property
    def to_gather(self) -> Sequence[int]:
        """The buckets whose all-gathers are not issued yet, in the order of all ranks."""
        return tuple(self._to_gather)

    # Before the agreement.

    def start_copy(self, copy: GradientCopy) -> None:
        """Start to copy a bucket's gradients to their shard.

        Never waits for another rank. With one rank it waits if the host is more than
        `NUM_FOLDS_IN_FLIGHT` copies behind.
        """
        self._transfer.start_direct_copy(copy)
        if not self._runs_on_worker(copy.state):
            # In backward this thread must not wait: it finishes only copies that have arrived.
            self._copies[copy.state.plan.location.is_host].append(copy)
            self._finish_own_copies(wait=False)
            return
        what = f"the gradient copy of bucket {copy.state.layout.index}"
        self._copy_jobs.append(self._submit(what, partial(self._advance, copy)))
        self._may_have_unfinished |= self._transfer.goes_through_buffer(copy)
        while self._waits_for_host_alone(copy) and len(self._copy_jobs) > NUM_FOLDS_IN_FLIGHT:
            self._await_copy()

    def _waits_for_host_alone(self, copy: GradientCopy) -> bool:
        """Return whether a copy waits for this process's own host alone, and for no other rank."""
        # A stream cannot wait for the host to cast or add gradients. So backward itself waits, or a
        # fast backward would keep all of its gradients on the device.
        return self._ranks.world_size == 1 and self._transfer.goes_through_buffer(copy)

    def _advance(self, copy: GradientCopy | None) -> None:
        """Start a copy, then finish the previous one, so that the two overlap. Runs on the worker.

        Args:
            copy: None to finish the last copy.
        """
        before, self._unfinished = self._unfinished, copy
        if copy is not None:
            self._transfer.start_buffered_copy(copy)
        self._finish(before)
        if copy is not None and copy.host_buffer is None:
            # No D2H copy to a buffer is in flight that the next call could overlap with.
            self._unfinished = None
            self._finish(copy)

    def _finish(self, copy: GradientCopy | None) -> None:
        if copy is not None:
            self._transfer.finish_copy(copy)
            self._sum(copy.state.layout.index, copy.gradients)

    def sum_local(self, number: int, gradients: BucketGradients) -> None:
        """Let the worker sum the squares of gradients that stay in `.grad`. Never waits.

        Without a worker, those that the sum copies to their shard are summed here.
        """
        if self._runs_on_worker(self._tasks.states[number]):
            what = f"the norm of bucket {number}"
            self._copy_jobs.append(self._submit(what, partial(self._sum, number, gradients)))
        elif gradients.target is not None:
            self._sum(number, gradients)

    def _sum(self, number: int, gradients: BucketGradients) -> None:
        with span("norm", number):
            self._tasks.sum_of_squares(number, gradients)

    def finish_copies(self, *, wait: bool) -> None:
        """Finish, in order, the copies that have arrived.

        Args:
            wait: wait for all copies and finish them.

        Raises:
            RuntimeError: an earlier copy of this step failed.
        """
        if wait and self._copy_error is not None:
            raise RuntimeError(
                "Gradients of this step are missing: their copy to the gradient shard failed. Call "
                "zero_grad() on the optimizer and run the backward again."
            ) from self._copy_error
        if wait and self._may_have_unfinished:
            self._may_have_unfinished = False
            what = "the last gradient copy"
            self._copy_jobs.append(self._submit(what, partial(self._advance, None)))
        while wait and self._copy_jobs:
            self._await_copy(needs_peers=True)
        self._finish_own_copies(wait=wait)

    def _finish_own_copies(self, *, wait: bool) -> None:
        for copies in self._copies:
            while copies:
                # Start as many copies as there are host buffers for them.
                for copy in islice(copies, NUM_FOLD_BUFFERS):
                    # A D2H copy to pageable memory would block this thread.
                    if wait or copy.state.plan.pins_staging:
                        self._transfer.start_buffered_copy(copy)
                if not (wait or self._transfer.has_arrived(copies[0]) or self._holds_many(copies)):
                    break
                self._finish_oldest(copies)

    def _finish_oldest(self, copies: deque[GradientCopy]) -> None:
        try:
            self._transfer.finish_copy(copies.popleft())
        except BaseException as error:
            self._copy_error = error
            raise

    def drop_lost_copies(self) -> None:
        """Forget the error of a failed copy: the gradients of its step are dropped."""
        self._copy_error = None

    def _holds_many(self, copies: Sequence[GradientCopy]) -> bool:
        """Return whether to wait for the oldest copy, to free its slot or its gradients."""
        # Without this limit, a reduction or a fold that is slower than backward would keep all
        # gradients on the device.
        if self._waits_for_host_alone(copies[0]):
            return len(copies) > NUM_FOLDS_IN_FLIGHT
        too_many = len(copies) >= NUM_SLOTS_IN_FLIGHT
        return too_many and self._transfer.waits_on_stream_alone(copies[0])

    def sums_of_squares(self, gradients: Sequence[BucketGradients]) -> list[float]:
        """Return the sum of squares of each bucket's gradients on this rank, in float64."""
        # First the buckets on a device: this thread waits for the device while the worker still
        # finishes copies.
        self._tasks.sum_on_devices(self._numbers(on_host=False), gradients)
        if self._worker is not None:
            on_host = self._numbers(on_host=True)
            self.run_on_worker(
                "norm", lambda: [self._tasks.sum_of_squares(n, gradients[n]) for n in on_host]
            )
        return [self._tasks.sum_of_squares(number, given) for number, given in enumerate(gradients)]

    def non_finite_indices(self, gradients: Sequence[BucketGradients]) -> npt.NDArray[np.int64]:
        """Return the indices of parameters with a non-finite gradient in this rank's shard."""
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
        """Update, copy and all-gather every bucket with an active parameter, in forward order.

        With a worker, this submits the updates and returns; `wait_for_buckets` does the rest.

        Args:
            stopwatch: times the work of the calling thread.
        """
        with self._lock:
            self._apply(gradients, inputs, stopwatch)

    def _apply(
        self, gradients: Sequence[BucketGradients], inputs: UpdateInputs, stopwatch: Stopwatch
    ) -> None:
        self._tasks.record_last_read()
        buckets = []
        for number in self._tasks.stream_waits.schedule.forward_order:
            state = self._tasks.states[number]
            active = inputs.active[state.indices]
            if not active.any() or state.layout.numel == 0:
                # An empty shard is not updated, but its parameters count the step.
                inputs.count_step(state, active)
                active = np.zeros_like(active)
            buckets.append(BucketInputs(number, gradients[number], active))
        # First the host's, so that its threads run while this one launches updates on a device.
        # `Schedule.after_agreement` has the same order.
        if self._pipeline is not None:
            on_host = [b for b in buckets if self._runs_on_worker(self._tasks.states[b.number])]
            self._updates |= self._pipeline.start(on_host, inputs)
        for position, given in enumerate(buckets):
            self._begin_bucket(position, given, inputs, stopwatch)
        if self._worker is None:
            for number in list(self._to_use):
                self._wait_for_bucket(number, stopwatch)
                del self._to_use[number]

    def _begin_bucket(
        self, position: int, given: BucketInputs, inputs: UpdateInputs, stopwatch: Stopwatch
    ) -> None:
        """Update a bucket, unless the worker does, and note who has to wait for it.

        Args:
            position: of the bucket in forward order.
        """
        number = given.number
        state = self._tasks.states[number]
        if given.is_skipped:
            if state.plan.stages_parameters and not self._runs_on_worker(state):
                self._tasks.skip_copy_h2d(number)
            return
        if not self._runs_on_worker(state):
            self._tasks.update(*given, inputs, stopwatch)
        if state.plan.gathers:
            self._to_gather.append(number)
        self._to_use[number] = position
        self._used_on.pop(number, None)  # no stream has waited for this update yet
        if self._worker is None:
            self._gather_ahead(stopwatch)

    def wait_for_buckets(self, buckets: Collection[int]) -> None:
        """Wait until these buckets' parameters may be read.

        The host waits for updates on the worker. For issued copies and all-gathers on a device, the
        current stream waits, not the host.
        """
        self._bound_backlog()
        self._wait_for_buckets(buckets)

    def _wait_for_buckets(self, buckets: Collection[int]) -> None:
        if self._to_use:
            self._wait_for_updates([number for number in buckets if number in self._to_use])
        # Last, because another thread may have waited for some of them, on its own stream.
        self._wait_on_other_streams(buckets)

    def _wait_for_updates(self, needed: Sequence[int]) -> None:
        if not needed:
            return
        self._reject_forked()
        # Before any wait: the update itself may wait until the capture has ended, a deadlock.
        self._tasks.stream_waits.streams_of(needed[0]).reject_capture()
        with self._lock:
            # Another thread may have waited for some of them while this one waited for the lock.
            positions = {n: self._to_use[n] for n in needed if n in self._to_use}
            with self._stopwatch.span("update wait"):
                last = max(positions.values(), default=-1)
                while self._to_gather and self._to_use[self._to_gather[0]] <= last:
                    self._gather_next(self._stopwatch)
                for number in sorted(positions, key=positions.__getitem__):
                    self._wait_for_bucket(number, self._stopwatch)
                    try:
                        self._on_waited(number)
                    finally:
                        # Last: from here on, other threads read the parameters without the lock.
                        # Already gone if a signal handler has waited for the bucket meanwhile.
                        self._to_use.pop(number, None)
            self._gather_ahead(self._stopwatch)

    def _wait_on_other_streams(self, buckets: Collection[int]) -> None:
        """Let the current stream wait for buckets for which only other streams have waited.

        The model may run units that share a bucket on several streams.
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
                "This process was forked while a thread of its parent updated the parameters. Call "
                "synchronize() on the optimizer before you fork, or spawn processes instead."
            )

    def _bound_backlog(self) -> None:
        """Wait until at most two backwards' gradient copies are unfinished."""
        # With several ranks, hooks of a backward must not wait for other ranks. So the next forward
        # waits, if several backwards accumulate on the host faster than it adds them.
        while len(self._copy_jobs) > 2 * len(self._tasks.states):
            self._await_copy(needs_peers=True)

    def _wait_for_bucket(self, number: int, stopwatch: Stopwatch) -> None:
        """Wait for a bucket's parameters, and record the stream that has waited."""
        self._tasks.wait_for_parameters(number, stopwatch)
        stream = self._tasks.stream_waits.streams_of(number).current()
        if stream is not None:
            self._used_on[number] = {stream}

    def _gather_next(self, stopwatch: Stopwatch) -> None:
        # The bucket is removed only after its all-gather was issued. If a KeyboardInterrupt comes
        # before, this rank still issues it later, in the same order as the other ranks.
        with torch.no_grad():
            self._tasks.gather(self._to_gather[0], stopwatch)
        self._to_gather.popleft()

    def gather_ready(self) -> None:
        """Issue the next all-gathers whose updates have finished. Never waits.

        Threads: only one that runs the forward may call this.
        """
        # Without the lock: another thread that takes the last one meanwhile leaves none to issue.
        if not self._to_gather or not self._may_gather_next():
            return
        # A thread that holds the lock issues them itself, after its wait.
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._to_gather:
                return
            streams = self._tasks.stream_waits.streams_of(self._to_gather[0])
            # A CUDA graph would capture the all-gather, and a forked process has no peers.
            if os.getpid() == self._pid and not streams.is_capturing():
                self._gather_ahead(self._stopwatch)
        finally:
            self._lock.release()

    def _gather_ahead(self, stopwatch: Stopwatch) -> None:
        """Issue the next all-gathers, up to the first bucket whose update is still running."""
        while self._may_gather_next():
            self._gather_next(stopwatch)

    def _may_gather_next(self) -> bool:
        try:
            job = self._updates.get(self._to_gather[0])
        except IndexError:  # none is left
            return False
        return job is None or job.is_over()

    def forget_streams(self) -> None:
        """Let every stream read parameters without a wait: the host has waited for all of them."""
        # A CUDA graph cannot capture a wait for work that was issued before the capture.
        self._used_on.clear()

    def finish_updates(self) -> None:
        """Wait until all updates have finished and all parameters may be read.

        Raises:
            Exception: the error of an update.
        """
        # Without a bound on the backlog: in `step()` other ranks may send their part of a further
        # backward only after this rank has told them of it.
        self._wait_for_buckets(list(self._to_use))
        with self._lock:
            if not self._to_use:  # else another thread has started the next step's updates
                assert not self._to_gather, "every bucket to gather is also in `_to_use`"
                if self._pipeline is not None:
                    self._pipeline.finish()
                self._updates.clear()

    def runs_here(self) -> bool:
        """Return whether the caller is one of the threads that `close` waits for."""
        return self._pipeline is not None and self._pipeline.is_current()

    def close(self) -> bool:
        """Let the worker finish its jobs and end; return whether it has ended. Idempotent."""
        has_ended = self._pipeline is None or self._pipeline.close()
        if self._to_gather and not EXITING.is_set():
            logger.error(
                "The optimizer was dropped before all parameters were gathered, so they now differ "
                "between ranks. Call synchronize() or close() before you drop it."
            )
        return has_ended

    # The worker.

    def run_on_worker(self, phase: str, job: Callable[[], object]) -> None:
        """Run a job on the thread that launches the updates, and wait for it.

        Args:
            phase: names the job in messages.
        """
        if self._worker is None:
            job()
        else:
            with self._kept(self._submit(f"the {phase}", job)) as submitted:
                self._await(submitted, phase)

    def _runs_on_worker(self, state: BucketState) -> bool:
        """Return whether the worker, not the calling thread, copies and updates this bucket."""
        return self._worker is not None and state.plan.location.is_host

    def _submit(self, what: str, job: Callable[[], object]) -> Job:
        assert self._worker is not None
        return self._worker.submit(what, job)

    def wait_for_update(self, task: Task) -> None:
        """Block the calling thread until the worker has finished a bucket's update, if any."""
        job = self._updates.get(task.bucket)
        if job is not None:
            self._await(job, "update", bucket=task.bucket)

    def _await_copy(self, *, needs_peers: bool = False) -> None:
        """Wait for the oldest job in `_copy_jobs`."""
        with self._kept(self._copy_jobs.popleft()) as job:
            self._await(job, "reduce", needs_peers=needs_peers)

    @contextmanager
    def _kept(self, job: Job) -> Iterator[Job]:
        """Put a job into `_copy_jobs` if an error, such as KeyboardInterrupt, ends its wait.

        The job still reads gradients, so `zero_grad()` must wait for it before it frees them.
        """
        try:
            yield job
        finally:
            if not job.is_over():
                self._copy_jobs.appendleft(job)

    def _await(
        self, job: Job, phase: str, *, bucket: int | None = None, needs_peers: bool = False
    ) -> None:
        """Wait for a job, and raise an error if a peer fails meanwhile.

        Args:
            phase: names the wait in messages.
            needs_peers: the job itself waits for other ranks.

        Raises:
            Exception: the job's error.
            PeerFailedError: naming the failed ranks.
        """
        if job.wait(0.0):
            return
        with PROGRESS.at(phase, bucket), PROGRESS.awaiting(peers=needs_peers):
            self._ranks.wait_until(lambda: job.wait(SLICE_S))


@functools.cache
def _notice_exit() -> None:
    """Set `EXITING` when the interpreter exits, before optimizers are finalized."""
    # atexit runs callbacks in reverse order of registration. `weakref.finalize` registers its own
    # callback with the process's first finalizer, and an optimizer creates a finalizer before its
    # executor. So this callback runs before all finalizers.
    atexit.register(EXITING.set)
