"""Intrinsics: typed addresses, prefetching, and block sums in one order whatever the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.misc import CPointer, NoneType
from numba.extending import intrinsic, overload

from offload_adam.kernels.ir_vectors import Vectors

_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_F32 = ir.FloatType()
_F64 = ir.DoubleType()

BLOCK_NUMEL = 128
"""Elements in one block of the gradient norm, and the unit in which shards are cut."""

_LANES = 16
_LINE_NBYTES = 64
_PREFETCH_NBYTES = 1024


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


@intrinsic
def pointer_to(typingctx: Any, address: Any, tag: Any) -> Any:
    """Turn an integer address into a typed pointer to elements of the array `tag`."""
    element = tag.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(CPointer(element)))

    return CPointer(element)(types.int64, tag), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask the processor for the cache line of array[index], which is about to be written.

    A hint: nothing waits for it, and no address can make it fail.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        byte = ir.IntType(8).as_pointer()
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for_writing, keep_close, is_data = _constant(1), _constant(3), _constant(1)
        builder.call(function, [address, for_writing, keep_close, is_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


def window(array: Any, low: Any, high: Any) -> Any:
    """Return array[low:high], or None for an array that this specialisation does not have."""
    return None if array is None else array[low:high]


@overload(window)
def _window(array: Any, low: Any, high: Any) -> Any:
    # A conditional expression would be typed Optional, which no intrinsic takes.
    def absent(array: Any, low: Any, high: Any) -> Any:
        return None

    def present(array: Any, low: Any, high: Any) -> Any:
        return array[low:high]

    return absent if isinstance(array, NoneType) else present


@intrinsic
def block_sum_of_squares(typingctx: Any, array: Any, start: Any) -> Any:
    """Return the sum of squares of 128 elements in float64, in one order whatever the machine.

    Sixteen float64 lanes each take every sixteenth group of elements, in order; the lanes are then
    folded by halves. The square of a float32 is exact in float64, so fusing the multiply with the
    add changes nothing.
    """
    element = array.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        block = builder.gep(data, [arguments[1]])
        wide = ir.VectorType(_F64, _LANES)
        total = ir.Constant(wide, [0.0] * _LANES)
        _prefetch_block(builder, block, element)
        for floats in _load_block(builder, block, element):
            value = builder.fpext(floats, wide)
            total = _fused(builder, wide, value, value, total)
        return _fold(builder, total, _LANES)

    return types.float64(array, types.int64), codegen


def _prefetch_block(builder: Any, block: Any, element: Any) -> None:
    """Ask for the lines of a later block; where no memory is, nothing happens.

    The processor's own prefetch stops at the end of a page, and gradients lie in small ones.
    """
    itemsize = element.bitwidth // 8
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    for nbytes in range(0, BLOCK_NUMEL * itemsize, _LINE_NBYTES):
        line = builder.gep(block, [_constant((_PREFETCH_NBYTES + nbytes) // itemsize)])
        builder.call(prefetch, [builder.bitcast(line, byte), read, keep, data])


def _load_block(builder: Any, block: Any, element: Any) -> Iterator[Any]:
    """Emit the loads of 128 elements and yield them as vectors of 16 float32.

    Two bfloat16 are read as one 32-bit integer and taken apart by a shift and a mask, which is half
    the work of widening each.
    """
    if element == types.uint16:
        for pairs in _load_vectors(builder, block, _I32, BLOCK_NUMEL // 2, 2):
            for bits in (builder.shl(pairs, _splat(16)), builder.and_(pairs, _splat(0xFFFF0000))):
                yield builder.bitcast(bits, ir.VectorType(_F32, _LANES))
        return
    kind = _F32 if element == types.float32 else _I16
    for loaded in _load_vectors(builder, block, kind, BLOCK_NUMEL, element.bitwidth // 8):
        yield Vectors(builder, _LANES).widen(loaded, element)


def _load_vectors(builder: Any, block: Any, kind: Any, count: int, align: int) -> Iterator[Any]:
    """Emit loads of `count` values as vectors of 16, from an address aligned to `align` bytes."""
    vector = ir.VectorType(kind, _LANES)
    start = builder.bitcast(block, vector.as_pointer())
    for number in range(count // _LANES):
        loaded = builder.load(builder.gep(start, [_constant(number)]), typ=vector)
        loaded.align = align
        yield loaded


def _splat(value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, _LANES), [value] * _LANES)


def _fused(builder: Any, kind: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a * b + c on vectors; the builder's own fma takes scalars only."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{_LANES}f64"
    )
    return builder.call(function, [a, b, c])


def _fold(builder: Any, vector: Any, lanes: int) -> Any:
    """Emit the sum of a vector's lanes: halves added until one lane is left."""
    while lanes > 1:
        lanes //= 2
        width = ir.VectorType(_I32, lanes)
        low = builder.shuffle_vector(vector, vector, ir.Constant(width, list(range(lanes))))
        high = builder.shuffle_vector(
            vector, vector, ir.Constant(width, list(range(lanes, 2 * lanes)))
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _constant(0))
