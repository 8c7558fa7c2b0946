"""A stand-in for CUDA's runtime that records registrations and checks the rules for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offload_adam.memory.pinning import CudaRuntime

OUT_OF_MEMORY = 2
NOT_REGISTERED = 62
HOST = torch.device("cpu")


class StandInRuntime(CudaRuntime):
    """Pins nothing, but records registrations as a driver would.

    calls: all calls, in order.
    registered: number of bytes by registered address.
    refuse_after: number of registrations that succeed before one fails.
    current: the current device; None for a device on which this process has no context.
    """

    def __init__(self, device: torch.device = HOST, refuse_after: int | None = None) -> None:
        self._device = device
        self._cudart = self
        self.calls: list[str] = []
        self.registered: dict[int, int] = {}
        self.refuse_after = refuse_after
        self.has_error = False
        self.current: torch.device | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned now."""
        return sum(self.registered.values())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        before, self.current = self.current, self._device
        try:
            yield
        finally:
            self.current = before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert self.current == self._device, "this would create a context on the current device"
        self.calls.append(f"register {nbytes}")
        for other, size in self.registered.items():
            assert address + nbytes <= other or other + size <= address, "registered twice"
        if self.refuse_after is not None and len(self.registered) >= self.refuse_after:
            self.has_error = True
            return OUT_OF_MEMORY
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert self.current == self._device, "this would create a context on the current device"
        self.calls.append("unregister")
        if self.registered.pop(address, None) is None:
            self.has_error = True
            return NOT_REGISTERED
        return 0

    def clear_error(self) -> None:
        self.calls.append("clear_error")
        super().clear_error()
        self.has_error = False

    def finish_copies(self) -> None:
        self.calls.append("finish_copies")

    def describe(self, status: int) -> str:
        return f"error {status}"
