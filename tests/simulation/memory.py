"""Memory of the simulated machine that is filled with NaN as soon as it is freed."""

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
    """The allocator of the simulated autograd's gradients.

    When the last reference to a tensor is dropped, its memory is filled with NaN. On a device this
    follows the rule of a caching allocator: the memory is reused in the order of the stream that
    was current at the allocation, also if another stream or lane has not read it yet.

    Owns: every byte until the end, so that an address never refers to other memory.
    """

    def __init__(self, machine: Machine, *, on_device: bool) -> None:
        self._machine = machine
        self._on_device = on_device
        self._free: defaultdict[tuple[Stream, int], list[bytearray]] = defaultdict(list)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor with undefined content, on a device for the current stream."""
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
    """A pool that fills its slots with NaN when they are released.

    The host's work after `acquire` is ordered after its work before the `release` of the same slot.
    On a device the next user of a slot is work on COMPUTE. If COMPUTE is two streams, the slot is
    not filled; instead the detector compares its next use with its last one.
    """

    def __init__(self, machine: Machine, *, on_device: bool, two_streams: bool) -> None:
        super().__init__()
        self._machine = machine
        self._on_device = on_device
        self._two_streams = two_streams
        self._released_at: dict[int, Clock] = {}

    def acquire(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a slot, ordered after the host's work before its release."""
        slot = super().acquire(numel, dtype, device)
        released_at = self._released_at.pop(slot.data_ptr(), None)
        if released_at is not None:
            self._machine.join(released_at)
        return slot

    def release(self, slot: torch.Tensor) -> None:
        """Return a slot to the pool; no one may read it any more."""
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
