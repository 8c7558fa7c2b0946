"""Lanes and threads of a machine that does not exist, under one seeded virtual clock.

What is launched on a lane is queued there and done later, at a virtual time that is drawn: lanes
get on at different speeds, so that copies and kernels end late and out of order. Host work takes no
time but what is drawn for it. A vector clock follows what is ordered by launches and waits alone,
whatever the drawn times happen to do.
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


class Side(Enum):
    """A second stream on which the model runs some of its layers."""

    COMPUTE = "side compute"


Stream = Lane | Side
LANES = (Lane.COMPUTE, Lane.REDUCE, Lane.D2H, Lane.H2D, Lane.GATHER)
STREAMS: tuple[Stream, ...] = (*LANES, Side.COMPUTE)
ACTORS = (TRAINING, UPDATE, *(stream.value for stream in STREAMS))


@dataclass(eq=False)
class SimulatedEvent:
    """A point in a lane's work.

    clock: what is ordered before it. at: when it was reached, None as long as it was not.
    """

    machine: Machine
    clock: Clock
    at: float | None = None

    def query(self) -> bool:
        """Let the clock run until the work up to it is over: whoever asks, asks again and again."""
        while self.at is None:
            # Without any work before it, it is reached by looking for some.
            assert self.machine.advance() or self.at is not None, "it will never be reached"
        return True

    def synchronize(self) -> None:
        """Let the clock run until it is; what comes after on this thread is ordered after it."""
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
    """What waits on one lane: work, events of its own, and events of other lanes to wait for."""

    pace: float
    items: deque[_Work | SimulatedEvent | tuple[SimulatedEvent]] = field(default_factory=deque)
    ready_at: float = 0.0


class Machine:
    """One device's lanes, the training thread and the update thread.

    Everything runs on the calling thread, deterministically: `thread` says as which one.

    Args:
        seed: of every time that is drawn.
        detector: told of every access.
    """

    def __init__(self, seed: int, detector: Detector) -> None:
        self.random = Random(seed)
        self.detector = detector
        self.now = 0.0
        self.thread = TRAINING
        self.task = "construction"
        self.current_stream: Stream = Lane.COMPUTE
        self.beside: Callable[[], bool] = lambda: False
        self._in_action = False
        self._host_pace = self.random.choice([0.0, 0.0, 0.1, 1.0, 10.0])
        self._queues: dict[Stream, _Queue] = {
            stream: _Queue(10 ** self.random.uniform(-1.0, 1.5)) for stream in STREAMS
        }
        self._seen: Clock = (0,) * len(ACTORS)
        self._clocks: dict[str, Clock] = {actor: (0,) * len(ACTORS) for actor in ACTORS}

    # What is ordered.

    def release(self) -> Clock:
        """Return what is ordered before now on this thread; what it does next is not in it."""
        clock = self._clocks[self.thread]
        self._clocks[self.thread] = _ticked(clock, self.thread)
        return clock

    def join(self, clock: Clock) -> None:
        """Order what this thread does from now on after `clock`."""
        self._clocks[self.thread] = _joined(self._clocks[self.thread], clock)

    def touch(
        self, name: str, reads: Iterable[torch.Tensor] = (), writes: Iterable[torch.Tensor] = ()
    ) -> None:
        """Note accesses of this thread itself."""
        self.detector.access(self.thread, self._clocks[self.thread], name, reads, writes)

    # What is queued.

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
            after: host work that is ordered before this work, but not before what follows it on the
                lane; else that is all of this thread, and before both.
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
        """Return the point after all that is queued on a lane."""
        self.elapse()
        clock = _joined(self._clocks[lane.value], self.release())
        self._clocks[lane.value] = clock
        event = SimulatedEvent(self, clock)
        self._queues[lane].items.append(event)
        return event

    def wait(self, lane: Stream, event: SimulatedEvent) -> None:
        """Let what is queued on a lane from now on begin after `event`."""
        self.elapse()
        clock = _joined(self._clocks[lane.value], self.release())
        self._clocks[lane.value] = _joined(clock, event.clock)
        self._queues[lane].items.append((event,))

    # What happens.

    def elapse(self) -> None:
        """Let some time go by on the host, in which lanes and the update thread may get on."""
        if self._in_action or self._host_pace == 0.0:
            return
        until = self.now + self.random.expovariate(1.0) * self._host_pace
        while self._first_end() <= until:
            self.advance()
        self.now = max(self.now, until)
        if self.thread == TRAINING and self.random.random() < 0.2:
            self.beside()

    def advance(self) -> bool:
        """Do the work that ends first; tell whether there was any."""
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
        """Do everything that is queued."""
        while self.advance():
            pass
        assert not any(queue.items for queue in self._queues.values())

    def freed_at(self) -> Clock:
        """Return what is ordered before memory that is freed now is used again on COMPUTE.

        The allocator of a device orders by nothing but the host's own order and that lane's.
        """
        if self._in_action:
            return (0,) * len(ACTORS)
        return _joined(self._clocks[self.thread], self._seen)

    def saw(self, event: SimulatedEvent) -> None:
        """Hear that the host has looked and found an event reached.

        It frees memory by that. For the order of tasks it does not count: another time the same
        look finds nothing.
        """
        self._seen = _joined(self._seen, event.clock)

    def _do(self, work: _Work) -> None:
        self._in_action = True
        try:
            work.action()
            del work.action  # what it holds may be freed while it counts as the lane's doing
        finally:
            self._in_action = False

    def _first_end(self) -> float:
        """Return when the next work ends, infinity where there is none."""
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
        """Pass the events at a queue's head; tell whether there were any."""
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
