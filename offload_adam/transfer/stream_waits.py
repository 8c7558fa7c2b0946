"""Carry out the waits of a schedule between lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from offload_adam.layout.schedule import Lane, Operation, Schedule, Task
from offload_adam.transfer.streams import Event, Streams

HostWait = Callable[[Task], None]
"""Blocks the calling thread until a task of the update thread is over, if there is one."""

EventWait = Callable[[Event], None]
"""Blocks the calling thread until an event has happened; raises an error if it never will."""


class StreamWaits:
    """Keeps each task's latest event, and makes other lanes wait for it as the schedule says.

    Nothing else orders lanes: a wait that the schedule lacks is not made.
    """

    def __init__(
        self,
        schedule: Schedule,
        streams: Mapping[int, Streams],
        wait_for_update: HostWait,
        wait_for_event: EventWait,
    ) -> None:
        """Begin with nothing under way.

        Args:
            streams: of each bucket's device.
            wait_for_update: for tasks of the update thread, which record no event.
        """
        self._schedule = schedule
        self._streams = streams
        self._wait_for_update = wait_for_update
        self._wait_for_event = wait_for_event
        self._events: dict[Task, Event] = {}

    def begin(self, operation: Operation, bucket: int) -> None:
        """Let this task's lane wait for all that the task waits for."""
        task = Task(operation, bucket)
        streams = self._streams[bucket]
        lane = self._schedule.lane_of(task)
        for waited in self._schedule.waits[task]:
            if self._schedule.lane_of(waited) is Lane.UPDATE:
                self._wait_for_update(waited)
                continue
            event = self._events.get(waited)
            if event is None:
                continue  # no step has had anything to do for it yet
            if lane is Lane.UPDATE:
                self._wait_for_event(event)
            else:
                streams.wait(lane, event)

    def end(self, operation: Operation, bucket: int) -> None:
        """Remember that this task has been issued."""
        task = Task(operation, bucket)
        self._events[task] = self._streams[bucket].record(self._schedule.lane_of(task))

    def is_over(self, operation: Operation, bucket: int) -> bool:
        """Tell, without waiting, whether this task, which has been issued, is over."""
        return self._events[Task(operation, bucket)].query()

    def end_all(self, operation: Operation, buckets: Iterable[int]) -> None:
        """Remember that this task has been issued for these buckets: one event for each device."""
        events: dict[Streams, Event] = {}
        for bucket in buckets:
            streams = self._streams[bucket]
            if streams not in events:
                events[streams] = streams.record(operation.lane)
            self._events[Task(operation, bucket)] = events[streams]

    def keep_events_of(self, earlier: StreamWaits) -> None:
        """Take over the events of the `StreamWaits` that this one replaces."""
        self._events.update(earlier._events)
