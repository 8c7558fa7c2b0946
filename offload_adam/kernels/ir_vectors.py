"""Emit float32 arithmetic on vectors, which computes the same bits for any number of lanes.

Only IEEE 754 operations are emitted, and LLVM may not contract or reorder any of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types

from offload_adam.kernels.numba_private import get_or_insert_function

I16 = ir.IntType(16)
I32 = ir.IntType(32)
F32 = ir.FloatType()

LINE_NBYTES = 64
"""Bytes of a cache line."""


class Vectors:
    """Emits instructions on vectors of `lanes` float32 at the builder's position.

    One lane is a scalar, because LLVM's own vectoriser does not accept <1 x float>.

    "Raw" elements are elements as an array holds them: float32, or the bits of bfloat16 (uint16) or
    float16 (int16). The parameter `element` is their Numba type, which identifies the format.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self.lanes = lanes
        self.kind = self._vector(F32)
        self.builder = builder

    def splat(self, value: Any) -> Any:
        """Return a scalar, float32 or int32, in every lane."""
        if self.lanes == 1:
            return value
        empty = ir.Constant(self._vector(value.type), ir.Undefined)
        first = self.builder.insert_element(empty, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, empty, self._constant(I32, 0))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c with one rounding."""
        return self._call("fma", a, b, c)

    def sqrt(self, a: Any) -> Any:
        """Return the square root."""
        return self._call("sqrt", a)

    def larger(self, a: Any, b: Any) -> Any:
        """Return a where it is above b, else b."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def where_infinite(self, a: Any, infinite: Any, otherwise: Any) -> Any:
        """Return `infinite` where a is positive infinity, else `otherwise`."""
        is_infinite = self.builder.fcmp_ordered("==", a, self._constant(F32, float("inf")))
        return self.builder.select(is_infinite, infinite, otherwise)

    def zeros(self) -> Any:
        """Return 0 in every lane."""
        return self._constant(F32, 0.0)

    def flush_tiny(self, a: Any) -> Any:
        """Return 0 where |a| is below the smallest normal number (2**-126), else a."""
        # Tests the exponent's bits, because comparing floats is itself slow on denormals.
        exponent = self.builder.and_(self.bits(a), self._constant(I32, 0x7F800000))
        tiny = self.builder.icmp_unsigned("==", exponent, self._constant(I32, 0))
        return self.builder.select(tiny, self.zeros(), a)

    def load(self, array: Any, index: Any, element: Any) -> Any:
        """Return the raw elements array[index : index + lanes], widened exactly to float32."""
        pointer = self._address(array, index, element)
        loaded = self.builder.load(pointer)
        # By default LLVM assumes the alignment of the whole vector; such a load would fault.
        loaded.align = element.bitwidth // 8
        return self.widen(loaded, element)

    def load_moment(self, array: Any, index: Any, element: Any) -> Any:
        """Load like `load`, and return 0 where |a| is below the smallest normal, 2**-126."""
        return self.flush_tiny(self.load(array, index, element))

    def store(self, value: Any, array: Any, index: Any, element: Any) -> None:
        """Write to array[index : index + lanes], rounded to raw elements."""
        pointer = self._address(array, index, element)
        self.builder.store(self.round(value, element), pointer).align = element.bitwidth // 8

    def store_nontemporal(self, value: Any, array: Any, index: Any, element: Any) -> None:
        """Write like `store`, but bypass the caches; the address is aligned to the whole vector.

        An ordinary store first reads the cache line that it writes to.
        """
        pointer = self._address(array, index, element)
        stored = emit_nontemporal(self.builder, self.round(value, element), pointer)
        stored.align = element.bitwidth // 8 * self.lanes

    def widen(self, raw: Any, element: Any) -> Any:
        """Return raw elements as float32, exactly."""
        builder = self.builder
        if element == types.float32:
            return raw
        if element == types.int16:
            half = builder.bitcast(raw, self._vector(ir.HalfType()))
            return builder.fpext(half, self.kind)
        wide = builder.zext(raw, self._vector(I32))
        return builder.bitcast(builder.shl(wide, self._constant(I32, 16)), self.kind)

    def round(self, value: Any, element: Any) -> Any:
        """Return float32 rounded to raw elements, to nearest even; a NaN stays a NaN."""
        builder = self.builder
        if element == types.float32:
            return value
        if element == types.int16:
            half = builder.fptrunc(value, self._vector(ir.HalfType()))
            return builder.bitcast(half, self._vector(I16))
        # The addition could turn a NaN into an infinity or a number: set its quiet bit instead.
        quiet = builder.or_(self.bits(value), self._constant(I32, 0x400000))
        return self.upper_half(builder.select(self._is_nan(value), quiet, self.nearest_even(value)))

    def nearest_even(self, value: Any) -> Any:
        """Return int32 lanes whose upper halves are bfloat16, rounded to nearest even.

        Infinity stays infinity. A NaN may become a number.
        """
        builder = self.builder
        # Add 0x7FFF, plus 1 if the lowest kept bit is 1; then drop 16 bits. So a tie rounds up only
        # if the lowest kept bit is 1.
        bits = self.bits(value)
        odd = builder.and_(builder.lshr(bits, self._constant(I32, 16)), self._constant(I32, 1))
        return builder.add(builder.add(bits, self._constant(I32, 0x7FFF)), odd)

    def zero_above(self, a: Any, limit: float) -> Any:
        """Return 0 where |a| exceeds the limit, else a; a NaN stays a NaN."""
        magnitude = self.builder.bitcast(self.magnitude_bits(a), self.kind)
        exceeds = self.builder.fcmp_ordered(">", magnitude, self._constant(F32, limit))
        return self.builder.select(exceeds, self.zeros(), a)

    def magnitude_bits(self, a: Any) -> Any:
        """Return the bits of |a| as int32 lanes."""
        return self.builder.and_(self.bits(a), self._constant(I32, 0x7FFFFFFF))

    def lower_bits(self, lanes: Any, count: int) -> Any:
        """Return the lower bits of int32 lanes."""
        return self.builder.and_(lanes, self._constant(I32, (1 << count) - 1))

    def stochastic(self, value: Any, random: Any) -> Any:
        """Return int32 lanes whose upper halves are bfloat16, rounded stochastically.

        The probability of rounding away from zero is the dropped 16 bits divided by 2**16. Infinity
        stays infinity, and a normal number never becomes 0. A NaN may become a number.

        Args:
            random: int32 lanes, uniform in [0, 2**16).
        """
        return self.builder.add(self.bits(value), random)

    def split(self, value: Any) -> tuple[Any, Any]:
        """Split a float32 without loss into a bfloat16 and a signed 16-bit remainder.

        The bfloat16 is the float32 rounded to nearest, with ties away from zero. Ties cannot go to
        even: 65537 float32 would then round to an even bfloat16, but a remainder has only 65536
        values. A NaN becomes a bfloat16 NaN, and its remainder is 0.

        Returns:
            Two sets of int32 lanes. The upper halves of the first are the bfloat16, the lower
            halves of the second are the remainders.
        """
        bits = self._quieted_bits(value)
        return self.builder.add(bits, self._constant(I32, 0x8000)), bits

    def split_24(self, value: Any, word: Any) -> tuple[Any, Any]:
        """Split a float32 into a bfloat16 and a signed 8-bit remainder, rounded stochastically.

        Both have the upper 24 bits of the float32. The probability of rounding away from zero is
        the dropped 8 bits divided by 256. A NaN becomes a bfloat16 NaN, and its remainder is 0.

        Args:
            word: int32 lanes whose low 8 bits are uniform.

        Returns:
            Two sets of int32 lanes. The upper halves of the first are the bfloat16. Bits 8 to 15 of
            the second are the remainders.
        """
        random = self.lower_bits(word, 8)
        # The low half of a NaN is 0 here, so the random bits do not reach its remainder.
        bits = self.builder.add(self._quieted_bits(value), random)
        return self.builder.add(bits, self._constant(I32, 0x8000)), bits

    def _quieted_bits(self, value: Any) -> Any:
        """Return the bits of float32 lanes; a NaN has its quiet bit, and its lower half is 0."""
        builder = self.builder
        bits = self.bits(value)
        # Additions to the bits could turn a NaN into an infinity or a number.
        upper = builder.and_(bits, self._constant(I32, 0xFFFF0000))
        quiet = builder.or_(upper, self._constant(I32, 0x400000))
        return builder.select(self._is_nan(value), quiet, bits)

    def join(self, upper: Any, remainder: Any) -> Any:
        """Return the float32 of a bfloat16 and a remainder: the inverse of `split`.

        Args:
            upper: int32 lanes; the upper half is the bfloat16, the lower half is 0.
            remainder: int32 lanes, the sign-extended remainder; 256 times it after `split_24`.
        """
        # If the rounding has carried into the upper half, the remainder is negative.
        value = self.builder.bitcast(self.builder.add(upper, remainder), self.kind)
        # If a user sets a weight to 0 or infinity, its remainder stays, and the sum may be the
        # bits of a NaN. The remainder then counts as 0. No pair that `split` returns does this.
        alone = self.builder.bitcast(upper, self.kind)
        return self.builder.select(self._is_nan(value), alone, value)

    def upper_half(self, bits: Any) -> Any:
        """Return the upper half of each int32 lane as an int16 lane."""
        return self.lower_half(self.builder.lshr(bits, self._constant(I32, 16)))

    def lower_half(self, bits: Any) -> Any:
        """Return the lower half of each int32 lane as an int16 lane."""
        return self.builder.trunc(bits, self._vector(I16))

    def bits(self, value: Any) -> Any:
        """Return the bits of float32 lanes as int32 lanes."""
        return self.builder.bitcast(value, self._vector(I32))

    def _is_nan(self, value: Any) -> Any:
        return self.builder.fcmp_unordered("uno", value, value)

    def _vector(self, scalar: Any) -> Any:
        return scalar if self.lanes == 1 else ir.VectorType(scalar, self.lanes)

    def _constant(self, scalar: Any, value: float) -> ir.Constant:
        if self.lanes == 1:
            return ir.Constant(scalar, value)
        return ir.Constant(self._vector(scalar), [value] * self.lanes)

    def _address(self, array: Any, index: Any, element: Any) -> Any:
        raw = F32 if element == types.float32 else I16
        pointer = self.builder.gep(array, [index])
        return self.builder.bitcast(pointer, self._vector(raw).as_pointer())

    def _call(self, operation: str, *operands: Any) -> Any:
        kind = ir.FunctionType(self.kind, [self.kind] * len(operands))
        width = "f32" if self.lanes == 1 else f"v{self.lanes}f32"
        name = f"llvm.{operation}.{width}"
        return self.builder.call(get_or_insert_function(self.builder.module, kind, name), operands)


class PairVectors(Vectors):
    """Vectors with a lane order that makes loads and stores of 16-bit elements cheap.

    Elements with even indices are in the first half of the lanes, those with odd indices in the
    second half. So two 16-bit elements are loaded as one int32, and a shift and a mask separate
    them. Widening each element would take twice as many instructions.

        array            e0 e1 e2 e3 ... e30 e31
        32 lanes         e0 e2 ... e30 | e1 e3 ... e31
    """

    def load(self, array: Any, index: Any, element: Any) -> Any:
        """Return the raw elements array[index : index + lanes], widened exactly to float32."""
        if element == types.uint16:
            return self.builder.bitcast(self.load_upper(array, index), self.kind)
        return self._shuffle(super().load(array, index, element), _even_then_odd(self.lanes))

    def load_moment(self, array: Any, index: Any, element: Any) -> Any:
        """Load bfloat16 like `load`, and return 0 where |a| is below 2**-126."""
        b = self.builder
        raw = self._load_raw(array, index)
        # On 16-bit lanes: half as many instructions as `flush_tiny`.
        exponent = b.and_(raw, self._constant(I16, 0x7F80))
        tiny = b.icmp_unsigned("==", exponent, self._constant(I16, 0))
        flushed = b.select(tiny, self._constant(I16, 0), raw)
        return b.bitcast(self._take_apart(flushed), self.kind)

    def store(self, value: Any, array: Any, index: Any, element: Any) -> None:
        """Write float32 or float16 to array[index : index + lanes], rounded to raw elements."""
        super().store(self._shuffle(value, _interleaved(self.lanes)), array, index, element)

    def load_upper(self, array: Any, index: Any) -> Any:
        """Return 16-bit elements in the upper halves of int32 lanes; the lower halves are 0."""
        return self._take_apart(self._load_raw(array, index))

    def _load_raw(self, array: Any, index: Any) -> Any:
        pointer = self.builder.gep(array, [index])
        raw = self.builder.load(self.builder.bitcast(pointer, self._vector(I16).as_pointer()))
        raw.align = 2
        return raw

    def _take_apart(self, raw: Any) -> Any:
        b = self.builder
        pairs = b.bitcast(raw, ir.VectorType(I32, self.lanes // 2))
        even = b.shl(pairs, self._constant_pair(16))
        odd = b.and_(pairs, self._constant_pair(0xFFFF0000))
        return self.concatenate(even, odd)

    def store_upper(self, bits: Any, array: Any, index: Any) -> None:
        """Write the upper halves of int32 lanes as 16-bit elements."""
        pairs = self._pairs_of_upper(bits)
        self.builder.store(pairs, self._address_of_pairs(array, index)).align = 2

    def _pairs_of_upper(self, bits: Any) -> Any:
        """Return the upper halves of int32 lanes in the array's order, two in each int32."""
        b = self.builder
        even, odd = self._halves(bits)
        even = b.lshr(even, self._constant_pair(16))
        odd = b.and_(odd, self._constant_pair(0xFFFF0000))
        return b.or_(even, odd)

    def _halves(self, lanes: Any) -> tuple[Any, Any]:
        """Return the lanes of even elements, and those of odd elements."""
        count = self.lanes // 2
        return self._shuffle(lanes, range(count)), self._shuffle(lanes, range(count, 2 * count))

    def load_split(self, upper: Any, remainder: Any, index: Any) -> Any:
        """Return the float32 whose halves are in two arrays of 16-bit elements."""
        shifted = self.load_upper(remainder, index)
        signed = self.builder.ashr(shifted, self._constant(I32, 16))
        return self.join(self.load_upper(upper, index), signed)

    def store_split(self, value: Any, upper: Any, remainder: Any, index: Any) -> None:
        """Write float32 lanes to two arrays of 16-bit elements, see `split`."""
        high, low = self.split(value)
        self.store_upper(high, upper, index)
        self.store_upper(self.builder.shl(low, self._constant(I32, 16)), remainder, index)

    def halves_of(self, words: Any) -> tuple[Any, Any]:
        """Return two vectors of 16 random bits a lane, from one 32-bit word for each pair of lanes.

        The even lane has the low half of the word in the first vector and the high half in the
        second vector. The odd lane has the halves in the other order.
        """
        b = self.builder
        low = b.and_(words, self._constant_pair(0xFFFF))
        high = b.lshr(words, self._constant_pair(16))
        return self.concatenate(low, high), self.concatenate(high, low)

    def concatenate(self, even: Any, odd: Any) -> Any:
        """Return one vector of the lanes of `even`, then those of `odd`."""
        return self.builder.shuffle_vector(even, odd, _lane_numbers(range(self.lanes)))

    def _shuffle(self, value: Any, lanes: Iterable[int]) -> Any:
        return self.builder.shuffle_vector(value, value, _lane_numbers(lanes))

    def _constant_pair(self, value: int) -> ir.Constant:
        count = self.lanes // 2
        return ir.Constant(ir.VectorType(I32, count), [value] * count)

    def _address_of_pairs(self, array: Any, index: Any) -> Any:
        pairs = ir.VectorType(I32, self.lanes // 2)
        return self.builder.bitcast(self.builder.gep(array, [index]), pairs.as_pointer())


def _even_then_odd(count: int) -> list[int]:
    return [*range(0, count, 2), *range(1, count, 2)]


def _interleaved(count: int) -> list[int]:
    return [place // 2 + place % 2 * (count // 2) for place in range(count)]


def _lane_numbers(lanes: Iterable[int]) -> ir.Constant:
    numbers = list(lanes)
    return ir.Constant(ir.VectorType(I32, len(numbers)), numbers)


def emit_nontemporal(builder: Any, vector: Any, pointer: Any) -> Any:
    """Emit a store that bypasses the caches, to an address aligned to the whole vector."""
    stored = builder.store(vector, pointer)
    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
    return stored


def emit_prefetch(builder: Any, address: Any, *, for_writing: bool) -> None:
    """Emit a prefetch of the cache line at an address; an invalid address is ignored."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    keep_close, is_data = ir.Constant(I32, 3), ir.Constant(I32, 1)
    address = builder.bitcast(address, byte)
    builder.call(function, [address, ir.Constant(I32, int(for_writing)), keep_close, is_data])


def emit_prefetches(
    builder: Any, array: Any, *, itemsize: int, start_nbytes: int, nbytes: int
) -> None:
    """Emit prefetches of all cache lines of a range for reading; invalid addresses are ignored.

    Args:
        array: address of elements of `itemsize` bytes.
        start_nbytes: distance from `array` to the start of the range.
        nbytes: length of the range, a multiple of `LINE_NBYTES`.
    """
    for offset in range(start_nbytes, start_nbytes + nbytes, LINE_NBYTES):
        line = builder.gep(array, [ir.Constant(I32, offset // itemsize)])
        emit_prefetch(builder, line, for_writing=False)
