"""Random bits for stochastic rounding: a function of a key and an element's index, without state.

The index g is that of the element in the unsharded parameter. So the bits do not depend on the
number of ranks or threads, and a resumed run has the same bits as a run without interruption.

    key of a step         splitmix64(name_key + step * 0x9E3779B97F4A7C15)
    block of 128          K = splitmix64(key ^ (g // 128) * 0xD1342543DE82EF95)
                          k1 = low half of K, k2 = high half of K | 1
    pair p of 64          x = (C[p] + k1) * k2 mod 2**32
                          word = x ^ (x >> 13)
    element g             low half of the word if g is even, else the high half, for `exp_avg_sq`;
                          the other half for `exp_avg`

State of 8 bits takes one word for each element instead. Its blocks are blocks of this rank's part
of a parameter, and may begin anywhere in the unsharded parameter:

    block of 128          K = splitmix64(key ^ index of its first element * 0xD1342543DE82EF95)
    element j of 128      x = (C[j] + k1) * k2 mod 2**32, word = x ^ (x >> 13)

C[p] are constants, see `_pair_constants`. Each pair needs one 32-bit multiplication. A full hash of
every element would double the arithmetic of an update. Within a block, words are almost pairwise
independent, because k1 and the odd k2 are random. The low 7 bits of C[p] are p. Otherwise two
constants could differ by a large power of 2, and their words would be correlated.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (splitmix64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from offload_adam.kernels.ir_vectors import I32, Vectors
from offload_adam.kernels.random_keys import INCREMENT, LAST_SHIFT, XOR_SHIFTS, splitmix64
from offload_adam.layout.flat import BLOCK_NUMEL

I64 = ir.IntType(64)

_BLOCK_MULTIPLIER = 0xD1342543DE82EF95
_WORD_SHIFT = 13
_FIRST_CONSTANT = 1000  # C[p] is made from splitmix64(1000 + p)


def _pair_constants() -> list[int]:
    """Return C. The low 7 bits of C[p] are p, the other 25 bits are pseudorandom."""
    states = np.arange(BLOCK_NUMEL, dtype=np.uint64) + np.uint64(_FIRST_CONSTANT)
    low_bits = BLOCK_NUMEL - 1
    return [
        (int(hashed) & 0xFFFFFFFF & ~low_bits) | place
        for place, hashed in enumerate(splitmix64(states))
    ]


_CONSTANTS = _pair_constants()


class BlockWords:
    """Emits the random words of one block of 128 elements."""

    def __init__(self, builder: Any, key: Any, block: Any) -> None:
        """Emit the hash of the block.

        Args:
            key: int64, the step's key.
            block: int64, identifies the block in its parameter.
        """
        self._builder = builder
        state = builder.xor(key, builder.mul(block, _constant(_BLOCK_MULTIPLIER)))
        hashed = _emit_splitmix64(builder, state)
        self._added = builder.trunc(hashed, I32)
        high = builder.trunc(builder.lshr(hashed, _constant(32)), I32)
        self._multiplier = builder.or_(high, ir.Constant(I32, 1))

    def of_pairs(self, first: int, count: int) -> Any:
        """Return the words of pairs [first, first + count) as a vector."""
        return self.of_places(range(first, first + count))

    def of_places(self, places: Sequence[int]) -> Any:
        """Return the words of several constants as a vector."""
        count = len(places)
        constants = ir.VectorType(I32, count)([_CONSTANTS[place] for place in places])
        vectors = Vectors(self._builder, count)
        return self._mix(constants, vectors.splat(self._added), vectors.splat(self._multiplier))

    def of_place(self, place: Any) -> Any:
        """Return the word of one constant as int32; `place` is int64."""
        address = self._builder.gep(_table(self._builder.module), [_constant(0), place])
        return self._mix(self._builder.load(address), self._added, self._multiplier)

    def of_element(self, place: Any) -> Any:
        """Return the 16 bits of one element as int32; `place` is its place in the block, int64."""
        builder = self._builder
        word = self.of_place(builder.lshr(place, _constant(1)))
        odd = builder.trunc(builder.and_(place, _constant(1)), I32)
        half = builder.lshr(word, builder.shl(odd, ir.Constant(I32, 4)))
        return builder.and_(half, ir.Constant(I32, 0xFFFF))

    def _mix(self, constants: Any, added: Any, multiplier: Any) -> Any:
        builder = self._builder
        x = builder.mul(builder.add(constants, added), multiplier)
        shift = _WORD_SHIFT
        amount = ir.Constant(x.type, shift if x.type == I32 else [shift] * x.type.count)
        return builder.xor(x, builder.lshr(x, amount))


@intrinsic
def random_bits(typingctx: Any, key: Any, index: Any) -> Any:
    """Return the 16 random bits of element `index` of a parameter, as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        key, index = arguments
        # Shift and mask instead of a division: BLOCK_NUMEL is a power of 2, and index is not
        # negative.
        block = builder.lshr(index, _constant(BLOCK_NUMEL.bit_length() - 1))
        place = builder.and_(index, _constant(BLOCK_NUMEL - 1))
        return BlockWords(builder, key, block).of_element(place)

    return types.uint32(types.int64, types.int64), codegen


@intrinsic
def random_word(typingctx: Any, key: Any, index: Any, place: Any) -> Any:
    """Return the 32 random bits of one element of a block, as int32.

    Args:
        index: of the block's first element in its parameter.
        place: number of the element in the block.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        key, index, place = arguments
        return BlockWords(builder, key, index).of_place(place)

    return types.int32(types.int64, types.int64, types.int64), codegen


def _emit_splitmix64(builder: Any, state: Any) -> Any:
    z = builder.add(state, _constant(INCREMENT))
    for shift, multiplier in XOR_SHIFTS:
        z = builder.mul(builder.xor(z, builder.lshr(z, _constant(shift))), _constant(multiplier))
    return builder.xor(z, builder.lshr(z, _constant(LAST_SHIFT)))


def _table(module: Any) -> Any:
    """Return the address of C in the LLVM module; add C to the module at the first call."""
    name = "offload_adam.random_bits.constants"
    if name in module.globals:
        return module.globals[name]
    kind = ir.ArrayType(I32, len(_CONSTANTS))
    table = ir.GlobalVariable(module, kind, name)
    table.linkage = "internal"
    table.global_constant = True
    table.initializer = kind(_CONSTANTS)
    return table


def _constant(value: int) -> ir.Constant:
    return ir.Constant(I64, value)
