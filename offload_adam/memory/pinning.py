"""Page-locking of host memory for CUDA, exactly the bytes that are asked for, and its end."""

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
"""Most that is registered at once: one call for all of a large mapping is refused by some drivers,
and a copy may not cross from one registered piece into the next."""


class PinRefusedError(HostMemoryError):
    """CUDA did not pin memory; none of it is pinned then."""


class CudaRuntime:
    """What pinning needs of CUDA's runtime, as far as torch exposes it.

    A status is one of CUDA's error numbers, 0 for success.
    """

    def __init__(self, device: torch.device) -> None:
        """Use CUDA through one GPU. Memory that is pinned through it is pinned for all GPUs."""
        self._device = device
        self._cudart: Any = cuda_runtime_functions()

    def on_device(self) -> AbstractContextManager[object]:
        """Make the device the calling thread's current one for the body.

        CUDA creates a context on the current device, if there is none. Without this, that is GPU 0
        in every rank that has not called `set_device`, and in every new thread: half a GiB each.
        """
        return torch.cuda.device(self._device)

    def register(self, address: int, nbytes: int) -> int:
        """Page-lock memory and return the status."""
        with self.on_device():
            return int(self._cudart.cudaHostRegister(address, nbytes, 0))

    def unregister(self, address: int) -> int:
        """Unlock what was registered at this address and return the status."""
        with self.on_device():
            return int(self._cudart.cudaHostUnregister(address))

    def clear_error(self) -> None:
        """Clear the error of an earlier call, so that no later call reports it.

        torch does not expose cudaGetLastError, and a library that we load ourselves may be another
        copy of the runtime. But torch calls it after each kernel launch and raises the error, so
        one launch clears it.
        """
        with suppress(RuntimeError):
            torch.empty(1, dtype=torch.float32, device=self._device).fill_(0.0)

    def finish_copies(self) -> None:
        """Wait for every device of this process: a copy may still use pinned memory."""
        with suppress(RuntimeError):
            for index in range(torch.cuda.device_count()):
                # A context where there is none would cost memory on a device of another rank.
                if torch.cuda.memory_reserved(index) > 0:
                    torch.cuda.synchronize(index)

    def describe(self, status: int) -> str:
        """Return CUDA's own text for a status."""
        error = self._cudart.cudaError(status)
        return f"error {status}, {self._cudart.cudaGetErrorString(error)}"


class Registration:
    """Memory that is page-locked, piece by piece.

    Owns: the registrations, not the memory, which must outlive them.
    Lifecycle: pinned from construction to the first `release`; further ones do nothing.
    """

    def __init__(self, runtime: CudaRuntime, pieces: Sequence[tuple[int, int]]) -> None:
        """Pin pieces of (address, bytes), all or none.

        Raises:
            PinRefusedError: saying which piece, CUDA's error and the limit of locked memory.
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
                raise PinRefusedError(
                    f"CUDA did not pin {total} of host memory ({runtime.describe(status)}; piece "
                    f"{number} of {len(pieces)}, {format_nbytes(nbytes)}); the limit of locked "
                    f"memory (ulimit -l) is {locked_limit()}"
                )
            self._addresses.append(address)
            self.nbytes += nbytes

    def release(self) -> None:
        """Wait for copies under way and unlock everything. Idempotent.

        A status is of no use here: at exit the driver may have unlocked all of it already. A forked
        child that ends leaves it alone, for neither memory nor driver are its own.
        """
        addresses, self._addresses, self.nbytes = self._addresses, [], 0
        if not addresses or os.getpid() != self._pid:
            return
        self._runtime.finish_copies()
        statuses = [self._runtime.unregister(address) for address in reversed(addresses)]
        if any(statuses):
            self._runtime.clear_error()


def cuda_runtime(device: torch.device) -> CudaRuntime | None:
    """Return CUDA's runtime for copies to and from a device, None if it is not one of CUDA's."""
    return CudaRuntime(device) if device.type == "cuda" else None


def locked_limit() -> str:
    """Return this process's limit of locked memory, for people."""
    try:
        import resource
    except ImportError:  # not on every platform
        return "not known"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if limit == resource.RLIM_INFINITY else format_nbytes(limit)
