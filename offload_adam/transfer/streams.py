"""Where copies and collectives run: one object a device owns its streams and what is in flight.

`wait` is stream on stream and costs the host nothing; `synchronize` blocks the calling thread. The
two words never mix.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from offload_adam.layout.schedule import Lane


class Mark(Protocol):
    """A point in a lane's work."""

    def query(self) -> bool:
        """Tell, without waiting, whether the work up to it is over."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until it is."""
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
        """Issue what `action` issues on a lane, behind all that the lane has and waits for.

        Args:
            reads, writes: the tensors that it touches. They are held until it is over, so that no
                allocator gives their memory away.
        """
        ...

    def mark(self, lane: Lane) -> Mark:
        """Return the point after all that has been issued on a lane."""
        ...

    def wait(self, lane: Lane, mark: Mark) -> None:
        """Let what is issued on a lane from now on begin after `mark`."""
        ...

    def synchronize(self, mark: Mark) -> None:
        """Block the calling thread until the work before `mark` is over."""
        ...


class _Done:
    """The mark of work that is over when it has been issued."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


DONE = _Done()


class HostStreams:
    """Lanes of parameters in host memory: what is launched is done at once."""

    def launch(
        self,
        lane: Lane,
        action: Callable[[], object],
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
    ) -> None:
        """Do it."""
        action()

    def mark(self, lane: Lane) -> Mark:
        """Return a point that is behind us."""
        return DONE

    def wait(self, lane: Lane, mark: Mark) -> None:
        """Return: whatever the mark stands for is over."""

    def synchronize(self, mark: Mark) -> None:
        """Block until the mark is reached."""
        mark.synchronize()


class _Held(NamedTuple):
    """Tensors that work before `mark` touches."""

    mark: Mark
    tensors: list[torch.Tensor]


class CudaStreams:
    """The CUDA streams of one device.

    A tensor from torch's allocator that another stream than its own reads is held here until the
    event after that reading, instead of being recorded with the allocator: it is freed at the first
    look after the event, not when the allocator comes by.

    Owns: one stream for each lane but COMPUTE and UPDATE, and every tensor in flight.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        lanes = (Lane.REDUCE, Lane.DOWN, Lane.UP, Lane.GATHER)
        self._streams = {lane: torch.cuda.Stream(device) for lane in lanes}
        self._unmarked: dict[Lane, list[torch.Tensor]] = {lane: [] for lane in Lane}
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
        """Issue it on the lane's stream."""
        # The device first: on leaving, a thread that has never used this device would else be left
        # with a context on the first one, half a GiB for each rank.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream(lane)):
            action()
        if lane is not Lane.COMPUTE:
            with self._lock:
                self._unmarked[lane] += (*reads, *writes)

    def mark(self, lane: Lane) -> Mark:
        """Record an event; let go of what earlier events have freed.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._refuse_capture(lane)
        # Taken before the event, so that it covers them all, whatever other threads issue now.
        with self._lock:
            tensors, self._unmarked[lane] = self._unmarked[lane], []
        # Whoever waits for it on the host sleeps: a thread that spins takes a core from the kernel.
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream(lane))
        with self._lock:
            if tensors:
                self._held[lane].append(_Held(event, tensors))
            for held in self._held.values():
                while held and held[0].mark.query():
                    held.popleft()
        return event

    def _refuse_capture(self, lane: Lane) -> None:
        """Refuse to be captured: a replay would run none of what orders and issues the copies."""
        if lane is Lane.COMPUTE and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and its replays would run no hook of the "
                "optimizer's: capture forward and backward with an optimizer made without module=, "
                "whose step() stays outside of the graph"
            )

    def wait(self, lane: Lane, mark: Mark) -> None:
        """Let the lane's stream wait for the event.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._refuse_capture(lane)
        if isinstance(mark, torch.cuda.Event):
            self._stream(lane).wait_event(mark)

    def synchronize(self, mark: Mark) -> None:
        """Block until the event has happened; other Python threads run meanwhile."""
        mark.synchronize()


class StreamsByDevice:
    """The streams of every device that has parameters, made when first asked for."""

    def __init__(self, make: Callable[[torch.device], Streams]) -> None:
        self._make = make
        self._made: dict[torch.device, Streams] = {}

    def of(self, device: torch.device) -> Streams:
        """Return the streams of one device."""
        streams = self._made.get(device)
        if streams is None:
            streams = self._made[device] = self._make(device)
        return streams


def streams_for(device: torch.device) -> Streams:
    """Return the lanes of a device, or of host memory."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
