"""Operations that Numba lacks: typed addresses, prefetching, fused arithmetic, block sums.

Block sums add in one order, so that every machine computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from offload_adam.kernels.ir_vectors import (
    F32,
    I16,
    I32,
    LINE_NBYTES,
    Vectors,
    emit_nontemporal,
    emit_prefetch,
    emit_prefetches,
)
from offload_adam.kernels.numba_private import (
    array_struct,
    get_or_insert_function,
    llvm_type,
    no_value,
)
from offload_adam.layout.flat import BLOCK_NUMEL

_F64 = ir.DoubleType()

_LANES = 16  # fixed, because the number of lanes decides the order of additions and so the bits
# Distance from the block that is summed to the block that is prefetched: two blocks of fp32. Nearer
# lines would not arrive from memory before their turn.
_PREFETCH_NBYTES = 1024


def _constant(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


@intrinsic
def pointer_to(typingctx: Any, address: Any, tag: Any) -> Any:
    """Turn an integer address into a typed pointer to elements of the array `tag`."""
    element = tag.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], llvm_type(context, types.CPointer(element)))

    return types.CPointer(element)(types.int64, tag), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Prefetch the cache line of array[index], which is about to be written.

    A hint: nothing waits for it, and it ignores invalid addresses.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = array_struct(context, builder, array, arguments[0]).data
        emit_prefetch(builder, builder.gep(data, [arguments[1]]), for_writing=True)
        return no_value(context)

    return types.void(array, types.int64), codegen


def window(array: Any, low: Any, high: Any) -> Any:
    """Return array[low:high], or None for an array that this specialisation does not have."""
    return None if array is None else array[low:high]


@overload(window)
def _window(array: Any, low: Any, high: Any) -> Any:
    # Numba types `None if ... else ...` as Optional, which intrinsics do not accept.
    def absent(array: Any, low: Any, high: Any) -> Any:
        return None

    def present(array: Any, low: Any, high: Any) -> Any:
        return array[low:high]

    return absent if isinstance(array, types.NoneType) else present


def row_of(table: Any, number: Any) -> Any:
    """Return table[number], or None if `table` is None in this specialisation."""
    return None if table is None else table[number]


@overload(row_of)
def _row_of(table: Any, number: Any) -> Any:
    def absent(table: Any, number: Any) -> Any:
        return None

    def present(table: Any, number: Any) -> Any:
        return table[number]

    return absent if isinstance(table, types.NoneType) else present


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c in float32 with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return Vectors(builder, 1).fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def flush_tiny(typingctx: Any, value: Any) -> Any:
    """Return 0 where |value| is below the smallest normal float32, else value."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return Vectors(builder, 1).flush_tiny(arguments[0])

    return types.float32(types.float32), codegen


@intrinsic
def widen(typingctx: Any, raw: Any) -> Any:
    """Convert an element, given as its `FloatFormat.bits_dtype`, exactly to float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return Vectors(builder, 1).widen(arguments[0], raw)

    return types.float32(raw), codegen


@intrinsic
def round_for(typingctx: Any, array: Any, value: Any) -> Any:
    """Return the bits of a float32 rounded to the format of the array's elements."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return Vectors(builder, 1).round(arguments[1], array.dtype)

    return array.dtype(array, types.float32), codegen


@intrinsic
def round_randomly(typingctx: Any, array: Any, value: Any, random: Any) -> Any:
    """Return a float32 as an element of the array: as the bits of a bfloat16, or unchanged.

    Args:
        array: uint16, the bits of bfloat16, or float32.
        random: uint32 in [0, 2**16), for stochastic rounding to bfloat16.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, value, random = arguments
        if array.dtype == types.float32:
            return value
        vectors = Vectors(builder, 1)
        return vectors.upper_half(vectors.stochastic(value, random))

    return array.dtype(array, types.float32, types.uint32), codegen


@intrinsic
def bfloat16_of(typingctx: Any, value: Any) -> Any:
    """Return the bfloat16 bits of a split float32, see `Vectors.split`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, 1)
        upper, _ = vectors.split(arguments[0])
        return vectors.upper_half(upper)

    return types.uint16(types.float32), codegen


@intrinsic
def remainder_of(typingctx: Any, value: Any) -> Any:
    """Return the int16 remainder of a split float32, see `Vectors.split`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, 1)
        _, lower = vectors.split(arguments[0])
        return vectors.lower_half(lower)

    return types.int16(types.float32), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """Return the bits of a float32 as int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """Return the float32 with these bits, given as the low half of an int64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], I32), F32)

    return types.float32(types.int64), codegen


@intrinsic
def bfloat16_of_24(typingctx: Any, value: Any, word: Any) -> Any:
    """Return the bfloat16 bits of a float32 that is split into 24 bits, see `Vectors.split_24`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, 1)
        upper, _ = vectors.split_24(*arguments)
        return vectors.upper_half(upper)

    return types.uint16(types.float32, types.int32), codegen


@intrinsic
def remainder_of_24(typingctx: Any, value: Any, word: Any) -> Any:
    """Return the int8 remainder of a float32 that is split into 24 bits, see `Vectors.split_24`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, 1)
        _, lower = vectors.split_24(*arguments)
        return builder.trunc(builder.lshr(lower, _constant(8)), ir.IntType(8))

    return types.int8(types.float32, types.int32), codegen


@intrinsic
def join(typingctx: Any, upper: Any, remainder: Any) -> Any:
    """Return the float32 of a bfloat16 and a remainder of 16 or 8 bits, see `Vectors.join`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        upper, lower = arguments
        upper = builder.shl(builder.zext(upper, I32), _constant(16))
        lower = builder.shl(builder.sext(lower, I32), _constant(16 - remainder.bitwidth))
        return Vectors(builder, 1).join(upper, lower)

    return types.float32(types.uint16, remainder), codegen


@intrinsic
def cast_for(typingctx: Any, array: Any, raw: Any) -> Any:
    """Return the bits of an element, cast to the format of the array's elements.

    If both formats are the same, the bits are unchanged, even those of a NaN.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if array.dtype == raw:
            return arguments[1]
        vectors = Vectors(builder, 1)
        return vectors.round(vectors.widen(arguments[1], raw), array.dtype)

    return array.dtype(array, raw), codegen


@intrinsic
def block_sum_of_squares(typingctx: Any, array: Any, start: Any) -> Any:
    """Return the sum of squares of 128 elements in float64, in one order on every machine.

        lane j (of 16):  x[j]^2 + x[j + 16]^2 + ... + x[j + 112]^2     8 squares, in order
        then             16 lanes -> 8 -> 4 -> 2 -> 1                  upper half added to lower

    With bfloat16, lane j starts with x[2 j] and x[2 j + 1] instead: see `_load_block`. The square
    of a float32 is exact in float64, so a fused multiply-add computes the same bits.
    """
    element = array.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = array_struct(context, builder, array, arguments[0]).data
        block = builder.gep(data, [arguments[1]])
        wide = ir.VectorType(_F64, _LANES)
        total = ir.Constant(wide, [0.0] * _LANES)
        _prefetch_block(builder, block, element)
        for floats in _load_block(builder, block, element):
            value = builder.fpext(floats, wide)
            total = _fma(builder, wide, value, value, total)
        return _sum_lanes(builder, total, _LANES)

    return types.float64(array, types.int64), codegen


def _prefetch_block(builder: Any, block: Any, element: Any) -> None:
    """Emit prefetches for the lines of a later block; invalid addresses are ignored."""
    # The processor's own prefetcher stops at the end of a page, and gradients are in 4 KiB pages.
    itemsize = element.bitwidth // 8
    emit_prefetches(
        builder,
        block,
        itemsize=itemsize,
        start_nbytes=_PREFETCH_NBYTES,
        nbytes=BLOCK_NUMEL * itemsize,
    )


def _load_block(builder: Any, block: Any, element: Any) -> Iterator[Any]:
    """Emit the loads of 128 elements and yield them as vectors of 16 float32.

    Two bfloat16 are read as one 32-bit integer. A shift and a mask turn it into two float32, which
    is half the work of widening each.
    """
    if element == types.uint16:
        for pairs in _load_vectors(builder, block, I32, BLOCK_NUMEL // 2, 2):
            for bits in (builder.shl(pairs, _splat(16)), builder.and_(pairs, _splat(0xFFFF0000))):
                yield builder.bitcast(bits, ir.VectorType(F32, _LANES))
        return
    kind = F32 if element == types.float32 else I16
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


@intrinsic
def stream_block(typingctx: Any, target: Any, source: Any, start: Any) -> Any:
    """Copy 128 elements from `start` on, past the caches; `target` is then aligned to 64 bytes.

    The caller ends with `finish_stores`.
    """
    itemsize = source.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, block = (
            builder.gep(array_struct(context, builder, kind, array).data, [arguments[2]])
            for kind, array in zip((target, source), arguments[:2], strict=True)
        )
        count = BLOCK_NUMEL * itemsize // LINE_NBYTES * _LANES  # of 32 bits; a vector is a line
        vectors = list(_load_vectors(builder, block, I32, count, itemsize))
        to = builder.bitcast(to, vectors[0].type.as_pointer())
        for number, vector in enumerate(vectors):
            emit_nontemporal(builder, vector, builder.gep(to, [_constant(number)]))
        return no_value(context)

    return types.void(target, source, types.int64), codegen


def _splat(value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, _LANES), [value] * _LANES)


def _fma(builder: Any, kind: Any, a: Any, b: Any, c: Any) -> Any:
    """Emit a * b + c with one rounding, on vectors; the builder's own fma takes scalars only."""
    function = get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{_LANES}f64"
    )
    return builder.call(function, [a, b, c])


def _sum_lanes(builder: Any, vector: Any, lanes: int) -> Any:
    """Emit the sum of a vector's lanes: halves added until one lane is left."""
    while lanes > 1:
        lanes //= 2
        width = ir.VectorType(I32, lanes)
        low = builder.shuffle_vector(vector, vector, ir.Constant(width, list(range(lanes))))
        high = builder.shuffle_vector(
            vector, vector, ir.Constant(width, list(range(lanes, 2 * lanes)))
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _constant(0))
