"""The streams on which copies and collectives run, and the tensors in flight on them.

As in torch, `Streams.wait` makes a stream wait and costs the host nothing, and `Event.synchronize`
blocks the calling thread.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from offload_adam.layout.schedule import Lane

logger = logging.getLogger(__name__)


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

    The lane COMPUTE is the calling thread's current stream, which a model may change while it runs.

    Threads: any may issue work.
    """

    def current(self) -> Hashable:
        """Return the stream that COMPUTE is to the calling thread now, None in host memory.

        Compare it by `==` alone: with torch's streams, both `== None` and `!= None` are False.
        """
        ...

    def reject_capture(self) -> None:
        """Raise an error if the current stream is being captured in a CUDA graph."""
        ...

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

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        """Return the event after all that has been issued on a lane.

        Args:
            on: for COMPUTE a stream that `current` returned; None for the one that is current now.
        """
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

    def current(self) -> Hashable:
        """Return None: there are no streams."""
        return None

    def reject_capture(self) -> None:
        """Return: there is nothing to capture."""

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

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        """Return an event that has happened."""
        return DONE

    def wait(self, lane: Lane, event: Event) -> None:
        """Return at once: every event has happened."""


class _Held(NamedTuple):
    """Tensors that work before `event` touches."""

    event: Event
    tensors: list[torch.Tensor]


Stream = TypeVar("Stream", bound=Hashable)


class DeviceStreams(ABC, Generic[Stream]):
    """The lanes of one device, and the tensors in flight on them.

    Tensors that another stream than their own reads are held here until the event after that work,
    and not by `Tensor.record_stream`: they are freed by the first `record` after that event, and
    not when the allocator next looks. What COMPUTE reads need not be held as long as it is one
    stream: its allocator hands memory out again to work that comes later on that stream.

    Where the model changes its current stream, what is launched on COMPUTE still runs in the order
    in which it is issued: the new stream waits for the one before.

    Owns: every tensor in flight.
    """

    def __init__(self, own: Mapping[Lane, Stream]) -> None:
        """Begin with nothing in flight.

        Args:
            own: one stream for each lane but COMPUTE and UPDATE.
        """
        self._own = own
        self._compute: Stream | None = None
        self._has_several = False  # COMPUTE has been more than one stream
        self._unrecorded: dict[Lane, list[torch.Tensor]] = {lane: [] for lane in Lane}
        self._held: dict[Lane, deque[_Held]] = {lane: deque() for lane in Lane}
        self._lock = threading.Lock()

    @abstractmethod
    def current(self) -> Stream:
        """Return the calling thread's current stream."""

    def reject_capture(self) -> None:
        """Return: no other device than CUDA's captures anything."""

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Call the action with the lane's stream as the current one."""
        reads, writes = list(reads), list(writes)
        self._run(self._enter(lane), action, reads, writes)
        if lane is not Lane.COMPUTE or self._has_several:
            with self._lock:
                self._unrecorded[lane] += (*reads, *writes)

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        """Record an event; drop the tensors whose events have happened."""
        if on is not None:
            self._has_several = True
            return self._record_on(on)  # type: ignore[arg-type]
        stream = self._enter(lane)
        # Taken before the event is recorded: other threads may issue work in between, and the event
        # must come after the work on every tensor that it stands for.
        with self._lock:
            tensors, self._unrecorded[lane] = self._unrecorded[lane], []
        event = self._record_on(stream)
        with self._lock:
            if tensors:
                self._held[lane].append(_Held(event, tensors))
            for held in self._held.values():
                while held and self._has_happened(held[0].event):
                    held.popleft()
        return event

    def wait(self, lane: Lane, event: Event) -> None:
        """Make the lane's stream wait for the event."""
        if lane is not Lane.COMPUTE:
            self._wait_on(self._own[lane], event)
            return
        self.reject_capture()
        self._wait_on(self.current(), event)

    def _enter(self, lane: Lane) -> Stream:
        """Return the lane's stream; a new one of COMPUTE goes on where the last one was left."""
        if lane in self._own:
            return self._own[lane]
        self.reject_capture()
        stream, before = self.current(), self._compute
        self._compute = stream
        if before is not None and not before == stream:  # noqa: SIM201 (see `Streams.current`)
            self._has_several = True
            self._wait_on(stream, self._record_on(before))
        return stream

    @abstractmethod
    def _run(
        self,
        stream: Stream,
        action: Callable[[], object],
        reads: Iterable[torch.Tensor],
        writes: Iterable[torch.Tensor],
    ) -> None:
        """Call the action with this stream as the current one."""

    @abstractmethod
    def _record_on(self, stream: Stream) -> Event:
        """Return the event after all that has been issued on a stream."""

    @abstractmethod
    def _wait_on(self, stream: Stream, event: Event) -> None:
        """Make a stream wait for an event."""

    @abstractmethod
    def _has_happened(self, event: Event) -> bool:
        """Tell, without waiting, whether an event has happened."""


_CAPTURING = ("when stream is capturing", "a previous error during capture")
"""What CUDA says to a thread that asks for an event while another one captures a graph."""
_CAPTURE_PAUSE_S = 1e-3
_SPOILED = (
    "a CUDA graph was being captured while the optimizer waited for work on the GPU. That goes on, "
    "but CUDA gives the capture up: call synchronize() on the optimizer before the capture"
)


class CudaEvent:
    """A CUDA event that any thread can wait for, also while another one captures a graph.

    CUDA forbids this, and the capture is lost. The work before the event goes on all the same.
    """

    _has_warned = False

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Record the event; a host thread that waits for it sleeps.

        One that spins would take a core from the kernels.
        """
        self.event = torch.cuda.Event(blocking=True)
        self.event.record(stream)
        # torch asks for an event with the thread's current device: a thread that has never used
        # one, as the update thread, would make a context on device 0.
        self._device = stream.device

    def query(self) -> bool:
        """Return, without waiting, whether the work before it is over; not during a capture."""
        try:
            with torch.cuda.device(self._device):
                return bool(self.event.query())
        except RuntimeError as error:
            self._outlast_capture(error)
            return False

    def synchronize(self) -> None:
        """Block the calling thread until the work before it, and any other's capture, is over.

        Raises:
            RuntimeError: this thread itself is capturing, and would wait for ever.
        """
        while True:
            try:
                with torch.cuda.device(self._device):
                    self.event.synchronize()
                return
            except RuntimeError as error:
                self._outlast_capture(error)
                time.sleep(_CAPTURE_PAUSE_S)

    def _outlast_capture(self, error: RuntimeError) -> None:
        """Say once what to do about another thread's capture; raise any other error."""
        if not any(text in str(error) for text in _CAPTURING):
            raise error
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(_SPOILED) from error
        if not CudaEvent._has_warned:
            CudaEvent._has_warned = True
            logger.error(_SPOILED)


class CudaStreams(DeviceStreams[torch.cuda.Stream]):
    """The CUDA streams of one device.

    Raises:
        RuntimeError: by what uses COMPUTE while a CUDA graph is being captured.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the streams."""
        lanes = (Lane.REDUCE, Lane.D2H, Lane.H2D, Lane.GATHER)
        super().__init__({lane: torch.cuda.Stream(device) for lane in lanes})
        self._device = device

    def current(self) -> torch.cuda.Stream:
        """Return the calling thread's current stream."""
        return torch.cuda.current_stream(self._device)

    def _run(
        self,
        stream: torch.cuda.Stream,
        action: Callable[[], object],
        reads: Iterable[torch.Tensor],
        writes: Iterable[torch.Tensor],
    ) -> None:
        # The device comes first. Otherwise a thread that has never used this device would be left
        # with a context on device 0, which takes half a GiB for each rank.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            action()

    def _record_on(self, stream: torch.cuda.Stream) -> Event:
        return CudaEvent(stream)

    def _wait_on(self, stream: torch.cuda.Stream, event: Event) -> None:
        if isinstance(event, CudaEvent):
            stream.wait_event(event.event)

    def _has_happened(self, event: Event) -> bool:
        return event.query()

    def reject_capture(self) -> None:
        """Raise during a capture: a replay would not run the hooks that wait and issue copies.

        Raises:
            RuntimeError: saying what to do before the capture.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and its replays would run no hook of the "
                "optimizer's. To capture a forward alone, call synchronize() on the optimizer "
                "before. To capture forward and backward, make the optimizer without module=, and "
                "keep its step() outside of the graph"
            )


def streams_for(device: torch.device) -> Streams:
    """Return the lanes of a device, or of host memory."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
