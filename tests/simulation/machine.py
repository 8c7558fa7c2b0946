"""Simulated lanes and threads of a machine, under one seeded virtual clock.

Work that is launched on a lane is queued and runs later, at a random virtual time. Lanes run at
different random speeds, so copies and kernels end late and out of order. Host work takes a random
virtual time.

In addition, a vector clock records the order that launches and waits guarantee. It does not
depend on the random times, so it finds a missing wait even if the times hide it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from random import Random

import torch

from offload_adam.layout.schedule import Lane
from tests.simulation.detector import Clock, Detector

TRAINING = "training thread"
UPDATE = "update thread"
COPY = "copy thread"


class Side(Enum):
    """Streams of the model and of FSDP2 besides COMPUTE.

    COMPUTE: runs some of the model's layers.
    COPY_IN, ALL_GATHER, SCATTER: see `tests.simulation.fsdp2`.
    """

    COMPUTE = "side compute"
    COPY_IN = "copy-in"
    ALL_GATHER = "all-gather"
    SCATTER = "reduce-scatter"


Stream = Lane | Side
LANES = (Lane.COMPUTE, Lane.REDUCE, Lane.D2H, Lane.H2D, Lane.GATHER)
STREAMS: tuple[Stream, ...] = (*LANES, *Side)
ACTORS = (TRAINING, UPDATE, COPY, *(stream.value for stream in STREAMS))


@dataclass(eq=False)
class SimulatedEvent:
    """A point in a lane's work.

    clock: the work that is ordered before the event.
    at: virtual time at which the event happened, None before.
    """

    machine: Machine
    clock: Clock
    at: float | None = None

    def query(self) -> bool:
        """Run the machine until the event has happened, since callers poll until it has."""
        while self.at is None:
            # `advance` also passes events without work before them.
            assert self.machine.advance() or self.at is not None, "the event never happens"
        return True

    def synchronize(self) -> None:
        """Run the machine until the event has happened; order this thread's later work after it."""
        self.query()
        self.machine.join(self.clock)


@dataclass(eq=False)
class _Work:
    action: Callable[[], object]
    issued_at: float
    duration: float
    end: float | None = None


@dataclass
class _Queue:
    """One lane's queue of work, own events, and (in tuples) events of other lanes to wait for."""

    pace: float
    items: deque[_Work | SimulatedEvent | tuple[SimulatedEvent]] = field(default_factory=deque)
    ready_at: float = 0.0


class Machine:
    """One device's lanes, the training thread and the update thread.

    Everything runs on the calling thread, deterministically. `thread` names the simulated thread.

    Args:
        seed: of all random times.
        detector: gets every memory access.
    """

    def __init__(self, seed: int, detector: Detector) -> None:
        self.random = Random(seed)
        self.detector = detector
        self.now = 0.0
        self.thread = TRAINING
        self.task = "construction"
        self.current_stream: Stream = Lane.COMPUTE
        self.run_jobs: dict[str, Callable[[], bool]] = {}  # run one job of this thread, if any
        self._in_action = False
        self._host_pace = self.random.choice([0.0, 0.0, 0.1, 1.0, 10.0])
        self._queues: dict[Stream, _Queue] = {
            stream: _Queue(10 ** self.random.uniform(-1.0, 1.5)) for stream in STREAMS
        }
        self._seen: Clock = (0,) * len(ACTORS)
        self._clocks: dict[str, Clock] = {actor: (0,) * len(ACTORS) for actor in ACTORS}

    # Vector clocks.

    def release(self) -> Clock:
        """Return this thread's clock, and advance it, so that its later work is not included."""
        clock = self._clocks[self.thread]
        self._clocks[self.thread] = _ticked(clock, self.thread)
        return clock

    def join(self, clock: Clock) -> None:
        """Order this thread's later work after `clock`."""
        self._clocks[self.thread] = _joined(self._clocks[self.thread], clock)

    def touch(
        self, name: str, reads: Iterable[torch.Tensor] = (), writes: Iterable[torch.Tensor] = ()
    ) -> None:
        """Note accesses of this thread itself."""
        self.detector.access(self.thread, self._clocks[self.thread], name, reads, writes)

    # Queues.

    def launch(
        self,
        lane: Stream,
        action: Callable[[], object],
        name: str,
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
        after: Clock | None = None,
    ) -> None:
        """Queue work.

        Args:
            after: clock of host work that is ordered before this work, but not before later work on
                the lane. None orders all of this thread's earlier work before both.
        """
        if after is None:
            self.elapse()
            self._clocks[lane.value] = _joined(self._clocks[lane.value], self.release())
        clock = self._clocks[lane.value] = _ticked(self._clocks[lane.value], lane.value)
        if after is not None:
            clock = _joined(clock, after)
        self.detector.access(lane.value, clock, name, reads, writes)
        queue = self._queues[lane]
        duration = self.random.expovariate(1.0) * queue.pace
        queue.items.append(_Work(action, self.now, duration))

    def record(self, lane: Stream) -> SimulatedEvent:
        """Return an event after all work that is queued on a lane."""
        self.elapse()
        clock = _joined(self._clocks[lane.value], self.release())
        self._clocks[lane.value] = clock
        event = SimulatedEvent(self, clock)
        self._queues[lane].items.append(event)
        return event

    def wait(self, lane: Stream, event: SimulatedEvent) -> None:
        """Make work that is queued on a lane from now on wait for `event`."""
        self.elapse()
        clock = _joined(self._clocks[lane.value], self.release())
        self._clocks[lane.value] = _joined(clock, event.clock)
        self._queues[lane].items.append((event,))

    # Virtual time.

    def elapse(self) -> None:
        """Advance the host by a random time, in which lanes and other threads may run."""
        if self._in_action or self._host_pace == 0.0:
            return
        until = self.now + self.random.expovariate(1.0) * self._host_pace
        while self._first_end() <= until:
            self.advance()
        self.now = max(self.now, until)
        for thread, run_job in self.run_jobs.items():
            if thread != self.thread and self.random.random() < 0.2:
                run_job()

    def advance(self) -> bool:
        """Run the work that ends first; return whether there was any."""
        end = self._first_end()
        for queue in self._queues.values():
            head = queue.items[0] if queue.items else None
            if isinstance(head, _Work) and head.end == end:
                queue.items.popleft()
                queue.ready_at = self.now = max(self.now, end)
                self._do(head)
                return True
        return False

    def drain(self) -> None:
        """Run all queued work."""
        while self.advance():
            pass
        assert not any(queue.items for queue in self._queues.values())

    def freed_at(self) -> Clock:
        """Return the clock before which COMPUTE cannot reuse memory that is freed now.

        A caching allocator guarantees only the order of the host and of that stream.
        """
        if self._in_action:
            return (0,) * len(ACTORS)
        return _joined(self._clocks[self.thread], self._seen)

    def saw(self, event: SimulatedEvent) -> None:
        """Record that the host has queried an event that had happened.

        The host frees memory after such a query, so `freed_at` includes the event. The order of
        tasks does not, because the same query may return False in another run.
        """
        self._seen = _joined(self._seen, event.clock)

    def _do(self, work: _Work) -> None:
        self._in_action = True
        try:
            work.action()
            del work.action  # frees the memory that it holds while `_in_action` is set
        finally:
            self._in_action = False

    def _first_end(self) -> float:
        """Return when the next work ends, infinity if no work can run."""
        busy = [queue for queue in self._queues.values() if queue.items]
        while any(self._pass_marks(queue) for queue in busy):
            pass
        ends = [float("inf")]
        for queue in busy:
            head = queue.items[0] if queue.items else None
            if isinstance(head, _Work):
                if head.end is None:
                    head.end = max(queue.ready_at, head.issued_at) + head.duration
                ends.append(head.end)
        return min(ends)

    def _pass_marks(self, queue: _Queue) -> bool:
        """Pass the events at a queue's head; return whether there were any."""
        passed = False
        while queue.items:
            head = queue.items[0]
            if isinstance(head, SimulatedEvent):
                head.at = queue.ready_at
            elif isinstance(head, tuple) and head[0].at is not None:
                queue.ready_at = max(queue.ready_at, head[0].at)
            else:
                break
            queue.items.popleft()
            passed = True
        return passed


def _joined(first: Clock, second: Clock) -> Clock:
    return tuple([a if a > b else b for a, b in zip(first, second, strict=True)])


def _ticked(clock: Clock, actor: str) -> Clock:
    place = ACTORS.index(actor)
    return (*clock[:place], clock[place] + 1, *clock[place + 1 :])
