"""Record events and wait for them, between streams and threads, as a schedule plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Lane, Operation, Schedule, Task, plan_schedule
from offload_adam.transfer.streams import Event, Streams

# Pauses between queries of an event. The first is much shorter than a bucket's copy, so that an
# update starts without delay. They double, so that a long wait leaves the core to the kernels, but
# only up to a length that costs a bucket's update of 5 ms little.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2e-5, 2e-4


class StreamWaits:
    """Records an event after each task, and makes other lanes wait for it as the schedule plans.

        lane D2H     [copy of bucket 3] event ----.
        lane UPDATE                               `-> wait, [update of bucket 3] ...

    Nothing else orders the lanes. The lane COMPUTE may be several streams of the model; there
    `wait_for_gradients` and `Streams.launch` make one stream wait for another.

    Attributes:
        schedule: the current schedule; it has no task before `use_schedule`.
        wait_for_update: blocks the calling thread until the update thread has finished a task. An
            update on that thread records no event. The overlapped executor sets it.

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
        """Use another schedule from now on. Events that have been recorded stay valid.

        Args:
            devices: the device of each bucket's parameters, by bucket.
        """
        self.schedule = schedule
        self._devices = devices
        for device in set(devices.values()) - set(self._streams):
            self._streams[device] = self._make_streams(device)

    def streams_of(self, bucket: int) -> Streams:
        """Return the streams of a bucket's device."""
        return self._streams[self._devices[bucket]]

    def current_stream(self, device: torch.device) -> Hashable:
        """Return the calling thread's current stream of a device, None for host memory."""
        streams = self._streams.get(device)  # None if the model was moved to a new device
        return None if streams is None else streams.current()

    def gradients_written(self, bucket: int, stream: Hashable) -> None:
        """Note that a gradient of a bucket has been written on this stream."""
        self._written_on[bucket].add(stream)

    def wait_for_gradients(self, bucket: int, gradients: Iterable[torch.Tensor | None]) -> None:
        """Make the current stream wait for all streams that have written a bucket's gradients.

        Args:
            gradients: the bucket's tensors in `.grad`, which the current stream is about to read.
        """
        # A model may run its parts on several streams. Autograd orders the current stream after the
        # bucket's last gradient only; the earlier ones may still be in flight on other streams.
        streams = self.streams_of(bucket)
        others = self._written_on.pop(bucket, set()) - {streams.current()}
        for stream in others:
            streams.wait(Lane.COMPUTE, streams.record(Lane.COMPUTE, on=stream))
        if others:
            # The gradients' memory belongs to the other streams, whose allocator would reuse it as
            # soon as `.grad` is cleared. So hold it until the current stream has read it.
            reads = [gradient for gradient in gradients if gradient is not None]
            streams.launch(Lane.COMPUTE, lambda: None, reads=reads)

    def forget_gradients(self) -> None:
        """Forget which streams have written gradients that have not been reduced."""
        self._written_on.clear()

    def wait_before(self, operation: Operation, bucket: int) -> None:
        """Make this task's lane wait for all tasks that precede it in the schedule."""
        task = Task(operation, bucket)
        lane = self.schedule.lane_of(task)
        for waited in self.schedule.waits[task]:
            if self.schedule.lane_of(waited) is Lane.UPDATE:
                self.wait_for_update(waited)  # the update runs on the host: no event
                continue
            event = self._events.get(waited)
            if event is None:
                continue  # no step has issued this task yet
            if lane is Lane.UPDATE:
                self._block_until(event)  # the host reads the memory itself
            else:  # the stream waits; the host continues
                self.streams_of(bucket).wait(lane, event)

    def run(
        self,
        operation: Operation,
        bucket: int,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
        waits: bool = True,
    ) -> None:
        """Issue a task on its lane, after the tasks that it waits for, and record an event.

        Args:
            action: issues the work.
            reads, writes: the tensors that the work touches; see `Streams.launch`.
            waits: False if what the task waits for does not apply this time.
        """
        if waits:
            self.wait_before(operation, bucket)
        self.streams_of(bucket).launch(operation.lane, action, reads=reads, writes=writes)
        self.record(operation, bucket)

    def _block_until(self, event: Event) -> None:
        """Block until an event has happened.

        Raises:
            PeerFailedError: a peer failed during the wait.
        """
        # The device may wait for a collective that a dead peer never joins, so the event is polled.
        # In a world of one the thread sleeps until the device wakes it.
        if self._ranks.world_size > 1:
            self._ranks.wait_until(
                event.query, pause_s=_FIRST_PAUSE_S, longest_pause_s=_LONGEST_PAUSE_S
            )
        event.synchronize()

    def block_until_over(self, operation: Operation) -> None:
        """Block the calling thread until all issued tasks of this operation are complete."""
        for bucket in self._devices:
            event = self._events.get(Task(operation, bucket))
            if event is not None:
                self._block_until(event)

    def record(self, operation: Operation, bucket: int) -> None:
        """Record an event for a task that has been issued on its lane."""
        task = Task(operation, bucket)
        self._events[task] = self.streams_of(bucket).record(self.schedule.lane_of(task))

    def is_over(self, operation: Operation, bucket: int) -> bool:
        """Return, without waiting, whether an issued task is complete."""
        return self._events[Task(operation, bucket)].query()

    def record_all(self, operation: Operation, buckets: Iterable[int]) -> None:
        """Record one event on each device for tasks of several buckets that have been issued."""
        events: dict[Streams, Event] = {}
        for bucket in buckets:
            streams = self.streams_of(bucket)
            if streams not in events:
                events[streams] = streams.record(operation.lane)
            self._events[Task(operation, bucket)] = events[streams]
