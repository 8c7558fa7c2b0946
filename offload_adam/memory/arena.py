"""One anonymous mapping for all of a rank's state, cut into tensors that each have a storage."""

from __future__ import annotations

import logging
import mmap
import weakref

import torch

from offload_adam.errors import HostMemoryError
from offload_adam.layout.flat import align
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)

ALIGNMENT_NBYTES = 128
"""Every tensor starts at a multiple of this, so that no vector load crosses a cache line."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it.


class HostArena:
    """Host memory of one fixed size, given out from its start to its end.

    Owns: an anonymous private mapping, backed by huge pages where the kernel grants them (private,
    because shared mappings get none by default), committed at construction.
    Lifecycle: the bytes live as long as any tensor taken from them, and are pinned as long
        as this object lives: whoever takes tensors keeps it. Never returns or moves bytes.
    """

    def __init__(self, nbytes: int, *, pin: bool = False, survives_fork: bool = False) -> None:
        """Map and commit `nbytes`.

        Args:
            nbytes: capacity, including what `take` adds for alignment (`padded_nbytes`).
            pin: register the mapping with CUDA, exactly its bytes.
            survives_fork: keep the mapping in forked children. State is kept out of them: a forked
                data loader must not copy it.

        Raises:
            HostMemoryError: the kernel does not grant that much, or CUDA does not pin it.
        """
        self.nbytes = nbytes
        self._used_nbytes = 0
        if nbytes == 0:
            self._mapping = None
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._mapping = mmap.mmap(-1, nbytes, flags=flags)
        except OSError as error:
            raise HostMemoryError(
                f"{format_nbytes(nbytes)} of host memory cannot be mapped: {error.strerror}"
            ) from error
        self._advise("MADV_HUGEPAGE")
        if not survives_fork:
            self._advise("MADV_DONTFORK")
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._commit()
        if pin:
            self._pin()

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the next `numel` elements as a zeroed 1-d tensor with a storage of its own.

        A storage of its own means that saving or copying the tensor touches its bytes only.
        """
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        offset = self._used_nbytes
        self._used_nbytes = offset + padded_nbytes(numel, dtype)
        if self._mapping is None or self._used_nbytes > self.nbytes:
            raise AssertionError(f"arena of {self.nbytes} bytes asked for {self._used_nbytes}")
        return torch.frombuffer(self._mapping, dtype=dtype, count=numel, offset=offset)

    def _advise(self, name: str) -> None:
        """Give the kernel a hint where this platform has it."""
        advice = getattr(mmap, name, None)
        if advice is None or self._mapping is None:
            return
        try:
            self._mapping.madvise(advice)
        except OSError as error:
            logger.debug("%s refused: %s", name, error)

    def _commit(self) -> None:
        """Make every page present now, so that no later step pays for it or fails on it."""
        assert self._mapping is not None
        try:
            self._mapping.madvise(_MADV_POPULATE_WRITE)
        except OSError:
            self._bytes.zero_()

    def _pin(self) -> None:
        """Page-lock exactly this mapping; torch rounds its pinned blocks to powers of two."""
        runtime = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(self._bytes.data_ptr(), self.nbytes, 0))
        if status != 0:
            raise HostMemoryError(
                f"CUDA could not pin {format_nbytes(self.nbytes)} of host memory (error {status}): "
                "raise the locked-memory limit (ulimit -l) or pass pin_memory=False"
            )
        # Not at exit: the driver may be gone by then, and takes its registrations with it.
        weakref.finalize(self, runtime.cudaHostUnregister, self._bytes.data_ptr()).atexit = False


def padded_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Return the bytes that `take` uses up for these elements."""
    return align(numel * dtype.itemsize, ALIGNMENT_NBYTES)
