"""Page-lock exactly the requested bytes of host memory for CUDA, and unlock them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

from offload_adam.errors import HostMemoryError
from offload_adam.torch_private import cuda_runtime_functions
from offload_adam.units import format_nbytes

PIECE_NBYTES = 64 * 1024**3
"""Largest number of bytes for one call of cudaHostRegister: some drivers reject larger calls.

No tensor may cross from one piece into the next, because a copy across two registrations fails.
"""


class PinError(HostMemoryError):
    """CUDA did not pin the memory. Pieces pinned before the failure are unpinned again."""


class CudaRuntime:
    """The functions of CUDA's runtime that pinning needs, as torch exposes them.

    A status is a cudaError_t, 0 for success.
    """

    def __init__(self, device: torch.device) -> None:
        """Use one GPU's context for all calls. The memory is then pinned for all GPUs."""
        self._device = device
        self._cudart: Any = cuda_runtime_functions()

    def on_device(self) -> AbstractContextManager[object]:
        """Make the device the calling thread's current device for the body."""
        # CUDA creates a context on the current device if it has none: half a GiB. In a rank that
        # has not called `set_device`, and in every new thread, the current device is GPU 0.
        return torch.cuda.device(self._device)

    def register(self, address: int, nbytes: int) -> int:
        """Page-lock memory and return the status."""
        with self.on_device():
            return int(self._cudart.cudaHostRegister(address, nbytes, 0))

    def unregister(self, address: int) -> int:
        """Unlock the memory that was registered at this address and return the status."""
        with self.on_device():
            return int(self._cudart.cudaHostUnregister(address))

    def clear_error(self) -> None:
        """Clear the error of an earlier call, so that no later call reports it."""
        # torch does not expose cudaGetLastError, and a libcudart that we load ourselves may be a
        # second copy with its own error state. torch calls cudaGetLastError after each kernel
        # launch and raises the error, so one launch clears it.
        with suppress(RuntimeError):
            torch.empty(1, dtype=torch.float32, device=self._device).fill_(0.0)

    def finish_copies(self) -> None:
        """Wait for every device that this process uses: a copy may still use pinned memory."""
        with suppress(RuntimeError):
            for index in range(torch.cuda.device_count()):
                # Synchronizing an unused device would create a context on it, in the memory of
                # the rank that uses this device.
                if torch.cuda.memory_reserved(index) > 0:
                    torch.cuda.synchronize(index)

    def describe(self, status: int) -> str:
        """Return a status as its number and CUDA's error text."""
        error = self._cudart.cudaError(status)
        return f"error {status}, {self._cudart.cudaGetErrorString(error)}"


class Registration:
    """Memory that is page-locked, piece by piece.

    Owns: the registrations with CUDA. The caller owns the memory, which must outlive them.
    Lifecycle: pinned from construction until `release`.
    """

    def __init__(self, runtime: CudaRuntime, pieces: Sequence[tuple[int, int]]) -> None:
        """Pin all pieces, or none.

        Args:
            pieces: (address, bytes) of each.

        Raises:
            PinError: naming the piece, CUDA's error and the limit of locked memory.
        """
        self._runtime = runtime
        self._pid = os.getpid()
        self._addresses: list[int] = []
        self.nbytes = 0
        for number, (address, nbytes) in enumerate(pieces, 1):
            status = runtime.register(address, nbytes)
            if status != 0:
                runtime.clear_error()
                self.release()
                total = format_nbytes(sum(size for _, size in pieces))
                raise PinError(
                    f"CUDA did not pin {total} of host memory ({runtime.describe(status)}; piece "
                    f"{number} of {len(pieces)}, {format_nbytes(nbytes)}). The limit of locked "
                    f"memory (ulimit -l) is {locked_limit()}."
                )
            self._addresses.append(address)
            self.nbytes += nbytes

    def release(self) -> None:
        """Wait for copies in flight and unlock all pieces. Idempotent."""
        addresses, self._addresses, self.nbytes = self._addresses, [], 0
        # A forked child has inherited this object, but not the registrations or a CUDA context.
        if not addresses or os.getpid() != self._pid:
            return
        self._runtime.finish_copies()
        statuses = [self._runtime.unregister(address) for address in reversed(addresses)]
        if any(statuses):  # not an error: at exit the driver may have unlocked the memory already
            self._runtime.clear_error()


def cuda_runtime(device: torch.device) -> CudaRuntime | None:
    """Return the CUDA runtime for a device, None if it is not a CUDA device."""
    return CudaRuntime(device) if device.type == "cuda" else None


def locked_limit() -> str:
    """Return this process's limit of locked memory, as text for a message."""
    try:
        import resource
    except ImportError:  # on Windows
        return "not known"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if limit == resource.RLIM_INFINITY else format_nbytes(limit)
