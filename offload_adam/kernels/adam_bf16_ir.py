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

from typing import Any

from numba import types
from numba.extending import intrinsic

from offload_adam.kernels.adam_formula import (
    Formula,
    addresses_of,
    element_of,
    emit_both,
    load_scalars,
)
from offload_adam.kernels.ir_blocks import (
    INTP,
    Arrays,
    Copies,
    constant,
    each,
    prefetch_ahead,
    stack_blocks,
)
from offload_adam.kernels.ir_vectors import PairVectors
from offload_adam.kernels.numba_private import array_struct, for_range_slice, no_value
from offload_adam.kernels.random_bits import BlockWords
from offload_adam.kernels.undo import BLOCKS
from offload_adam.kernels.undo_ir import UndoEntries, undo_entries
from offload_adam.layout.flat import BLOCK_NUMEL

_LANES = 32  # one AVX-512 register of 16-bit elements, two of float32


class _Block:
    """Emits the update of one block, vector by vector."""

    def __init__(self, builder: Any, plain: bool, scalars: list[Any], elements: Arrays) -> None:
        self._vectors = PairVectors(builder, _LANES)
        self._formula = Formula(self._vectors, plain, scalars)
        self._elements = elements

    def update(self, block: Arrays, words: BlockWords) -> None:
        """Emit the update of one block.

        Args:
            block: addresses of the block's first elements.
            words: random words of the block.
        """
        pending = self._moments(block, 0, words)
        for start in range(_LANES, BLOCK_NUMEL, _LANES):
            following = self._moments(block, start, words)
            self._weight(block, start - _LANES, *pending)
            pending = following
        self._weight(block, BLOCK_NUMEL - _LANES, *pending)

    def _moments(self, block: Arrays, start: int, words: BlockWords) -> tuple[Any, Any]:
        """Emit the update of a vector's moments; return its direction and denominator's root."""
        v, formula, i = self._vectors, self._formula, constant(start)
        gradient = v.load(block.gradient, i, self._elements.gradient)
        weight = None if formula.plain else self._load_weight(block, i)
        g = formula.gradient(gradient, weight)
        m = formula.exp_avg(v.load_moment(block.exp_avg, i, types.uint16), g)
        second = formula.exp_avg_sq(v.load_moment(block.exp_avg_sq, i, types.uint16), g)
        bits_of_second, bits_of_first = v.halves_of(words.of_pairs(start // 2, _LANES // 2))
        v.store_upper(v.stochastic(m, bits_of_first), block.exp_avg, i)
        v.store_upper(v.stochastic(second, bits_of_second), block.exp_avg_sq, i)
        return formula.direction(m, g, second), v.sqrt(second)

    def _weight(self, block: Arrays, start: int, direction: Any, root: Any) -> None:
        """Emit the update of a vector's weights, and the store of `param_out` if there is one."""
        v, i = self._vectors, constant(start)
        quotient = self._formula.quotient(direction, root)
        weight = self._formula.weight(self._load_weight(block, i), quotient)
        if block.remainder is None:
            v.store(weight, block.master, i, types.float32)
        else:
            v.store_split(weight, block.master, block.remainder, i)
        if block.param_out is not None:
            v.store(weight, block.param_out, i, self._elements.param_out)

    def _load_weight(self, block: Arrays, i: Any) -> Any:
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
    area: Any,
    start: Any,
) -> Any:
    """Update one range of elements, see `update_range`."""
    given = (gradient, master, remainder, exp_avg, exp_avg_sq, param_out)
    elements = Arrays(*map(element_of, given))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(*addresses_of(context, builder, given, arguments))
        key, index = arguments[len(given) : len(given) + 2]
        numel = array_struct(context, builder, gradient, arguments[0]).nitems
        values = load_scalars(context, builder, scalars, arguments[-3])
        undo = undo_entries(context, builder, BLOCKS, area, *arguments[-2:])
        stack = stack_blocks(context, builder, elements)

        def emit(plain: bool) -> None:
            block = _Block(builder, plain, values, elements)
            _emit_spans(builder, block, arrays, stack, numel, key, index, undo)

        emit_both(builder, values, emit)
        return no_value(context)

    return types.void(*given, types.int64, types.int64, scalars, area, types.int64), codegen


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
    area: Any,
    start: Any,
) -> None:
    """Update one range of elements, see `adam_plain.update_range`; the moments are bfloat16.

    `max_exp_avg_sq` is None: there is no amsgrad for this format.
    """
    adam_bf16_ir(
        gradient,
        master,
        remainder,
        exp_avg,
        exp_avg_sq,
        param_out,
        key,
        index,
        scalars,
        area,
        start,
    )


def _emit_spans(
    builder: Any,
    block: _Block,
    arrays: Arrays,
    stack: Arrays,
    numel: Any,
    key: Any,
    index: Any,
    undo: UndoEntries | None,
) -> None:
    """Emit the update of three spans of a range: partial first block, whole blocks, the rest."""
    b = builder
    rest_of_block = b.and_(b.neg(index), constant(BLOCK_NUMEL - 1))
    lead = _smaller(b, rest_of_block, numel)
    whole = b.and_(b.sub(numel, lead), constant(-BLOCK_NUMEL))
    # A loop over the three spans, so that the code for a block is emitted only once.
    spans = for_range_slice(b, constant(0), constant(3), constant(1), INTP)
    with spans as (span, _):
        is_whole = b.icmp_signed("==", span, constant(1))
        is_first = b.icmp_signed("==", span, constant(0))
        start = b.select(is_first, constant(0), b.select(is_whole, lead, b.add(lead, whole)))
        end = b.select(is_first, lead, b.select(is_whole, b.add(lead, whole), numel))
        is_partial = b.and_(b.not_(is_whole), b.icmp_signed("<", start, end))
        first = b.add(index, start)
        first_in_block = b.and_(first, constant(BLOCK_NUMEL - 1))
        copies = Copies(b, arrays, stack, start, end, first_in_block)
        with b.if_then(is_partial, likely=False):
            copies.to_stack()
        in_place = each(lambda array: b.gep(array, [start]), arrays)
        blocks = each(lambda array, copy: b.select(is_whole, array, copy), in_place, stack)
        first_block = b.lshr(first, constant(BLOCK_NUMEL.bit_length() - 1))
        loop = for_range_slice(b, start, end, constant(BLOCK_NUMEL), INTP)
        with loop as (at_element, done):
            offset = b.mul(done, constant(BLOCK_NUMEL))
            current = each(lambda array: b.gep(array, [offset]), blocks)
            words = BlockWords(b, key, b.add(first_block, done))
            prefetch_ahead(b, current)
            if undo is not None:
                used = b.select(is_whole, constant(BLOCK_NUMEL), b.sub(end, start))
                undo.push_block(current, at_element, used, first_in_block)
            block.update(current, words)
        with b.if_then(is_partial, likely=False):
            copies.from_stack()


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)
