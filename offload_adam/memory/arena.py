"""One anonymous mapping for all of a rank's state, cut into tensors that each have a storage."""

from __future__ import annotations

import logging
import mmap
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch

from offload_adam.errors import HostMemoryError
from offload_adam.layout.budget import ALIGNMENT_NBYTES
from offload_adam.layout.flat import align
from offload_adam.memory.pinning import (
    PIECE_NBYTES,
    CudaRuntime,
    PinRefusedError,
    Registration,
)
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it.

Touch = Callable[[torch.Tensor], None]
"""Writes to every page of (n,) uint8, each from the thread that will update it."""


class HostArena:
    """Host memory of one fixed size, given out from its start to its end.

    Owns: an anonymous private mapping, backed by huge pages where the kernel grants them (private,
        because shared mappings get none by default), and what pins it.
    Lifecycle: its pages are present from construction on. The bytes live as long as any tensor
        taken from them. They are pinned from `pin` until `close` or this object's collection: the
        owner keeps it, and closes it at the interpreter's exit too.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        parts: Iterable[int] = (),
        touch: Touch | None = None,
        survives_fork: bool = False,
        piece_nbytes: int = PIECE_NBYTES,
    ) -> None:
        """Map and commit `nbytes`.

        Args:
            nbytes: capacity: the sum of `padded_nbytes` of all that is taken, or, where that is
                more than a piece, `arena_nbytes`.
            parts: bytes of what will be taken, in order; only `touch` looks at them.
            touch: commits each part in turn; None to commit all from the calling thread, which is
                faster, and right where all memory is equally near.
            survives_fork: keep the mapping in forked children. State is kept out of them: a forked
                data loader must not copy it.
            piece_nbytes: bytes that are pinned at once; nothing that is taken crosses them.

        Raises:
            HostMemoryError: the kernel does not grant that much.
        """
        self.nbytes = nbytes
        self._used_nbytes = 0
        self._piece_nbytes = piece_nbytes
        self._unpin: weakref.finalize[[], HostArena] | None = None
        self._registration: Registration | None = None
        self._mapping: mmap.mmap | None = None
        if nbytes == 0:
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
        if touch is None:
            self._commit()
        else:
            everything = torch.frombuffer(self._mapping, dtype=torch.uint8)
            for start, end in _places(parts, piece_nbytes):
                touch(everything[start:end])

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the next `numel` elements as a zeroed 1-d tensor with a storage of its own.

        A storage of its own means that saving or copying the tensor touches its bytes only.
        """
        if numel == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        nbytes = padded_nbytes(numel, dtype)
        offset = _place(self._used_nbytes, nbytes, self._piece_nbytes)
        self._used_nbytes = offset + nbytes
        if self._mapping is None or self._used_nbytes > self.nbytes:
            raise AssertionError(f"arena of {self.nbytes} bytes asked for {self._used_nbytes}")
        return torch.frombuffer(self._mapping, dtype=dtype, count=numel, offset=offset)

    @property
    def pinned_nbytes(self) -> int:
        """Bytes that are page-locked now: all or none."""
        return 0 if self._registration is None else self._registration.nbytes

    def pin(self, runtime: CudaRuntime) -> None:
        """Page-lock exactly this mapping; torch rounds its own pinned blocks up to powers of two.

        After the pages are committed, for pinning would commit them from the calling thread.

        Raises:
            PinRefusedError: with what stood in the way; the arena works on, unpinned.
        """
        if self._mapping is None or self._registration is not None:
            return
        address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        pieces = [
            (address + start, min(self._piece_nbytes, self.nbytes - start))
            for start in range(0, self.nbytes, self._piece_nbytes)
        ]
        self._registration = Registration(runtime, pieces)
        self._unpin = weakref.finalize(self, self._registration.release)
        # At exit, finalizers run latest first: this one would run before that of the owner, which
        # waits for the threads and copies that use the memory.
        self._unpin.atexit = False

    def pin_or_warn(self, runtime: CudaRuntime, otherwise: str) -> None:
        """Pin, or warn of what stood in the way and what happens instead."""
        try:
            self.pin(runtime)
        except PinRefusedError as error:
            warnings.warn(f"{error}. {otherwise}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Unpin, and give up the arena's own hold on the bytes. Idempotent."""
        if self._unpin is not None:
            self._unpin()
        self._mapping = None

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
            torch.frombuffer(self._mapping, dtype=torch.uint8).zero_()


def close_all(arenas: Iterable[HostArena]) -> None:
    """Close arenas; those that were added since are among them."""
    for arena in arenas:
        arena.close()


_LEFT: list[HostArena] = []


def leave_all(arenas: Iterable[HostArena]) -> None:
    """Leave arenas mapped and pinned until the process ends: something may still use them."""
    _LEFT.extend(arenas)


def padded_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Return the bytes that `take` uses up for these elements."""
    return align(numel * dtype.itemsize, ALIGNMENT_NBYTES)


def arena_nbytes(parts: Iterable[int], piece_nbytes: int = PIECE_NBYTES) -> int:
    """Return the capacity for what will be taken: the sum, and less than a part for each piece."""
    return max((end for _, end in _places(parts, piece_nbytes)), default=0)


def _places(parts: Iterable[int], piece_nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield where each part will lie."""
    end = 0
    for nbytes in parts:
        if nbytes > 0:
            start = _place(end, nbytes, piece_nbytes)
            end = start + align(nbytes, ALIGNMENT_NBYTES)
            yield start, end


def _place(offset: int, nbytes: int, piece_nbytes: int) -> int:
    """Return where a part may start: it lies in one piece, unless it is larger than that."""
    room = piece_nbytes - offset % piece_nbytes
    return offset if nbytes <= room else offset + room
