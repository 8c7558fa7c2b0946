"""What runs a schedule, and the sequential way: one task after the other, as it lists them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from offload_adam.layout.schedule import Operation, Route, Schedule, Task
from offload_adam.spans import Spans
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.gradients import BucketGradients
from offload_adam.step.landing import Flight
from offload_adam.step.masks import UpdateMasks
from offload_adam.step.tasks import Tasks


class Executor(ABC):
    """Runs the tasks of a schedule.

    Before the agreement backward drives it, bucket by bucket (`send`, `hold`); after the agreement
    it is given the rest at once (`apply`). Both executors give the same bits.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks

    def extend(
        self, states: Sequence[BucketState], routes: Sequence[Route], schedule: Schedule
    ) -> None:
        """Take further buckets in, and routes and a schedule for all of them."""
        self.land(wait=True)
        self.settle()
        self.tasks.extend(states, routes, schedule, self._wait_for_update)

    @abstractmethod
    def send(self, flight: Flight) -> None:
        """Take over a bucket whose gradients are on their way to the host. Never waits."""

    @abstractmethod
    def hold(self, number: int, gradients: BucketGradients) -> None:
        """Hear that a bucket's gradients are read where autograd left them. Never waits."""

    @abstractmethod
    def land(self, *, wait: bool) -> None:
        """Land, in order, the flights that have come; with `wait` all of them."""

    @abstractmethod
    def sum_of_squares(self, gradients: Sequence[BucketGradients]) -> float:
        """Return this rank's sum of squares in float64, added up bucket by bucket as scheduled."""

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
    def need(self, buckets: Collection[int]) -> None:
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
        self._in_flight: deque[Flight] = deque()

    def send(self, flight: Flight) -> None:
        """Queue it, and land those that have come meanwhile."""
        self.tasks.depart(flight)
        self._in_flight.append(flight)
        self.land(wait=False)

    def hold(self, number: int, gradients: BucketGradients) -> None:
        """Leave the sum for the step."""

    def land(self, *, wait: bool) -> None:
        """Land in the order of departure."""
        while self._in_flight and (wait or self.tasks.has_arrived(self._in_flight[0])):
            self.tasks.land(self._in_flight.popleft())

    def sum_of_squares(self, gradients: Sequence[BucketGradients]) -> float:
        """Take the sums now, one bucket after the other."""
        return sum_as_scheduled(self.tasks, gradients)

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
                    self.tasks.pass_by(number)
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

    def need(self, buckets: Collection[int]) -> None:
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


def sum_as_scheduled(tasks: Tasks, gradients: Sequence[BucketGradients]) -> float:
    """Add up the buckets' sums of squares in one order, whenever each was taken."""
    total = 0.0
    for operation, number in tasks.schedule.before_agreement:
        if operation is Operation.SUM_SQUARES:
            total += tasks.sum_of_squares(number, gradients[number])
    return total


def find_non_finite(
    tasks: Tasks, buckets: Iterable[int], gradients: Sequence[BucketGradients]
) -> npt.NDArray[np.int64]:
    """Return the indices of these buckets' parameters whose gradient here is not finite."""
    found = [tasks.non_finite(number, gradients[number]) for number in buckets]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])
