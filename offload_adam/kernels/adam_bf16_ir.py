"""The Adam update with bfloat16 moments of one contiguous range, as vector instructions in LLVM IR.

The loop updates whole blocks of 128 elements of the unsharded parameter, because the random bits of
a block come from one hash. If a range begins or ends within a block, its elements there are copied
to a block on the stack, updated by the same code, and copied back:

    blocks      |------ 0 ------|------ 1 ------|------ 2 ------|------ 3 ------|
    range              |==================================================|
    updated     |on the stack   |    in place   |    in place   |on the stack   |

A block is four vectors of 32 elements. Each vector's weights are updated after the moments of the
next vector, so that the latency of square root and division does not delay the loads. A longer
pipeline would need more registers than AVX2 and AVX-512 have.

All stores are ordinary, not nontemporal: the kernel also reads every array that it writes, except
`param_out`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from offload_adam.kernels.adam_formula import (
    Formula,
    addresses_of,
    element_of,
    emit_both,
    load_scalars,
)
from offload_adam.kernels.ir_vectors import PairVectors, emit_prefetches
from offload_adam.kernels.numba_private import (
    alloca_once,
    array_struct,
    for_range_slice,
    get_or_insert_function,
    llvm_type,
    no_value,
)
from offload_adam.kernels.random_bits import BlockWords
from offload_adam.layout.flat import BLOCK_NUMEL

_LANES = 32  # one AVX-512 register of 16-bit elements, two of float32
# Distance between the updated and the prefetched block: eight blocks of 16-bit elements. With a
# shorter distance, the lines do not arrive from memory in time.
_PREFETCH_NBYTES = 2048
_INTP = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_NOT_VOLATILE = ir.Constant(ir.IntType(1), 0)  # an argument of memcpy and memset


class _Arrays(NamedTuple):
    """One value for each array: its address, or the type of its elements; None if it is absent."""

    gradient: Any
    master: Any
    remainder: Any
    exp_avg: Any
    exp_avg_sq: Any
    param_out: Any


class _Block:
    """Emits the update of one block, vector by vector."""

    def __init__(self, builder: Any, plain: bool, scalars: list[Any], elements: _Arrays) -> None:
        self._vectors = PairVectors(builder, _LANES)
        self._formula = Formula(self._vectors, plain, scalars)
        self._elements = elements

    def update(self, block: _Arrays, words: BlockWords) -> None:
        """Emit the update of one block.

        Args:
            block: addresses of the block's first elements.
            words: random words of the block.
        """
        for array in block:
            if array is not None:
                emit_prefetches(
                    self._vectors.builder,
                    array,
                    itemsize=_itemsize(array),
                    start_nbytes=_PREFETCH_NBYTES,
                    nbytes=BLOCK_NUMEL * _itemsize(array),
                )
        pending = self._moments(block, 0, words)
        for start in range(_LANES, BLOCK_NUMEL, _LANES):
            following = self._moments(block, start, words)
            self._weight(block, start - _LANES, *pending)
            pending = following
        self._weight(block, BLOCK_NUMEL - _LANES, *pending)

    def _moments(self, block: _Arrays, start: int, words: BlockWords) -> tuple[Any, Any]:
        """Emit the update of a vector's moments; return its direction and denominator's root."""
        v, formula, i = self._vectors, self._formula, _constant(start)
        gradient = v.load(block.gradient, i, self._elements.gradient)
        weight = None if formula.plain else self._load_weight(block, i)
        g = formula.gradient(gradient, weight)
        m = formula.exp_avg(v.load_moment(block.exp_avg, i, types.uint16), g)
        second = formula.exp_avg_sq(v.load_moment(block.exp_avg_sq, i, types.uint16), g)
        bits_of_second, bits_of_first = v.halves_of(words.of_pairs(start // 2, _LANES // 2))
        v.store_upper(v.stochastic(m, bits_of_first), block.exp_avg, i)
        v.store_upper(v.stochastic(second, bits_of_second), block.exp_avg_sq, i)
        return formula.direction(m, g, second), v.sqrt(second)

    def _weight(self, block: _Arrays, start: int, direction: Any, root: Any) -> None:
        """Emit the update of a vector's weights, and the store of `param_out` if there is one."""
        v, i = self._vectors, _constant(start)
        quotient = self._formula.quotient(direction, root)
        weight = self._formula.weight(self._load_weight(block, i), quotient)
        if block.remainder is None:
            v.store(weight, block.master, i, types.float32)
        else:
            v.store_split(weight, block.master, block.remainder, i)
        if block.param_out is not None:
            v.store(weight, block.param_out, i, self._elements.param_out)

    def _load_weight(self, block: _Arrays, i: Any) -> Any:
        if block.remainder is None:
            return self._vectors.load(block.master, i, types.float32)
        return self._vectors.load_split(block.master, block.remainder, i)


@intrinsic
def adam_bf16_ir(
    typingctx: Any,
    gradient: Any,
    master: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    param_out: Any,
    key: Any,
    index: Any,
    scalars: Any,
) -> Any:
    """Update one range of elements, see `update_range`."""
    given = (gradient, master, remainder, exp_avg, exp_avg_sq, param_out)
    elements = _Arrays(*map(element_of, given))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = _Arrays(*addresses_of(context, builder, given, arguments))
        key, index = arguments[len(given) : len(given) + 2]
        numel = array_struct(context, builder, gradient, arguments[0]).nitems
        values = load_scalars(context, builder, scalars, arguments[-1])
        kinds = [None if one is None else llvm_type(context, one) for one in elements]
        # Allocated outside of loops: stack memory is freed only when the function returns.
        stack = _Arrays(*(None if kind is None else _stack_block(builder, kind) for kind in kinds))

        def emit(plain: bool) -> None:
            block = _Block(builder, plain, values, elements)
            _emit_spans(builder, block, arrays, stack, numel, key, index)

        emit_both(builder, values, emit)
        return no_value(context)

    return types.void(*given, types.int64, types.int64, scalars), codegen


def update_range(
    gradient: Any,
    master: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    param_out: Any,
    key: Any,
    index: Any,
    scalars: Any,
) -> None:
    """Update one range of elements, see `adam_plain.update_range`; the moments are bfloat16.

    `max_exp_avg_sq` is None: there is no amsgrad for this format.
    """
    adam_bf16_ir(gradient, master, remainder, exp_avg, exp_avg_sq, param_out, key, index, scalars)


def _emit_spans(
    builder: Any,
    block: _Block,
    arrays: _Arrays,
    stack: _Arrays,
    numel: Any,
    key: Any,
    index: Any,
) -> None:
    """Emit the update of three spans of a range: partial first block, whole blocks, the rest."""
    b = builder
    rest_of_block = b.and_(b.neg(index), _constant(BLOCK_NUMEL - 1))
    lead = _smaller(b, rest_of_block, numel)
    whole = b.and_(b.sub(numel, lead), _constant(-BLOCK_NUMEL))
    # A loop over the three spans, so that the code for a block is emitted only once.
    spans = for_range_slice(b, _constant(0), _constant(3), _constant(1), _INTP)
    with spans as (span, _):
        is_whole = b.icmp_signed("==", span, _constant(1))
        is_first = b.icmp_signed("==", span, _constant(0))
        start = b.select(is_first, _constant(0), b.select(is_whole, lead, b.add(lead, whole)))
        end = b.select(is_first, lead, b.select(is_whole, b.add(lead, whole), numel))
        is_partial = b.and_(b.not_(is_whole), b.icmp_signed("<", start, end))
        first = b.add(index, start)
        first_in_block = b.and_(first, _constant(BLOCK_NUMEL - 1))
        copies = _Copies(b, arrays, stack, start, end, first_in_block)
        with b.if_then(is_partial, likely=False):
            copies.to_stack()
        in_place = _each(lambda array: b.gep(array, [start]), arrays)
        blocks = _each(lambda array, copy: b.select(is_whole, array, copy), in_place, stack)
        first_block = b.lshr(first, _constant(BLOCK_NUMEL.bit_length() - 1))
        loop = for_range_slice(b, start, end, _constant(BLOCK_NUMEL), _INTP)
        with loop as (_, done):
            offset = b.mul(done, _constant(BLOCK_NUMEL))
            current = _each(lambda array: b.gep(array, [offset]), blocks)
            block.update(current, BlockWords(b, key, b.add(first_block, done)))
        with b.if_then(is_partial, likely=False):
            copies.from_stack()


class _Copies:
    """Emits the copies of a part of a block between the arrays and the stack."""

    def __init__(
        self,
        builder: Any,
        arrays: _Arrays,
        stack: _Arrays,
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
        nbytes = b.mul(self._numel, _constant(_itemsize(target)))
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _BYTES, _INTP, ir.IntType(1)])
        copy = get_or_insert_function(b.module, kind, "llvm.memcpy.p0.p0.i64")
        b.call(copy, [b.bitcast(target, _BYTES), b.bitcast(source, _BYTES), nbytes, _NOT_VOLATILE])

    def _clear(self, block: Any) -> None:
        b = self._builder
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, ir.IntType(8), _INTP, ir.IntType(1)])
        fill = get_or_insert_function(b.module, kind, "llvm.memset.p0.i64")
        nbytes = _constant(BLOCK_NUMEL * _itemsize(block))
        zero = ir.Constant(ir.IntType(8), 0)
        b.call(fill, [b.bitcast(block, _BYTES), zero, nbytes, _NOT_VOLATILE])


def _each(function: Any, *arrays: _Arrays) -> _Arrays:
    """Apply a function to the values of each array; the result is None for an absent array."""
    groups = zip(*arrays, strict=True)
    return _Arrays(*(None if group[0] is None else function(*group) for group in groups))


def _stack_block(builder: Any, kind: Any) -> Any:
    """Allocate a block of elements on the stack, and return the address of the first."""
    block = alloca_once(builder, ir.ArrayType(kind, BLOCK_NUMEL))
    return builder.bitcast(block, kind.as_pointer())


def _itemsize(address: Any) -> int:
    kind = address.type.pointee
    return 4 if isinstance(kind, ir.FloatType) else int(kind.width) // 8


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INTP, value)
