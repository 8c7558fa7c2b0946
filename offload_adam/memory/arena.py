"""One anonymous mapping for all of a rank's state, divided into tensors with their own storages.

    |<------------------ piece ----------------->|<------------------ piece ---- ...
    | tensor 0 | tensor 1 |    tensor 2    |.....| tensor 3 |  tensor 4  | ...
                                            unused: tensor 3 would have crossed into the next piece

Each piece is pinned by one call to CUDA.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch

from offload_adam.errors import HostMemoryError, warn_user
from offload_adam.layout.budget import ALIGNMENT_NBYTES
from offload_adam.layout.flat import align
from offload_adam.memory.pinning import (
    PIECE_NBYTES,
    CudaRuntime,
    PinError,
    Registration,
)
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23  # since Linux 5.14; Python has no name for it

Touch = Callable[[torch.Tensor], None]
"""Writes to every page of an (n,) uint8 tensor, each from the kernel thread that will update it.

Linux then places the page on the NUMA node of this thread.
"""


class HostArena:
    """Host memory of a fixed size, allocated to tensors from start to end.

    Owns: an anonymous private mapping, in huge pages if the kernel grants them, unless the caller
        passes a shared one; and its registration with CUDA.
    Lifecycle: all pages are present after construction. The bytes live as long as any tensor in
        them. They are pinned from `pin` until `close` or until this object is garbage-collected.
        The owner must call `close` at the interpreter's exit too.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        parts: Iterable[int] = (),
        touch: Touch | None = None,
        survives_fork: bool = False,
        piece_nbytes: int = PIECE_NBYTES,
        shared: tuple[mmap.mmap, int] | None = None,
    ) -> None:
        """Map and commit `nbytes`.

        Args:
            nbytes: capacity, from `arena_nbytes`. The sum of `padded_nbytes` is enough if it fits
                into one piece.
            parts: bytes of each tensor that will be taken, in order; used by `touch` only.
            touch: commits each part. None commits all pages from the calling thread, which is
                faster, and right on a machine with one NUMA node.
            survives_fork: keep the mapping in forked children. By default they do not inherit it,
                so the memory of forked data loaders does not count it again.
            piece_nbytes: bytes that are pinned by one call. No tensor crosses from one piece into
                the next, unless it is larger than a piece.
            shared: a mapping of a file that outlives the process, and where the arena starts in it,
                at a whole page. Its bytes stay as they are, unless `touch` is given. Forked
                children inherit it.

        Raises:
            HostMemoryError: the kernel cannot map that much.
        """
        self.nbytes = nbytes
        self._used_nbytes = 0
        self._piece_nbytes = piece_nbytes
        self._unpin: weakref.finalize[[], HostArena] | None = None
        self._registration: Registration | None = None
        self._mapping: mmap.mmap | None = None
        self._start = 0  # of the arena in the mapping
        if nbytes == 0:
            return
        if shared is not None:
            self._mapping, self._start = shared
            survives_fork = True  # a copy would be the same memory, so it costs nothing
        else:
            self._mapping = _map_private(nbytes)
        self._advise("MADV_HUGEPAGE")  # before the first touch, which fixes the pages' size
        if not survives_fork:
            self._advise("MADV_DONTFORK")
        if touch is None:
            self._commit(is_zero=shared is None)
        else:
            everything = self._bytes()
            for start, end in _places(parts, piece_nbytes):
                touch(everything[start:end])

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the next `numel` elements as a zeroed 1-d tensor.

        The tensor has its own storage, so saving it does not save the rest of the arena.
        """
        if numel == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        nbytes = padded_nbytes(numel, dtype)
        offset = _place(self._used_nbytes, nbytes, self._piece_nbytes)
        self._used_nbytes = offset + nbytes
        if self._mapping is None or self._used_nbytes > self.nbytes:
            raise AssertionError(
                f"An arena of {self.nbytes} bytes was asked for {self._used_nbytes} bytes."
            )
        offset += self._start
        return torch.frombuffer(self._mapping, dtype=dtype, count=numel, offset=offset)

    def _bytes(self) -> torch.Tensor:
        """Return the arena as (nbytes,) uint8."""
        assert self._mapping is not None
        return torch.frombuffer(
            self._mapping, dtype=torch.uint8, count=self.nbytes, offset=self._start
        )

    @property
    def pinned_nbytes(self) -> int:
        """Bytes that are page-locked now: either all or none."""
        return 0 if self._registration is None else self._registration.nbytes

    def pin(self, runtime: CudaRuntime) -> None:
        """Page-lock exactly this mapping.

        torch's own pinned allocator would round the size up to a power of two.

        Raises:
            PinError: CUDA did not pin it; the arena stays usable, unpinned.
        """
        # The pages are committed already. Otherwise pinning would commit them from this thread, on
        # its NUMA node.
        if self._mapping is None or self._registration is not None:
            return
        address = self._bytes().data_ptr()
        pieces = [
            (address + start, min(self._piece_nbytes, self.nbytes - start))
            for start in range(0, self.nbytes, self._piece_nbytes)
        ]
        self._registration = Registration(runtime, pieces)
        self._unpin = weakref.finalize(self, self._registration.release)
        # At exit, finalizers run in reverse order of creation. This one would run before the
        # owner's, which waits for the threads and copies that use the memory.
        self._unpin.atexit = False

    def pin_or_warn(self, runtime: CudaRuntime, otherwise: str) -> None:
        """Pin; if CUDA does not pin, warn with the reason.

        Args:
            otherwise: a sentence for the warning: the consequence of unpinned memory.
        """
        try:
            self.pin(runtime)
        except PinError as error:
            warn_user(f"{error} {otherwise}", RuntimeWarning)

    def close(self) -> None:
        """Unpin, and drop the arena's own reference to the mapping. Idempotent."""
        if self._unpin is not None:
            self._unpin()
        self._mapping = None

    def _advise(self, name: str) -> None:
        """Give the kernel a hint if this platform has it."""
        advice = getattr(mmap, name, None)
        if advice is None or self._mapping is None:
            return
        try:
            self._mapping.madvise(advice, self._start, self.nbytes)
        except OSError as error:
            logger.debug("Kernel rejected %s: %s", name, error)

    def _commit(self, *, is_zero: bool) -> None:
        """Make every page present now, so that no step takes page faults or runs out of memory.

        Args:
            is_zero: the memory is fresh.
        """
        assert self._mapping is not None
        try:
            self._mapping.madvise(_MADV_POPULATE_WRITE, self._start, self.nbytes)
        except OSError:  # an older kernel: write to every page instead
            if is_zero:
                self._bytes().zero_()


def _map_private(nbytes: int) -> mmap.mmap:
    # Private, because Linux gives no huge pages to shared anonymous memory by default.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        return mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        raise HostMemoryError(
            f"{format_nbytes(nbytes)} of host memory cannot be mapped: {error.strerror}. Use "
            "more nodes or a smaller model, or raise the limit of virtual memory (ulimit -v)."
        ) from error


def close_all(arenas: Iterable[HostArena]) -> None:
    """Close all arenas.

    Args:
        arenas: read when the function runs, so a finalizer also closes arenas added later.
    """
    for arena in arenas:
        arena.close()


# References that keep leaked arenas from being unmapped.
_LEFT: list[HostArena] = []


def leave_all(arenas: Iterable[HostArena]) -> None:
    """Leak arenas: keep them mapped and pinned until the process ends. Work may still use them."""
    _LEFT.extend(arenas)


def padded_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Return the bytes that `take` uses for these elements, padding included."""
    return align(numel * dtype.itemsize, ALIGNMENT_NBYTES)


def arena_nbytes(parts: Iterable[int], piece_nbytes: int = PIECE_NBYTES) -> int:
    """Return the capacity that `take` needs for these parts, including padding and gaps.

    Args:
        parts: bytes of each tensor, in order.
    """
    return max((end for _, end in _places(parts, piece_nbytes)), default=0)


def _places(parts: Iterable[int], piece_nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in bytes of each part, at the offset at which `take` places it."""
    end = 0
    for nbytes in parts:
        if nbytes > 0:
            start = _place(end, nbytes, piece_nbytes)
            end = start + align(nbytes, ALIGNMENT_NBYTES)
            yield start, end


def _place(offset: int, nbytes: int, piece_nbytes: int) -> int:
    """Return where a part starts: at `offset`, or at the next piece if it would cross into it."""
    left_nbytes = piece_nbytes - offset % piece_nbytes
    return offset if nbytes <= left_nbytes else offset + left_nbytes
