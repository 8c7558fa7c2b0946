"""The streams on which copies and collectives run, and the tensors in flight on them.

As in torch, `Streams.wait` makes a stream wait and costs the host nothing, and `Event.synchronize`
blocks the calling thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from offload_adam.layout.schedule import Lane


class Event(Protocol):
    """A point in a lane's work, as `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Return, without waiting, whether the work before it is over."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until the work before it is over."""
        ...


class Streams(Protocol):
    """The lanes of one device.

    Threads: any may issue work; the lane COMPUTE is the calling thread's current stream.
    """

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Call `action` so that what it issues runs on a lane, after all that was issued there.

        Args:
            reads, writes: the tensors that the action touches. They are held until its work is
                over, so that no allocator reuses their memory.
        """
        ...

    def record(self, lane: Lane) -> Event:
        """Return the event after all that has been issued on a lane."""
        ...

    def wait(self, lane: Lane, event: Event) -> None:
        """Make what is issued on a lane from now on wait for `event`."""
        ...


class _Done:
    """The event of work that is over when it has been issued."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


DONE = _Done()


class HostStreams:
    """The lanes of parameters in host memory: an action is over when its launch returns."""

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Call the action."""
        action()

    def record(self, lane: Lane) -> Event:
        """Return an event that has happened."""
        return DONE

    def wait(self, lane: Lane, event: Event) -> None:
        """Return at once: every event has happened."""


class _Held(NamedTuple):
    """Tensors that work before `event` touches."""

    event: Event
    tensors: list[torch.Tensor]


class CudaStreams:
    """The CUDA streams of one device.

    Tensors that another stream than their own reads are held here until the event after that work,
    and not by `Tensor.record_stream`: they are freed by the first `record` after that event, and
    not when the allocator next looks.

    Owns: one stream for each lane but COMPUTE and UPDATE, and every tensor in flight.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        lanes = (Lane.REDUCE, Lane.D2H, Lane.H2D, Lane.GATHER)
        self._streams = {lane: torch.cuda.Stream(device) for lane in lanes}
        self._unrecorded: dict[Lane, list[torch.Tensor]] = {lane: [] for lane in Lane}
        self._held: dict[Lane, deque[_Held]] = {lane: deque() for lane in Lane}
        self._lock = threading.Lock()

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._streams.get(lane) or torch.cuda.current_stream(self._device)

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Call the action with the lane's stream as the current one."""
        # The device comes first. Otherwise a thread that has never used this device would be left
        # with a context on device 0, which takes half a GiB for each rank.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream(lane)):
            action()
        if lane is not Lane.COMPUTE:
            with self._lock:
                self._unrecorded[lane] += (*reads, *writes)

    def record(self, lane: Lane) -> Event:
        """Record an event; drop the tensors whose events have happened.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._reject_capture(lane)
        # Taken before the event is recorded: other threads may issue work in between, and the event
        # must come after the work on every tensor that it stands for.
        with self._lock:
            tensors, self._unrecorded[lane] = self._unrecorded[lane], []
        # A host thread that waits for it sleeps: one that spins takes a core from the kernels.
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream(lane))
        with self._lock:
            if tensors:
                self._held[lane].append(_Held(event, tensors))
            for held in self._held.values():
                while held and held[0].event.query():
                    held.popleft()
        return event

    def _reject_capture(self, lane: Lane) -> None:
        """Raise during a capture: a replay would not run the hooks that issue the copies."""
        if lane is Lane.COMPUTE and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and its replays would run no hook of the "
                "optimizer's: capture forward and backward with an optimizer made without module=, "
                "whose step() stays outside of the graph"
            )

    def wait(self, lane: Lane, event: Event) -> None:
        """Make the lane's stream wait for the event.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._reject_capture(lane)
        if isinstance(event, torch.cuda.Event):
            self._stream(lane).wait_event(event)


def streams_for(device: torch.device) -> Streams:
    """Return the lanes of a device, or of host memory."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
