"""Emit float32 arithmetic on vectors, which computes the same bits for any number of lanes.

Only IEEE 754 operations are emitted, and LLVM may not contract or reorder any of them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from offload_adam.kernels.numba_private import get_or_insert_function

I16 = ir.IntType(16)
I32 = ir.IntType(32)
F32 = ir.FloatType()


class Vectors:
    """Emits instructions on vectors of `lanes` float32 at the builder's position.

    One lane is a scalar, because LLVM's own vectoriser does not accept <1 x float>.

    "Raw" elements are elements as an array holds them: float32, or the bits of bfloat16 (uint16) or
    float16 (int16). The parameter `element` is their Numba type, which identifies the format.
    """

    def __init__(self, builder: Any, lanes: int) -> None:
        self.lanes = lanes
        self.kind = self._vector(F32)
        self._builder = builder

    def splat(self, value: Any) -> Any:
        """Return a scalar float32 in every lane."""
        if self.lanes == 1:
            return value
        empty = ir.Constant(self.kind, ir.Undefined)
        first = self._builder.insert_element(empty, value, ir.Constant(I32, 0))
        return self._builder.shuffle_vector(first, empty, self._constant(I32, 0))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c with one rounding."""
        return self._call("fma", a, b, c)

    def sqrt(self, a: Any) -> Any:
        """Return the square root."""
        return self._call("sqrt", a)

    def larger(self, a: Any, b: Any) -> Any:
        """Return a where it is above b, else b."""
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def where_infinite(self, a: Any, infinite: Any, otherwise: Any) -> Any:
        """Return `infinite` where a is positive infinity, else `otherwise`."""
        is_infinite = self._builder.fcmp_ordered("==", a, self._constant(F32, float("inf")))
        return self._builder.select(is_infinite, infinite, otherwise)

    def zeros(self) -> Any:
        """Return 0 in every lane."""
        return self._constant(F32, 0.0)

    def flush_tiny(self, a: Any) -> Any:
        """Return 0 where |a| is below the smallest normal number (2**-126), else a."""
        # Tests the exponent's bits, because comparing floats is itself slow on denormals.
        exponent = self._builder.and_(self._bits(a), self._constant(I32, 0x7F800000))
        tiny = self._builder.icmp_unsigned("==", exponent, self._constant(I32, 0))
        return self._builder.select(tiny, self.zeros(), a)

    def load(self, array: Any, index: Any, element: Any) -> Any:
        """Return the raw elements array[index : index + lanes], widened exactly to float32."""
        pointer = self._address(array, index, element)
        loaded = self._builder.load(pointer)
        # By default LLVM assumes the alignment of the whole vector; such a load would fault.
        loaded.align = element.bitwidth // 8
        return self.widen(loaded, element)

    def store(self, value: Any, array: Any, index: Any, element: Any) -> None:
        """Write to array[index : index + lanes], rounded to raw elements."""
        pointer = self._address(array, index, element)
        self._builder.store(self.round(value, element), pointer).align = element.bitwidth // 8

    def store_nontemporal(self, value: Any, array: Any, index: Any, element: Any) -> None:
        """Write like `store`, but bypass the caches; the address is aligned to the whole vector.

        An ordinary store first reads the cache line that it writes to.
        """
        pointer = self._address(array, index, element)
        stored = self._builder.store(self.round(value, element), pointer)
        stored.align = element.bitwidth // 8 * self.lanes
        one = self._builder.module.add_metadata([ir.Constant(I32, 1)])
        stored.set_metadata("nontemporal", one)

    def widen(self, raw: Any, element: Any) -> Any:
        """Return raw elements as float32, exactly."""
        builder = self._builder
        if element == types.float32:
            return raw
        if element == types.int16:
            half = builder.bitcast(raw, self._vector(ir.HalfType()))
            return builder.fpext(half, self.kind)
        wide = builder.zext(raw, self._vector(I32))
        return builder.bitcast(builder.shl(wide, self._constant(I32, 16)), self.kind)

    def round(self, value: Any, element: Any) -> Any:
        """Return float32 rounded to raw elements, to nearest even; a NaN stays a NaN."""
        builder = self._builder
        if element == types.float32:
            return value
        if element == types.int16:
            half = builder.fptrunc(value, self._vector(ir.HalfType()))
            return builder.bitcast(half, self._vector(I16))
        # To nearest even: add 0x7FFF, plus 1 if the lowest kept bit is 1; then drop 16 bits. So a
        # tie rounds up only if the lowest kept bit is 1.
        bits = self._bits(value)
        odd = builder.and_(builder.lshr(bits, self._constant(I32, 16)), self._constant(I32, 1))
        rounded = builder.add(builder.add(bits, self._constant(I32, 0x7FFF)), odd)
        # The addition could turn a NaN into an infinity or a number: set its quiet bit instead.
        quiet = builder.or_(bits, self._constant(I32, 0x400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(is_nan, quiet, rounded)
        return builder.trunc(builder.lshr(chosen, self._constant(I32, 16)), self._vector(I16))

    def _bits(self, value: Any) -> Any:
        return self._builder.bitcast(value, self._vector(I32))

    def _vector(self, scalar: Any) -> Any:
        return scalar if self.lanes == 1 else ir.VectorType(scalar, self.lanes)

    def _constant(self, scalar: Any, value: float) -> ir.Constant:
        if self.lanes == 1:
            return ir.Constant(scalar, value)
        return ir.Constant(self._vector(scalar), [value] * self.lanes)

    def _address(self, array: Any, index: Any, element: Any) -> Any:
        raw = F32 if element == types.float32 else I16
        pointer = self._builder.gep(array, [index])
        return self._builder.bitcast(pointer, self._vector(raw).as_pointer())

    def _call(self, operation: str, *operands: Any) -> Any:
        kind = ir.FunctionType(self.kind, [self.kind] * len(operands))
        width = "f32" if self.lanes == 1 else f"v{self.lanes}f32"
        name = f"llvm.{operation}.{width}"
        return self._builder.call(
            get_or_insert_function(self._builder.module, kind, name), operands
        )
