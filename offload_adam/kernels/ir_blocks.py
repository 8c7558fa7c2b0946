"""What the IR loops over blocks of 128 elements share: arrays, and copies of partial blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from offload_adam.kernels.ir_vectors import emit_prefetches
from offload_adam.kernels.numba_private import (
    alloca_once,
    get_or_insert_function,
    llvm_type,
)
from offload_adam.layout.flat import BLOCK_NUMEL

# Distance between the updated and the prefetched elements: eight blocks of 16-bit elements. With a
# shorter distance, the lines do not arrive from memory in time.
_PREFETCH_NBYTES = 2048
_BYTES = ir.IntType(8).as_pointer()
_NOT_VOLATILE = ir.Constant(ir.IntType(1), 0)  # an argument of memcpy and memset

INTP = ir.IntType(64)


class Arrays(NamedTuple):
    """One value for each array: its address, or the type of its elements; None if it is absent."""

    gradient: Any
    master: Any
    remainder: Any
    exp_avg: Any
    exp_avg_sq: Any
    param_out: Any


class Copies:
    """Emits the copies of a part of a block between the arrays and the stack."""

    def __init__(
        self,
        builder: Any,
        arrays: Arrays,
        stack: Arrays,
        start: Any,
        end: Any,
        first_in_block: Any,
    ) -> None:
        """Construct the copies.

        Args:
            start, end: the part of the arrays to copy, in elements from the start of the range.
            first_in_block: index of the part's first element in the block.
        """
        self._builder = builder
        self._arrays = arrays
        self._stack = stack
        self._start = start
        self._numel = builder.sub(end, start)
        self._first_in_block = first_in_block

    def to_stack(self) -> None:
        """Emit the copy of every array, and set the rest of the block to 0."""
        for array, block in zip(self._arrays, self._stack, strict=True):
            if array is not None:
                self._clear(block)
                in_array, on_stack = self._addresses(array, block)
                self._copy(on_stack, in_array)

    def from_stack(self) -> None:
        """Emit the copy back of every array except the gradient, which is only read."""
        for array, block in zip(self._arrays[1:], self._stack[1:], strict=True):
            if array is not None:
                in_array, on_stack = self._addresses(array, block)
                self._copy(in_array, on_stack)

    def _addresses(self, array: Any, block: Any) -> tuple[Any, Any]:
        """Return the address of the part in an array, and in the block on the stack."""
        b = self._builder
        return b.gep(array, [self._start]), b.gep(block, [self._first_in_block])

    def _copy(self, target: Any, source: Any) -> None:
        b = self._builder
        nbytes = b.mul(self._numel, constant(itemsize_of(target)))
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _BYTES, INTP, ir.IntType(1)])
        copy = get_or_insert_function(b.module, kind, "llvm.memcpy.p0.p0.i64")
        b.call(copy, [b.bitcast(target, _BYTES), b.bitcast(source, _BYTES), nbytes, _NOT_VOLATILE])

    def _clear(self, block: Any) -> None:
        b = self._builder
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, ir.IntType(8), INTP, ir.IntType(1)])
        fill = get_or_insert_function(b.module, kind, "llvm.memset.p0.i64")
        nbytes = constant(BLOCK_NUMEL * itemsize_of(block))
        zero = ir.Constant(ir.IntType(8), 0)
        b.call(fill, [b.bitcast(block, _BYTES), zero, nbytes, _NOT_VOLATILE])


def each(function: Any, *arrays: Arrays) -> Arrays:
    """Apply a function to the values of each array; the result is None for an absent array."""
    groups = zip(*arrays, strict=True)
    return Arrays(*(None if group[0] is None else function(*group) for group in groups))


def stack_blocks(context: Any, builder: Any, elements: Arrays) -> Arrays:
    """Allocate a block on the stack for each array, and return the addresses of the first elements.

    Call this outside of loops: stack memory is freed only when the function returns.
    """

    def allocate(element: Any) -> Any:
        kind = llvm_type(context, element)
        block = alloca_once(builder, ir.ArrayType(kind, BLOCK_NUMEL))
        return builder.bitcast(block, kind.as_pointer())

    return each(allocate, elements)


def prefetch_ahead(builder: Any, block: Arrays) -> None:
    """Emit prefetches of the elements that are some blocks behind this block.

    Args:
        block: addresses of the block's first elements.
    """
    for array in block:
        if array is not None:
            emit_prefetches(
                builder,
                array,
                itemsize=itemsize_of(array),
                start_nbytes=_PREFETCH_NBYTES,
                nbytes=BLOCK_NUMEL * itemsize_of(array),
            )


def constant(value: int) -> ir.Constant:
    """Return an index as an LLVM constant."""
    return ir.Constant(INTP, value)


def itemsize_of(address: Any) -> int:
    """Return the bytes of the elements at an address."""
    kind = address.type.pointee
    return 4 if isinstance(kind, ir.FloatType) else int(kind.width) // 8
