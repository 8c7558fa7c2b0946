"""How the kernels write the log of `undo`: the order of their stores is what makes it right."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from offload_adam.kernels.ir_blocks import INTP, Arrays, constant, itemsize_of
from offload_adam.kernels.ir_vectors import I16, LINE_NBYTES
from offload_adam.kernels.numba_private import array_struct, no_value
from offload_adam.kernels.undo import (
    AREA_NBYTES,
    COUNT,
    EXPONENTS_AT,
    FINISHED,
    HEADER_NBYTES,
    NOT_RESUMED,
    RESUME,
    TAG,
    Ring,
)
from offload_adam.layout.flat import BLOCK_NUMEL


class UndoEntries:
    """Emits the entries of one piece's area."""

    def __init__(self, builder: Any, ring: Ring, area: Any, start: Any) -> None:
        """Construct the emitter.

        Args:
            area: address of the area's first byte.
            start: flat offset of the range's first element.
        """
        self._builder = builder
        self._ring = ring
        self._area = area
        self._start = start

    def push(
        self,
        planes: Sequence[Any],
        numel: int,
        index: Any,
        used: Any = None,
        first: Any = None,
        exponents: Any = None,
    ) -> None:
        """Emit the copy of elements into the next entry; only stores after it may change them.

        Args:
            planes: addresses of the elements in the planes of the state, without absent planes.
            numel: number of elements to copy.
            index: index in the range of the first element that belongs to it.
            used, first: number of the elements that belong to the range, and place of the first of
                them among the copied ones; by default all belong to it.
            exponents: address of the block's two exponents; None if it has none.
        """
        b = self._builder
        counter = b.gep(b.bitcast(self._area, INTP.as_pointer()), [constant(COUNT)])
        # Loaded each time: the processor forwards it from the last store.
        count = b.load(counter)
        slot = b.and_(count, constant(self._ring.slots - 1))
        place = b.add(b.mul(slot, constant(self._ring.entry_nbytes)), constant(HEADER_NBYTES))
        entry = b.gep(self._area, [place])
        header = b.bitcast(entry, INTP.as_pointer())
        offset = b.add(self._start, index)
        numbers = (offset, used or constant(numel), first or constant(0))
        for column, value in enumerate(numbers):
            b.store(value, b.gep(header, [constant(column)]))
        starts = self._ring.plane_starts([itemsize_of(plane) for plane in planes])
        for plane, start in zip(planes, starts, strict=True):
            self._copy(b.gep(entry, [constant(start)]), plane, numel)
        if exponents is not None:
            both = b.load(b.bitcast(exponents, I16.as_pointer()))
            both.align = 1
            b.store(both, b.bitcast(b.gep(entry, [constant(EXPONENTS_AT)]), I16.as_pointer()))
        # An entry must be complete before it is counted, and counted before its elements change.
        emit_barrier(b)
        b.store(b.add(count, constant(1)), counter)
        emit_barrier(b)

    def push_block(
        self, block: Arrays, index: Any, used: Any, first: Any, exponents: Any = None
    ) -> None:
        """Emit the copy of a block, see `push`; it may be on the stack."""
        planes = (block.master, block.remainder, block.exp_avg, block.exp_avg_sq)
        present = [plane for plane in planes if plane is not None]
        self.push(present, BLOCK_NUMEL, index, used, first, exponents)

    def _copy(self, target: Any, source: Any, numel: int) -> None:
        """Emit the copy of elements to an address of bytes, in vectors of a cache line."""
        b, element = self._builder, source.type.pointee
        lanes = min(numel, LINE_NBYTES // itemsize_of(source))
        kind = element if lanes == 1 else ir.VectorType(element, lanes)
        target = b.bitcast(target, source.type)
        for start in range(0, numel, lanes):
            vector = b.load(b.bitcast(b.gep(source, [constant(start)]), kind.as_pointer()))
            vector.align = itemsize_of(source)
            place = b.bitcast(b.gep(target, [constant(start)]), kind.as_pointer())
            b.store(vector, place).align = itemsize_of(source)


def undo_entries(
    context: Any, builder: Any, ring: Ring, kind: Any, area: Any, start: Any
) -> UndoEntries | None:
    """Return the emitter of entries, or None if this specialisation keeps no log.

    Args:
        kind, area: type and value of the piece's area, an array or None.
        start: flat offset of the range's first element.
    """
    if isinstance(kind, types.NoneType):
        return None
    address = array_struct(context, builder, kind, area).data
    return UndoEntries(builder, ring, address, start)


def emit_barrier(builder: Any) -> None:
    """Emit a barrier: if a store behind it is visible after a kill, so are all before it."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        builder.fence("release")
    else:
        # Stores of x86 become visible in program order, so only LLVM must not reorder them.
        builder.fence("seq_cst", "singlethread")


@intrinsic
def barrier(typingctx: Any) -> Any:
    """Order the stores before and after this call, see `emit_barrier`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_barrier(builder)
        return no_value(context)

    return types.void(), codegen


def area_of(undo: Any, piece: Any) -> Any:
    """Return the area of a piece. Without a log, `undo` is None, and so is the result."""
    return None if undo is None else undo[piece * AREA_NBYTES : (piece + 1) * AREA_NBYTES]


@overload(area_of)
def _area_of(undo: Any, piece: Any) -> Any:
    def absent(undo: Any, piece: Any) -> Any:
        return None

    def present(undo: Any, piece: Any) -> Any:
        return undo[piece * AREA_NBYTES : (piece + 1) * AREA_NBYTES]

    return absent if isinstance(undo, types.NoneType) else present


def begin_piece(
    area: Any, launch: Any, position: Any, end: Any, starts: Any, work_starts: Any
) -> Any:
    """Return the position at which a piece starts, and assign its area to the launch.

    It is `position` in a first run of the launch. In a run after `UndoLog.restore` it is where the
    killed run ended.
    """
    raise NotImplementedError


@overload(begin_piece)
def _begin_piece(
    area: Any, launch: Any, position: Any, end: Any, starts: Any, work_starts: Any
) -> Any:
    def absent(
        area: Any, launch: Any, position: Any, end: Any, starts: Any, work_starts: Any
    ) -> Any:
        return position

    def present(
        area: Any, launch: Any, position: Any, end: Any, starts: Any, work_starts: Any
    ) -> Any:
        header = area[:HEADER_NBYTES].view(np.int64)
        if header[TAG] != launch:
            header[COUNT] = 0
            header[RESUME] = NOT_RESUMED
            barrier()  # a kill before the tag is stored leaves the piece as not begun
            header[TAG] = launch
            barrier()
            return position
        resume = header[RESUME]
        if resume == FINISHED:
            return end
        if resume == NOT_RESUMED:
            return position
        segment = np.searchsorted(starts, resume, side="right") - 1
        return work_starts[segment] + resume - starts[segment]

    return absent if isinstance(area, types.NoneType) else present


def finish_piece(area: Any) -> None:
    """Record that a piece is complete, so that another run of the launch skips it."""
    raise NotImplementedError


@overload(finish_piece)
def _finish_piece(area: Any) -> Any:
    def absent(area: Any) -> None:
        pass

    def present(area: Any) -> None:
        barrier()
        # One store: `UndoLog.restore` ignores the entries of a finished piece.
        area[:HEADER_NBYTES].view(np.int64)[RESUME] = FINISHED
        barrier()

    return absent if isinstance(area, types.NoneType) else present
