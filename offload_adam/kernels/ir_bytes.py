"""Emit conversions between float32 lanes and 8-bit elements, see `codes`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from offload_adam.kernels import codes
from offload_adam.kernels.ir_vectors import F32, I16, I32, PairVectors
from offload_adam.kernels.numba_private import get_or_insert_function

I8 = ir.IntType(8)

_VAL_SHIFT = codes.CODE_SHIFT - 16  # in the upper half of a float32
_MAGNITUDE_SHIFT = codes.AVG_SHIFT - 16


class ByteVectors(PairVectors):
    """Adds 8-bit elements to `PairVectors`.

    Most steps work on 16-bit lanes, which are the upper halves of float32. They take half as many
    instructions as on 32-bit lanes.
    """

    def load_sq(self, array: Any, index: Any, first: Any) -> Any:
        """Return the second moment from its codes, in units of the block's scale.

        Args:
            first: int32, the upper 12 bits of the float32 that code 0 stands for.
        """
        b = self.builder
        code = b.add(self._load_bytes(array, index), self.splat(b.trunc(first, I16)))
        upper = b.shl(code, self._constant(I16, _VAL_SHIFT))
        return b.bitcast(self._take_apart(upper), self.kind)

    def rounded_sq(self, x: Any, word: Any) -> Any:
        """Return the bits of the second moment plus random bits; the upper 12 are its code.

        Args:
            x: the second moment in units of the block's scale.
            word: int32 lanes, random.
        """
        random = self.builder.lshr(word, self._constant(I32, 32 - codes.CODE_SHIFT))
        return self.builder.add(self.bits(x), random)

    def store_sq(self, rounded: Any, first: Any, array: Any, index: Any) -> None:
        """Write the codes of the second moment.

        Args:
            rounded: from `rounded_sq`.
            first: int32, the upper 12 bits of the float32 that code 0 stands for.
        """
        b = self.builder
        upper = self._upper_lanes(rounded)
        code = b.lshr(upper, self._constant(I16, _VAL_SHIFT))
        code = self._call_on_16("usub.sat", code, self.splat(b.trunc(first, I16)))
        self._store_bytes(code, array, index)

    def load_avg(self, array: Any, index: Any, exponent: Any) -> Any:
        """Return the first moment from its codes.

        Args:
            exponent: int32, the block's exponent e.
        """
        b = self.builder
        code = self._load_bytes(array, index)
        smallest = b.shl(exponent, ir.Constant(I32, 23))
        magnitude = b.and_(code, self._constant(I16, codes.LARGEST_MAGNITUDE))
        magnitude = b.shl(magnitude, self._constant(I16, _MAGNITUDE_SHIFT))
        upper = b.add(magnitude, self.splat(b.trunc(b.lshr(smallest, ir.Constant(I32, 16)), I16)))
        shifted = b.bitcast(self._take_apart(upper), self.kind)
        value = b.fsub(shifted, self.splat(b.bitcast(smallest, F32)))
        sign = b.shl(code, self._constant(I16, 8))
        sign = b.and_(self._take_apart(sign), self._constant(I32, 1 << 31))
        return b.bitcast(b.xor(self.bits(value), sign), self.kind)

    def store_avg(self, m: Any, word: Any, exponent: Any, array: Any, index: Any) -> None:
        """Write the codes of the first moment, rounded stochastically.

        Args:
            word: int32 lanes, random.
            exponent: int32, the block's exponent e.
        """
        b = self.builder
        smallest = self.splat(b.bitcast(b.shl(exponent, ir.Constant(I32, 23)), F32))
        shifted = b.fadd(b.bitcast(self.magnitude_bits(m), self.kind), smallest)
        random = b.and_(word, self._constant(I32, (1 << codes.AVG_SHIFT) - 1))
        upper = self._upper_lanes(b.add(self.bits(shifted), random))
        magnitude = b.lshr(upper, self._constant(I16, _MAGNITUDE_SHIFT))
        first = b.trunc(b.shl(exponent, ir.Constant(I32, 23 - codes.AVG_SHIFT)), I16)
        magnitude = b.sub(magnitude, self.splat(first))
        largest = self._constant(I16, codes.LARGEST_MAGNITUDE)
        magnitude = self._call_on_16("umin", magnitude, largest)
        sign = b.lshr(self._upper_lanes(self.bits(m)), self._constant(I16, 8))
        sign = b.and_(sign, self._constant(I16, codes.SIGN_BIT))
        self._store_bytes(b.or_(magnitude, sign), array, index)

    def load_split_24(self, upper: Any, remainder: Any, index: Any) -> Any:
        """Return the float32 of a bfloat16 and an 8-bit remainder in two arrays."""
        shifted = self.builder.shl(self._load_bytes(remainder, index), self._constant(I16, 8))
        signed = self.builder.ashr(self._take_apart(shifted), self._constant(I32, 16))
        return self.join(self.load_upper(upper, index), signed)

    def store_split_24(self, value: Any, word: Any, upper: Any, remainder: Any, index: Any) -> None:
        """Write float32 lanes to a bfloat16 and an 8-bit array, see `split_24`."""
        b = self.builder
        high, low = self.split_24(value, word)
        self.store_upper(high, upper, index)
        low = self._upper_lanes(b.shl(low, self._constant(I32, 16)))
        self._store_bytes(b.lshr(low, self._constant(I16, 8)), remainder, index)

    def larger_bits(self, a: Any, b: Any) -> Any:
        """Return the larger of signed int32 lanes."""
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def largest_bits(self, a: Any) -> Any:
        """Return the largest of signed int32 lanes as a scalar."""
        kind = ir.FunctionType(I32, [self._vector(I32)])
        name = f"llvm.vector.reduce.smax.v{self.lanes}i32"
        return self.builder.call(get_or_insert_function(self.builder.module, kind, name), [a])

    def _load_bytes(self, array: Any, index: Any) -> Any:
        """Return 8-bit elements as 16-bit lanes, in the array's order; the upper bytes are 0."""
        loaded = self.builder.load(self._address_of_bytes(array, index))
        loaded.align = 1
        return self.builder.zext(loaded, self._vector(I16))

    def _store_bytes(self, lanes: Any, array: Any, index: Any) -> None:
        """Write the low bytes of 16-bit lanes, which are in the array's order."""
        narrow = self.builder.trunc(lanes, self._vector(I8))
        self.builder.store(narrow, self._address_of_bytes(array, index)).align = 1

    def _upper_lanes(self, bits: Any) -> Any:
        """Return the upper halves of int32 lanes as 16-bit lanes, in the array's order."""
        return self.builder.bitcast(self._pairs_of_upper(bits), self._vector(I16))

    def _address_of_bytes(self, array: Any, index: Any) -> Any:
        pointer = self.builder.gep(array, [index])
        return self.builder.bitcast(pointer, self._vector(I8).as_pointer())

    def _call_on_16(self, operation: str, a: Any, b: Any) -> Any:
        lanes = self._vector(I16)
        kind = ir.FunctionType(lanes, [lanes, lanes])
        name = f"llvm.{operation}.v{self.lanes}i16"
        return self.builder.call(get_or_insert_function(self.builder.module, kind, name), [a, b])
