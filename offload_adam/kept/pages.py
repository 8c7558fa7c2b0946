"""The pages of a mapped file, and how later writes of this process are kept from the file."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
# Of Linux; Python has no names for them.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)


class FilePages:
    """All pages of a shared mapping. In forked children of this process they are private.

    Owns: a descriptor of the file and a reference to the mapping, until `close`.
    """

    def __init__(self, file: int, mapping: mmap.mmap) -> None:
        """Use the mapping of a whole file.

        Args:
            file: a descriptor, which is duplicated: the path may be another file's later.
        """
        self._memory = np.frombuffer(mapping, np.uint8)
        self._file = os.dup(file)
        self._close = weakref.finalize(self, os.close, self._file)
        # At exit, this finalizer would run before that of the optimizer, which needs the file.
        self._close.atexit = False
        _shared.add(self)

    def make_private(self, copied: Iterable[tuple[int, int]] = ()) -> None:
        """Let no later write of this process reach the file.

        Idempotent. The addresses stay valid. Until this process writes to a page, the page shows
        what other processes write to the file, unless it is copied now.

        Args:
            copied: (address, bytes) of memory whose pages are copied now. Not needed if no other
                process can open the file any more.

        Raises:
            OSError: there is not enough memory; the pages are still shared.
        """
        if self not in _shared:  # a second mapping would drop what was written to the first
            return
        pieces = list(copied)
        flags = mmap.MAP_PRIVATE
        if not pieces:
            flags |= _MAP_NORESERVE  # few pages will ever be written
        # If mmap with MAP_FIXED fails, there may be no mapping left. So map elsewhere first.
        mmap.mmap(self._file, self._memory.size, flags=flags, prot=_PROTECTION).close()
        start = self._memory.ctypes.data
        flags |= _MAP_FIXED
        if _libc.mmap(start, self._memory.size, _PROTECTION, flags, self._file, 0) == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        _shared.discard(self)
        for address, nbytes in pieces:
            first, end = address - start, address - start + nbytes
            pages = self._memory[first - first % mmap.PAGESIZE : end : mmap.PAGESIZE]
            pages += 0  # the write makes the kernel copy the page

    def close(self) -> None:
        """Close the file, and drop the reference to the mapping. Idempotent."""
        _shared.discard(self)
        self._close()
        self._memory = np.empty(0, np.uint8)


_shared: weakref.WeakSet[FilePages] = weakref.WeakSet()


def _make_private_in_child() -> None:
    # No page is copied here: each data loader worker would have all parameters again.
    for pages in list(_shared):
        with suppress(OSError):
            pages.make_private()


os.register_at_fork(after_in_child=_make_private_in_child)
