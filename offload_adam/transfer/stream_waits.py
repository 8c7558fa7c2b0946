"""Carry out the waits of a schedule between lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from offload_adam.layout.schedule import Lane, Operation, Schedule, Task
from offload_adam.transfer.streams import Mark, Streams

HostWait = Callable[[Task], None]
"""Blocks the calling thread until a task of the update thread is over, if there is one."""

MarkWait = Callable[[Streams, Mark], None]
"""Blocks the calling thread until a mark is reached; raises an error where it never will be."""


class StreamWaits:
    """Keeps each task's latest mark, and makes other lanes wait for it as the schedule says.

    Nothing else orders lanes: a wait that is missing in the schedule is made by nobody.
    """

    def __init__(
        self,
        schedule: Schedule,
        streams: Mapping[int, Streams],
        wait_for_update: HostWait,
        wait_for_mark: MarkWait,
    ) -> None:
        """Begin with nothing under way.

        Args:
            streams: of each bucket's device.
            wait_for_update: for the tasks that leave no mark since a thread runs them.
        """
        self._schedule = schedule
        self._streams = streams
        self._wait_for_update = wait_for_update
        self._wait_for_mark = wait_for_mark
        self._marks: dict[Task, Mark] = {}

    def begin(self, operation: Operation, bucket: int) -> None:
        """Let this task's lane wait for all that the task waits for."""
        task = Task(operation, bucket)
        streams = self._streams[bucket]
        lane = self._schedule.lane_of(task)
        for waited in self._schedule.waits[task]:
            if self._schedule.lane_of(waited) is Lane.UPDATE:
                self._wait_for_update(waited)
                continue
            mark = self._marks.get(waited)
            if mark is None:
                continue  # no step has had anything to do for it yet
            if lane is Lane.UPDATE:
                self._wait_for_mark(streams, mark)
            else:
                streams.wait(lane, mark)

    def end(self, operation: Operation, bucket: int) -> None:
        """Remember that this task has been issued."""
        task = Task(operation, bucket)
        self._marks[task] = self._streams[bucket].mark(self._schedule.lane_of(task))

    def is_over(self, operation: Operation, bucket: int) -> bool:
        """Tell, without waiting, whether this task, which has been issued, is over."""
        return self._marks[Task(operation, bucket)].query()

    def end_all(self, operation: Operation, buckets: Iterable[int]) -> None:
        """Remember that this task has been issued for all of these, with one mark a device."""
        marks: dict[Streams, Mark] = {}
        for bucket in buckets:
            streams = self._streams[bucket]
            if streams not in marks:
                marks[streams] = streams.mark(operation.lane)
            self._marks[Task(operation, bucket)] = marks[streams]

    def adopt(self, earlier: StreamWaits) -> None:
        """Take over the marks of the `StreamWaits` that this one replaces."""
        self._marks.update(earlier._marks)
