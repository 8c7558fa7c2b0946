"""A backend for the optimizer on the simulated machine: streams, collectives and a worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol

import torch

from offload_adam.layout.schedule import Lane
from offload_adam.transfer.collectives import Collectives, PendingCollective
from offload_adam.transfer.streams import DONE, DeviceStreams, Event, Streams
from tests.simulation.detector import Clock
from tests.simulation.machine import (
    COPY,
    LANES,
    UPDATE,
    Machine,
    SimulatedEvent,
    Stream,
)
from tests.simulation.memory import poison
from tests.support.updates import run_on_worker


class SimulatedStreams(DeviceStreams[Stream]):
    """The lanes of the machine's device: the code for GPUs, with simulated streams and events."""

    def __init__(self, machine: Machine) -> None:
        super().__init__({lane: lane for lane in LANES if lane is not Lane.COMPUTE})
        self._machine = machine

    def current(self) -> Stream:
        """Return the stream of the layer that runs."""
        return self._machine.current_stream

    def _run(
        self,
        stream: Stream,
        action: Callable[[], object],
        reads: Iterable[torch.Tensor],
        writes: Iterable[torch.Tensor],
    ) -> None:
        """Queue the action, under the name of the task that this thread began last."""
        self._machine.launch(stream, action, self._machine.task, reads=reads, writes=writes)

    def _record_on(self, stream: Stream) -> Event:
        event = self._machine.record(stream)
        self._machine.elapse()
        return event

    def _wait_on(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        self._machine.wait(stream, event)

    def _has_happened(self, event: Event) -> bool:
        assert isinstance(event, SimulatedEvent)
        if event.at is not None:
            self._machine.saw(event)
        return event.at is not None


class HostLanes:
    """Lanes of parameters in host memory: the launching thread runs the work at once."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Run the action."""
        self._machine.elapse()
        self._machine.touch(self._machine.task, reads, writes)
        action()

    def current(self) -> Hashable:
        """Return None: there are no streams."""
        return None

    def is_capturing(self) -> bool:
        """Return False: nothing is captured."""
        return False

    def reject_capture(self) -> None:
        """Return: nothing is captured."""

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        """Return an event that has happened."""
        return DONE

    def wait(self, lane: Lane, event: Event) -> None:
        """Do nothing: every event has happened."""


class SimulatedCollective:
    """The handle of a collective on host memory, in the place of `torch.distributed.Work`."""

    def __init__(self, event: SimulatedEvent) -> None:
        self._event = event

    def is_completed(self) -> bool:
        """Return, without waiting, whether the collective is complete."""
        return self._event.at is not None

    def wait(self) -> None:
        """Run the machine until the collective is complete."""
        self._event.synchronize()


class Peers(Protocol):
    """The simulated other ranks of a world."""

    def fill(self, flat: torch.Tensor) -> Callable[[], None]:
        """Return a function that writes the other ranks' current shards into a bucket."""
        ...


class SimulatedCollectives(Collectives):
    """Collectives with peers that have the same gradients, so the mean is this rank's gradient."""

    def __init__(self, machine: Machine, peers: Peers) -> None:
        self._machine = machine
        self._peers = peers

    def mean(
        self, streams: Streams, buffer: torch.Tensor, part: tuple[int, int]
    ) -> PendingCollective:
        """Keep this rank's part, and fill the remainder of the buffer with NaN."""

        def scatter() -> None:
            poison(buffer[: part[0]])
            poison(buffer[part[1] :])

        return self._issue(Lane.REDUCE, streams, scatter, buffer, buffer[part[0] : part[1]])

    def gather(
        self, streams: Streams, flat: torch.Tensor, members: tuple[int, ...] | None = None
    ) -> PendingCollective:
        """Write the other ranks' shards into the bucket."""
        return self._issue(Lane.GATHER, streams, self._peers.fill(flat), flat, flat)

    def _issue(
        self,
        lane: Lane,
        streams: Streams,
        action: Callable[[], None],
        buffer: torch.Tensor,
        shard: torch.Tensor,
    ) -> PendingCollective:
        if isinstance(streams, SimulatedStreams):
            streams.launch(lane, action, reads=[buffer], writes=[buffer])
            return PendingCollective(None, buffer, shard)
        self._machine.launch(lane, action, self._machine.task, reads=[buffer], writes=[buffer])
        handle: Any = SimulatedCollective(self._machine.record(lane))
        return PendingCollective(handle, buffer, shard)


class SimulatedJob:
    """One job of a worker."""

    def __init__(self, worker: SimulatedWorker, what: str, job: Callable[[], object]) -> None:
        self.what = what
        self.given: Clock = worker.machine.release()
        self.ended: Clock | None = None
        self.job: Callable[[], object] | None = job
        self._worker = worker

    def is_over(self) -> bool:
        """Return whether the job has ended."""
        self._worker.machine.elapse()
        return self.ended is not None

    def wait_until_begun(self, timeout_s: float) -> None:
        """Let jobs run, or not."""
        self._worker.machine.elapse()

    def wait(self, timeout_s: float) -> bool:
        """Run jobs up to this one, none with a timeout of 0; raise the error of a job."""
        while timeout_s > 0.0 and self.ended is None:
            assert self._worker.run_next()
        if self.ended is None:
            return False
        self._worker.machine.join(self.ended)
        if self._worker.failure is not None:
            raise self._worker.failure
        return True


def simulated_workers(machine: Machine) -> tuple[SimulatedWorker, SimulatedWorker]:
    """Return an update thread and a copy thread."""
    return SimulatedWorker(machine, UPDATE), SimulatedWorker(machine, COPY)


class SimulatedWorker:
    """Runs jobs as a thread: at random times, or at last when a caller waits for them."""

    def __init__(self, machine: Machine, thread: str) -> None:
        self.machine = machine
        self.failure: BaseException | None = None
        self._thread = thread
        self._is_running = False
        self._waiting: deque[SimulatedJob] = deque()
        machine.run_jobs[thread] = self.run_next

    def submit(self, what: str, job: Callable[[], object]) -> SimulatedJob:
        """Queue a job."""
        given = SimulatedJob(self, what, job)
        self._waiting.append(given)
        self.machine.elapse()
        return given

    def is_current(self) -> bool:
        """Return False: nothing is finalized by a job."""
        return False

    def run_next(self) -> bool:
        """Run one job; return whether there was any. One job does not interrupt another."""
        if not self._waiting or self._is_running:
            return False
        job = self._waiting.popleft()
        assert job.job is not None
        with ExitStack() as back:
            back.callback(setattr, self, "_is_running", False)
            back.callback(setattr, self.machine, "thread", self.machine.thread)
            back.callback(setattr, self.machine, "task", self.machine.task)
            self._is_running = True
            self.machine.thread, self.machine.task = self._thread, job.what
            self.machine.join(job.given)
            if self.failure is None:
                try:
                    run_on_worker(job.job)
                except BaseException as error:
                    self.failure = error
            job.job = None
            job.ended = self.machine.release()
        return True

    def close(self) -> bool:
        """Run all jobs."""
        while self.run_next():
            pass
        return True
