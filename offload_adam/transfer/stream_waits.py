"""Carry out the waits of a schedule between streams and threads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Lane, Operation, Schedule, Task, plan_schedule
from offload_adam.transfer.streams import Event, Streams

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2e-5, 1e-3


class StreamWaits:
    """Records an event after each task, and lets other lanes wait for it as the schedule says.

    Nothing else orders lanes. Within COMPUTE, where the model may use several streams, these are
    ordered by `wait_for_gradients` and by `Streams.launch`.

    Attributes:
        schedule: the schedule in force; it has no task before `use_schedule`.
        wait_for_update: blocks the calling thread until an update that runs beside it is over. Such
            an update leaves no event. Set by what gives updates to another thread.

    Owns: the streams of every device that has parameters.
    """

    def __init__(self, ranks: RankGroup, make_streams: Callable[[torch.device], Streams]) -> None:
        self._ranks = ranks
        self._make_streams = make_streams
        self.wait_for_update: Callable[[Task], None] = lambda task: None
        self.schedule: Schedule = plan_schedule([], num_reduce_slots=1, num_staging_slots=1)
        self._streams: dict[torch.device, Streams] = {}
        self._devices: Mapping[int, torch.device] = {}
        self._events: dict[Task, Event] = {}
        self._written_on: defaultdict[int, set[Hashable]] = defaultdict(set)

    def use_schedule(self, schedule: Schedule, devices: Mapping[int, torch.device]) -> None:
        """Go on with a schedule for these buckets. Events that have been recorded stay.

        Args:
            devices: of each bucket's parameters.
        """
        self.schedule = schedule
        self._devices = devices
        for device in set(devices.values()) - set(self._streams):
            self._streams[device] = self._make_streams(device)

    def streams_of(self, bucket: int) -> Streams:
        """Return the streams of a bucket's device."""
        return self._streams[self._devices[bucket]]

    def current_stream(self, device: torch.device) -> Hashable:
        """Return the calling thread's current stream of a device, None in host memory."""
        streams = self._streams.get(device)  # none where the model was moved meanwhile
        return None if streams is None else streams.current()

    def gradients_written(self, bucket: int, stream: Hashable) -> None:
        """Note that gradients of a bucket have been written on this stream."""
        self._written_on[bucket].add(stream)

    def wait_for_gradients(self, bucket: int, gradients: Iterable[torch.Tensor | None]) -> None:
        """Make the current stream wait for the others on which a bucket's gradients were written.

        The model may run its parts on several streams, and only the one on which the bucket's last
        gradient was written has waited for that.

        Args:
            gradients: what `.grad` still holds. It is kept until the current stream has read it, as
                to copy it in another memory order: it goes back to another stream's allocator.
        """
        streams = self.streams_of(bucket)
        others = self._written_on.pop(bucket, set()) - {streams.current()}
        for stream in others:
            streams.wait(Lane.COMPUTE, streams.record(Lane.COMPUTE, on=stream))
        if others:
            reads = [gradient for gradient in gradients if gradient is not None]
            streams.launch(Lane.COMPUTE, lambda: None, reads=reads)

    def forget_gradients(self) -> None:
        """Forget where gradients that have not left were written."""
        self._written_on.clear()

    def wait_before(self, operation: Operation, bucket: int) -> None:
        """Let this task's lane wait for all that the task waits for."""
        task = Task(operation, bucket)
        lane = self.schedule.lane_of(task)
        for waited in self.schedule.waits[task]:
            if self.schedule.lane_of(waited) is Lane.UPDATE:
                self.wait_for_update(waited)
                continue
            event = self._events.get(waited)
            if event is None:
                continue  # no step has had anything to do for it yet
            if lane is Lane.UPDATE:
                self._block_until(event)
            else:
                self.streams_of(bucket).wait(lane, event)

    def run(
        self,
        operation: Operation,
        bucket: int,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Issue a task on its lane, after all that it waits for, and record an event after it.

        Args:
            action: issues the work.
            reads, writes: the tensors that it touches; see `Streams.launch`.
        """
        self.wait_before(operation, bucket)
        self.streams_of(bucket).launch(operation.lane, action, reads=reads, writes=writes)
        self.record(operation, bucket)

    def _block_until(self, event: Event) -> None:
        """Block until an event has happened, and raise an error if a peer fails meanwhile.

        The device may wait for a collective that a dead peer never joins, so the event is polled.
        In a world of one the thread sleeps until the device wakes it.
        """
        if self._ranks.world_size > 1:
            self._ranks.wait_until(
                event.query, pause_s=_FIRST_PAUSE_S, longest_pause_s=_LONGEST_PAUSE_S
            )
        event.synchronize()

    def block_until_over(self, operation: Operation) -> None:
        """Block the calling thread until all tasks of this kind that have been issued are over."""
        for bucket in self._devices:
            event = self._events.get(Task(operation, bucket))
            if event is not None:
                self._block_until(event)

    def record(self, operation: Operation, bucket: int) -> None:
        """Record an event: this task has been issued."""
        task = Task(operation, bucket)
        self._events[task] = self.streams_of(bucket).record(self.schedule.lane_of(task))

    def is_over(self, operation: Operation, bucket: int) -> bool:
        """Tell, without waiting, whether this task, which has been issued, is over."""
        return self._events[Task(operation, bucket)].query()

    def record_all(self, operation: Operation, buckets: Iterable[int]) -> None:
        """Record that this task has been issued for all of these, with one event a device."""
        events: dict[Streams, Event] = {}
        for bucket in buckets:
            streams = self.streams_of(bucket)
            if streams not in events:
                events[streams] = streams.record(operation.lane)
            self._events[Task(operation, bucket)] = events[streams]
