"""Copies between host shards and the device: gradients down, updated parameters up."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from offload_adam.memory.arena import HostArena, padded_nbytes

NUM_SLOTS = 2
"""One slot is written by the kernel while the other is on its way to the device."""


class StagingRing:
    """Host buffers in a parameter's own 16-bit format, from which shards go to the device.

    Owns: `NUM_SLOTS` buffers of one dtype, pinned if asked, and the event of each slot's last copy.
    """

    def __init__(self, numel: int, dtype: torch.dtype, *, pin: bool) -> None:
        self._arena = HostArena(NUM_SLOTS * padded_nbytes(numel, dtype), pin=pin)
        self._slots = [self._arena.take(numel, dtype) for _ in range(NUM_SLOTS)]
        self._events: list[torch.cuda.Event | None] = [None] * NUM_SLOTS
        self._next = 0
        self.nbytes = self._arena.nbytes
        self.numel = numel

    def acquire(self, numel: int) -> tuple[int, torch.Tensor]:
        """Return the next slot's number and its first elements, once its last copy is over."""
        index = self._next
        self._next = (index + 1) % NUM_SLOTS
        event = self._events[index]
        if event is not None:
            event.synchronize()
        return index, self._slots[index][:numel]

    def copied(self, index: int, event: torch.cuda.Event | None) -> None:
        """Remember the event after which a copy out of this slot is over."""
        self._events[index] = event


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event at this point of the device's current stream, None for the host."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for_device(devices: Iterable[torch.device]) -> None:
    """Block until everything issued on these devices' current streams is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
