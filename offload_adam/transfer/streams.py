"""The streams on which copies and collectives run, and the tensors in flight on them.

As in torch, `Streams.wait` makes a stream wait and does not block the host. `Event.synchronize`
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
    """A point in a lane's work, like a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Return, without waiting, whether the work before the event is complete."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until the work before the event is complete."""
        ...


class Streams(Protocol):
    """The lanes of one device.

        lane       stream                                 work
        COMPUTE    the calling thread's current stream    forward, backward, packing gradients
        REDUCE     ours                                   reduce-scatter of gradients
        D2H, H2D   ours, one each                         copies of gradients and parameters
        GATHER     ours                                   all-gather of parameters
        UPDATE     none: a host thread                    Adam update

    The model may change its current stream while it runs.

    Threads: any thread may issue work.
    """

    def current(self) -> Hashable:
        """Return the calling thread's current stream, None for host memory.

        Compare streams with `==` only: for torch's streams, both `== None` and `!= None` are False.
        """
        ...

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured in a CUDA graph."""
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
        """Call `action` with the lane's stream as the current one.

        The work that it issues runs after all earlier work of the lane.

        Args:
            reads, writes: the tensors that the work touches. They are held until it is complete, so
                that no allocator reuses their memory.
        """
        ...

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        """Return an event after all work that has been issued on a lane.

        Args:
            on: for COMPUTE, a stream from `current`; None for the stream that is current now.
        """
        ...

    def wait(self, lane: Lane, event: Event) -> None:
        """Make all work that is issued on a lane from now on wait for `event`."""
        ...


class _Done:
    """An event that has always happened, for work on host memory."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


DONE = _Done()


class HostStreams:
    """The lanes of parameters in host memory: work is complete when `launch` returns."""

    def current(self) -> Hashable:
        """Return None: there are no streams."""
        return None

    def is_capturing(self) -> bool:
        """Return False: there is nothing to capture."""
        return False

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

    CUDA's caching allocator orders the reuse of memory only on the stream that allocated it. So a
    tensor that is used on another stream is held here until an event after that use has happened.
    The first `record` after that drops it, sooner than `Tensor.record_stream` would free it.

    Work on COMPUTE runs in the order in which it is issued. If the model changes its current
    stream, the new stream waits for the previous one.

    Owns: every tensor in flight.
    """

    def __init__(self, own: Mapping[Lane, Stream]) -> None:
        """Start with nothing in flight.

        Args:
            own: a stream for each lane except COMPUTE and UPDATE.
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

    def is_capturing(self) -> bool:
        """Return False: only CUDA devices capture graphs."""
        return False

    def reject_capture(self) -> None:
        """Do nothing: only CUDA devices capture graphs."""

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
        # As long as COMPUTE is one stream, its own allocator orders the reuse of memory.
        if lane is not Lane.COMPUTE or self._has_several:
            with self._lock:
                self._unrecorded[lane] += (*reads, *writes)

    def record(self, lane: Lane, *, on: Hashable = None) -> Event:
        """Record an event, and release the tensors whose events have happened."""
        if on is not None:  # a stream that is not the current one: COMPUTE has several
            self._has_several = True
            return self._record_on(on)  # type: ignore[arg-type]
        stream = self._enter(lane)
        # Take the tensors before recording the event. In between, another thread may issue work and
        # add its tensors; the event may come before that work, so it must not release them.
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
        """Return the lane's stream. If COMPUTE has a new one, make it wait for the previous one."""
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
        """Return an event after all work that has been issued on a stream."""

    @abstractmethod
    def _wait_on(self, stream: Stream, event: Event) -> None:
        """Make a stream wait for an event."""

    @abstractmethod
    def _has_happened(self, event: Event) -> bool:
        """Return, without waiting, whether an event has happened."""


# Parts of CUDA's errors for a thread that queries an event while another thread captures a graph.
# torch raises them as RuntimeError without an error code.
_CAPTURING = ("when stream is capturing", "a previous error during capture")
# Between two attempts to wait while another thread captures.
_CAPTURE_PAUSE_S = 1e-3
_CAPTURE_INVALIDATED = (
    "A CUDA graph was being captured while the optimizer waited for work on the GPU. The "
    "optimizer's work continues, but CUDA invalidates the capture. Call synchronize() on the "
    "optimizer before the capture."
)


class CudaEvent:
    """A CUDA event that any thread can wait for, also while another thread captures a graph.

    CUDA forbids such a wait and invalidates the capture. The work before the event still completes.
    """

    _has_warned = False

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Record the event on a stream."""
        # Blocking: a host thread that waits sleeps. By default it spins and takes a core from the
        # update's kernels.
        self.event = torch.cuda.Event(blocking=True)
        self.event.record(stream)
        # torch queries an event on the thread's current device. A thread that has never set one,
        # such as the update thread, would create a context on device 0.
        self._device = stream.device

    def query(self) -> bool:
        """Return, without waiting, whether the work before the event is complete.

        Returns False while another thread captures a graph.
        """
        try:
            with torch.cuda.device(self._device):
                return bool(self.event.query())
        except RuntimeError as error:
            self._outlast_capture(error)
            return False

    def synchronize(self) -> None:
        """Block the calling thread until the work before the event is complete.

        If another thread captures a graph, wait until its capture has ended, too.

        Raises:
            RuntimeError: this thread itself is capturing, so the wait would never end.
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
        """Log once what to do about another thread's capture; raise any other error."""
        if not any(text in str(error) for text in _CAPTURING):
            raise error
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(_CAPTURE_INVALIDATED) from error
        if not CudaEvent._has_warned:
            CudaEvent._has_warned = True
            logger.error(_CAPTURE_INVALIDATED)


class CudaStreams(DeviceStreams[torch.cuda.Stream]):
    """The CUDA streams of one device.

    Methods that use COMPUTE raise a RuntimeError while a CUDA graph is being captured.
    """

    def __init__(self, device: torch.device) -> None:
        """Create the streams."""
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
        # Set the device first. Leaving `torch.cuda.stream` restores the previous stream. In a
        # thread that has never set a device, this creates a context on device 0: half a GiB a rank.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            action()

    def _record_on(self, stream: torch.cuda.Stream) -> Event:
        return CudaEvent(stream)

    def _wait_on(self, stream: torch.cuda.Stream, event: Event) -> None:
        if isinstance(event, CudaEvent):
            stream.wait_event(event.event)

    def _has_happened(self, event: Event) -> bool:
        return event.query()

    def is_capturing(self) -> bool:
        """Return whether the current stream is being captured in a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def reject_capture(self) -> None:
        """Raise an error if the current stream is being captured in a CUDA graph.

        Raises:
            RuntimeError: saying what to do before the capture.
        """
        # A replay does not run Python hooks, which wait for buckets and issue copies.
        if self.is_capturing():
            raise RuntimeError(
                "A CUDA graph is being captured, and its replays would not run the optimizer's "
                "hooks. To capture a forward alone, call synchronize() on the optimizer before the "
                "capture. To capture forward and backward, construct the optimizer without "
                "module=, and call step() outside the graph."
            )


def streams_for(device: torch.device) -> Streams:
    """Return the lanes of a device, or of host memory."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
