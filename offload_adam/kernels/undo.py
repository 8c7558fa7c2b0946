"""A log of old values in shared memory, from which a killed update is completed to the same bits.

Before the kernel overwrites a vector or a block, it stores the old values in an entry of the log,
then counts the entry. Each thread has an area of its own, in which the entries are a ring:

    area    [tag, count, resume | slot 0 | slot 1 | ... ]
    entry   [offset, numel, first, exponents | old values of each plane of the state]

    entry i stored   count = i + 1   new values stored   entry i + 1 stored   count = i + 2   ...

A kill ends a thread between two instructions, so the memory holds the stores before that point.
Elements before the last `depth` entries are then complete. Those of the last entries may be
overwritten in part: `restore` writes their old values back, and the next run starts at the oldest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from offload_adam.layout.flat import BLOCK_NUMEL

UInt8Array = npt.NDArray[np.uint8]
Planes = Sequence[npt.NDArray[Any]]

MAX_PIECES = 128
"""Maximum number of pieces of a launch that writes a log."""

AREA_NBYTES = 4096
HEADER_NBYTES = 64  # of an area and of an entry: one cache line

TAG, COUNT, RESUME = range(3)
"""The int64 numbers of an area's header.

TAG is the launch that the area belongs to, and COUNT the number of its entries. RESUME is the flat
offset at which the piece continues after `UndoLog.restore`, NOT_RESUMED or FINISHED.
"""

NOT_RESUMED, FINISHED = -1, -2

OFFSET, NUMEL, FIRST = range(3)
"""The int64 numbers of an entry's header.

The entry holds elements [OFFSET, OFFSET + NUMEL) of the flat arrays, at places [FIRST, FIRST +
NUMEL) of its planes.
"""

EXPONENTS_AT = 24
"""Byte of an entry at which the two exponents of its block start."""


class Ring(NamedTuple):
    """The entries of an area.

    numel: elements of an entry.
    element_nbytes: maximum bytes of an element, summed over all planes of the state.
    depth: maximum number of entries whose elements the kernel may have overwritten in part.
    slots: entries in the ring, a power of 2 and more than `depth`, because the entry that is being
        stored is not counted yet.
    """

    numel: int
    element_nbytes: int
    depth: int
    slots: int

    @property
    def entry_nbytes(self) -> int:
        """Bytes of an entry."""
        return HEADER_NBYTES + self.numel * self.element_nbytes

    def plane_starts(self, itemsizes: Sequence[int]) -> list[int]:
        """Return the byte of an entry at which each plane starts.

        Args:
            itemsizes: bytes of an element of the planes that the state has: of master, remainder,
                exp_avg, exp_avg_sq and max_exp_avg_sq.
        """
        ends = np.cumsum([0, *itemsizes]) * self.numel + HEADER_NBYTES
        return [int(end) for end in ends[:-1]]


VECTORS = Ring(numel=16, element_nbytes=16, depth=3, slots=4)
"""Of float32 state: the pipeline overwrites a vector's weights after the moments of two more."""

BLOCKS = Ring(numel=BLOCK_NUMEL, element_nbytes=8, depth=1, slots=2)
"""Of state with moments below 32 bits."""


class _Entry(NamedTuple):
    """The numbers of an entry, and all of its bytes."""

    offset: int
    numel: int
    first: int
    data: UInt8Array


class UndoLog:
    """The areas of all pieces in one array; zeroed memory is an empty log.

    Threads: none of its methods may run during an update that writes to the log.
    """

    def __init__(self, memory: Any) -> None:
        """Construct the log over memory that it does not own.

        Args:
            memory: (n,) uint8, a contiguous array or CPU tensor that starts at a cache line. Its
                length is that of `nbytes`.
        """
        self.memory: UInt8Array = np.asarray(memory)
        array = self.memory
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError("The memory of an undo log must be a contiguous (n,) uint8 array.")
        if array.size % AREA_NBYTES or array.ctypes.data % HEADER_NBYTES:
            raise ValueError(
                f"The memory of an undo log has {array.size} bytes at address "
                f"{array.ctypes.data:#x}. It must have UndoLog.nbytes(num_pieces) bytes and start "
                f"at a multiple of {HEADER_NBYTES}."
            )
        self._areas = array.reshape(-1, AREA_NBYTES)

    @staticmethod
    def nbytes(num_pieces: int) -> int:
        """Return the bytes of a log for launches of up to `num_pieces` pieces."""
        if not 0 < num_pieces <= MAX_PIECES:
            raise ValueError(f"num_pieces={num_pieces} must be from 1 to {MAX_PIECES}.")
        return num_pieces * AREA_NBYTES

    def restore(
        self,
        launch: int,
        master: npt.NDArray[Any],
        remainder: npt.NDArray[Any] | None,
        exp_avg: npt.NDArray[Any],
        exp_avg_sq: npt.NDArray[Any],
        max_exp_avg_sq: npt.NDArray[Any] | None,
        exponents: UInt8Array | None,
    ) -> None:
        """Prepare the arrays and the log for another run of a launch that was killed.

        Pass the same launch number, table and number of pieces to `adam.update` afterwards. This
        completes the update to the bits of an undisturbed one. Only the last launch that began may
        run again. A kill during this method or that run is repaired in the same way.

        Args:
            launch: number of the killed launch. Nothing is done if no piece of it has begun.
            master, remainder, exp_avg, exp_avg_sq, max_exp_avg_sq, exponents: the arrays that
                `adam.update` was given.

        Raises:
            ValueError: the log is damaged, or belongs to other arrays. No array was changed.
        """
        given = (master, remainder, exp_avg, exp_avg_sq, max_exp_avg_sq)
        planes = [plane for plane in given if plane is not None]
        ring = VECTORS if exp_avg.dtype == np.float32 else BLOCKS
        interrupted = []
        for piece, area in enumerate(self._areas):
            header = area[:HEADER_NBYTES].view(np.int64)
            if header[TAG] == launch and header[RESUME] != FINISHED:
                try:
                    interrupted.append((header, _last_entries(area, ring, planes, exponents)))
                except ValueError as error:
                    raise ValueError(
                        f"The undo log of launch {launch} is damaged at piece {piece}: {error}. "
                        "Load a checkpoint instead."
                    ) from None
        starts = ring.plane_starts([plane.itemsize for plane in planes])
        for header, entries in interrupted:
            for entry in entries:
                _write_back(entry, planes, starts, exponents)
            if entries:
                # In this order: until `count` is 0, a kill leads to the same entries again.
                header[RESUME] = entries[0].offset
                header[COUNT] = 0


def _last_entries(
    area: UInt8Array, ring: Ring, planes: Planes, exponents: UInt8Array | None
) -> list[_Entry]:
    """Return the entries of an unfinished piece that may be overwritten in part, oldest first.

    Raises:
        ValueError: a number cannot be right.
    """
    numel = planes[0].size
    header = area[:HEADER_NBYTES].view(np.int64)
    count, resume = int(header[COUNT]), int(header[RESUME])
    if count < 0 or not NOT_RESUMED <= resume < numel:
        raise ValueError(f"count {count}, resume {resume} for {numel} elements")
    entries: list[_Entry] = []
    end = max(resume, 0)
    for number in range(max(0, count - ring.depth), count):
        start = HEADER_NBYTES + number % ring.slots * ring.entry_nbytes
        data = area[start : start + ring.entry_nbytes]
        offset, used, first = data[:EXPONENTS_AT].view(np.int64).tolist()
        entry = _Entry(offset, used, first, data)
        inside = end <= entry.offset <= numel - entry.numel and entry.numel > 0
        inside = inside and 0 <= entry.first <= ring.numel - entry.numel
        if exponents is not None:
            inside = inside and entry.offset % BLOCK_NUMEL == 0
            inside = inside and entry.offset // BLOCK_NUMEL < len(exponents)
        if not inside:
            raise ValueError(f"entry {number} is {entry[:3]} for {numel} elements")
        end = entry.offset + entry.numel
        entries.append(entry)
    return entries


def _write_back(
    entry: _Entry, planes: Planes, starts: Sequence[int], exponents: UInt8Array | None
) -> None:
    """Write an entry's old values to the flat arrays."""
    for plane, start in zip(planes, starts, strict=True):
        low = start + entry.first * plane.itemsize
        old = entry.data[low : low + entry.numel * plane.itemsize].view(plane.dtype)
        plane[entry.offset : entry.offset + entry.numel] = old
    if exponents is not None:
        exponents[entry.offset // BLOCK_NUMEL] = entry.data[EXPONENTS_AT : EXPONENTS_AT + 2]
