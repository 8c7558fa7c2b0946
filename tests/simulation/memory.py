"""Memory of the simulated machine that is worth nothing once it has been given back."""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch

from offload_adam.layout.schedule import Lane
from offload_adam.transfer.slots import SlotPool
from tests.simulation.detector import Clock
from tests.simulation.machine import Machine, Stream


def poison(tensor: torch.Tensor) -> None:
    """Make every element of a tensor NaN."""
    tensor.fill_(float("nan"))


class GradientMemory:
    """What autograd takes gradients from.

    A tensor's memory is free when its last holder lets go, and from then on full of NaN. On the
    host that is after all who held it. That of a device goes by the rule of a caching allocator: it
    is free for work on the stream that was current when it was taken, whatever other streams and
    lanes are still to read.

    Owns: every byte until the end, so that no address comes to stand for something else.
    """

    def __init__(self, machine: Machine, *, on_device: bool) -> None:
        self._machine = machine
        self._on_device = on_device
        self._free: defaultdict[tuple[Stream, int], list[bytearray]] = defaultdict(list)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory with undefined content; that of a device is for the current stream."""
        numel = torch.Size(shape).numel()
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        stream = self._machine.current_stream
        free = self._free[stream, numel * dtype.itemsize]
        memory = free.pop() if free else bytearray(numel * dtype.itemsize)
        lease = memoryview(memory)
        tensor = torch.frombuffer(lease, dtype=dtype)
        weakref.finalize(lease, self._freed, name, memory, dtype, stream).atexit = False
        return tensor.view(shape)

    def _freed(self, name: str, memory: bytearray, dtype: torch.dtype, stream: Stream) -> None:
        again = torch.frombuffer(memory, dtype=dtype)
        name = f"the next use of the memory of {name}"
        self._free[stream, len(memory)].append(memory)
        if self._on_device:
            after = self._machine.freed_at()
            self._machine.launch(stream, lambda: poison(again), name, writes=[again], after=after)
        else:
            poison(again)
        self._machine.detector.forget(again)


class SimulatedSlots(SlotPool):
    """A pool whose slots are worth nothing once released.

    What is done after `acquire` comes after what was done before `release`, by the threads' own
    order: a slot is in the list that both of them use, or it is not. On a device the next to use it
    is work on COMPUTE. Where that is two streams, the next user is compared with the last one
    itself.
    """

    def __init__(self, machine: Machine, *, on_device: bool, two_streams: bool) -> None:
        super().__init__()
        self._machine = machine
        self._on_device = on_device
        self._two_streams = two_streams
        self._released_at: dict[int, Clock] = {}

    def acquire(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a slot, after what the host did before it was released."""
        slot = super().acquire(numel, dtype, device)
        released_at = self._released_at.pop(slot.data_ptr(), None)
        if released_at is not None:
            self._machine.join(released_at)
        return slot

    def release(self, slot: torch.Tensor) -> None:
        """Take it back; all reading must be over."""
        name = "the next use of a slot"
        if self._two_streams:
            self._released_at[slot.data_ptr()] = self._machine.freed_at()
            super().release(slot)
            return
        if self._on_device:
            after = self._machine.freed_at()
            self._machine.launch(
                Lane.COMPUTE, lambda: poison(slot), name, writes=[slot], after=after
            )
        else:
            self._machine.touch(name, writes=[slot])
            poison(slot)
        self._machine.detector.forget(slot)
        super().release(slot)
