"""The Adam update with 8-bit codes of one contiguous range, as vector instructions in LLVM IR.

`exp_avg_sq` has 8-bit codes, and `exp_avg` has 8-bit codes or is bfloat16: see `codes`. A range
begins at a block of 128 elements of this rank's part of its parameter, and only its last block may
be partial. This block is copied to the stack, updated by the same code, and copied back.

The update of a block has two parts. The first computes moments and weights, vector by vector, and
the maxima of the moments. The second rounds the moments to codes, because these depend on the
maxima. `adam_8bit_plain` is the same arithmetic in Python.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from offload_adam.kernels import codes
from offload_adam.kernels import scalars as at
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
from offload_adam.kernels.ir_bytes import I8, ByteVectors
from offload_adam.kernels.ir_vectors import F32, I32, Vectors
from offload_adam.kernels.numba_private import (
    alloca_once_value,
    array_struct,
    for_range_slice,
    no_value,
)
from offload_adam.kernels.random_bits import BlockWords
from offload_adam.kernels.undo import BLOCKS
from offload_adam.kernels.undo_ir import UndoEntries, undo_entries
from offload_adam.layout.flat import BLOCK_NUMEL

_LANES = 32  # one AVX-512 register of 16-bit elements, two of float32


class _Scale(NamedTuple):
    """Scalars of one parameter, as LLVM values.

    bits: int32, the bits of its scale D.
    shift: int64, D was multiplied by 2**shift in this update.
    root_of_rest: float32, the root of 1 - beta2.
    """

    bits: Any
    shift: Any
    root_of_rest: Any


class _Stored(NamedTuple):
    """How the stored moments of a block are to be read, as LLVM values.

    exponent: int32, exponent of the first moment; not used if it is bfloat16.
    first_code: int32, the upper 12 bits of the float32 that code 0 of the second moment stands for.
    by: float32, factor from gradients to roots of the second moment in the block's scale.
    """

    exponent: Any
    first_code: Any
    by: Any


class _Moments(NamedTuple):
    """The unrounded moments of a vector, the operands of its quotient, and its random words.

    The second moment is int32, the bits of its value in units of the block's scale, after the
    random bits that round it were added.
    """

    first: Any
    second: Any
    numerator: Any
    root: Any
    words: Any


class _Block:
    """Emits the update of one block."""

    def __init__(self, builder: Any, plain: bool, scalars: list[Any], elements: Arrays) -> None:
        self._vectors = ByteVectors(builder, _LANES)
        self._formula = Formula(self._vectors, plain, scalars)
        self._scalars = scalars
        self._elements = elements
        self._has_codes = elements.exp_avg == types.uint8

    def update(self, block: Arrays, exponents: Any, scale: _Scale, words: BlockWords) -> None:
        """Emit the update of one block.

        Args:
            block: addresses of the block's first elements.
            exponents: address of its two exponents.
            scale: scalars of its parameter.
            words: random words of the block.
        """
        b, v = self._vectors.builder, self._vectors
        # Loaded here: LLVM must assume that the stores below change it.
        exponent = b.zext(_exponent(b, exponents, codes.EXP_AVG), I32)
        before = b.zext(_exponent(b, exponents, codes.EXP_AVG_SQ), INTP)
        shifted = b.sub(before, scale.shift)
        before = _clamp_below(b, shifted, codes.SQ_MIN_EXPONENT)
        lost = b.sub(before, shifted)
        most = constant(codes.MOST_LOST_OCTAVES)
        lost = b.trunc(b.select(b.icmp_signed("<", lost, most), lost, most), I32)
        first_code = b.sub(_int(codes.FIRST_CODE), b.shl(lost, _int(3)))
        before = b.trunc(before, I32)
        power = b.shl(b.sub(before, _int(127)), _int(23))
        single = Vectors(b, 1)
        root_of_scale = single.sqrt(b.bitcast(b.add(scale.bits, power), F32))
        by = b.fdiv(scale.root_of_rest, root_of_scale)
        denominator_scale = b.fmul(self._scalars[at.DENOMINATOR_SCALE], root_of_scale)

        # Each vector's weights are updated after the moments of the next vector, so that the
        # latency of square root and division does not delay the loads.
        stored = _Stored(exponent, first_code, by)
        results = [self._moments(block, stored, 0, words)]
        for start in range(_LANES, BLOCK_NUMEL, _LANES):
            results.append(self._moments(block, stored, start, words))
            self._weight(block, start - _LANES, denominator_scale, results[-2])
        # Before the last weights, because the maxima over lanes have a long latency, too.
        new_sq = self._sq_exponent(results, before)
        new_avg = self._avg_exponent(results) if self._has_codes else None
        self._weight(block, BLOCK_NUMEL - _LANES, denominator_scale, results[-1])

        change = b.sub(new_sq, before)
        first_code = b.add(b.shl(change, _int(3)), _int(codes.FIRST_CODE))
        for number, result in enumerate(results):
            start = constant(number * _LANES)
            v.store_sq(result.second, first_code, block.exp_avg_sq, start)
        _store_exponent(b, new_sq, exponents, codes.EXP_AVG_SQ)
        if new_avg is not None:
            for number, result in enumerate(results):
                start = constant(number * _LANES)
                v.store_avg(result.first, result.words, new_avg, block.exp_avg, start)
            _store_exponent(b, new_avg, exponents, codes.EXP_AVG)

    def _moments(self, block: Arrays, stored: _Stored, start: int, words: BlockWords) -> _Moments:
        """Emit the moments of a vector, and the store of a bfloat16 first moment."""
        b, v, formula, i = self._vectors.builder, self._vectors, self._formula, constant(start)
        gradient = v.load(block.gradient, i, self._elements.gradient)
        weight = None if formula.plain else self._load_weight(block, i)
        g = v.zero_above(formula.gradient(gradient, weight), codes.GRADIENT_LIMIT)
        places = range(start, start + _LANES)
        word = words.of_places([*places[::2], *places[1::2]])
        if self._has_codes:
            m = formula.exp_avg(v.load_avg(block.exp_avg, i, stored.exponent), g)
        else:
            m = formula.exp_avg(v.load_moment(block.exp_avg, i, types.uint16), g)
            v.store_upper(v.stochastic(m, v.lower_bits(word, 16)), block.exp_avg, i)
        y = b.fmul(g, v.splat(stored.by))
        x = v.fma(y, y, v.load_sq(block.exp_avg_sq, i, stored.first_code))
        return _Moments(m, v.rounded_sq(x, word), formula.numerator(m, g), v.sqrt(x), word)

    def _weight(self, block: Arrays, start: int, scale: Any, moments: _Moments) -> None:
        """Emit the update of a vector's weights, and the store of `param_out` if there is one."""
        v, i = self._vectors, constant(start)
        quotient = self._formula.quotient(moments.numerator, moments.root, scale)
        weight = self._formula.weight(self._load_weight(block, i), quotient)
        if block.remainder is None:
            v.store(weight, block.master, i, types.float32)
        else:
            v.store_split_24(weight, moments.words, block.master, block.remainder, i)
        if block.param_out is not None:
            v.store(weight, block.param_out, i, self._elements.param_out)

    def _load_weight(self, block: Arrays, i: Any) -> Any:
        if block.remainder is None:
            return self._vectors.load(block.master, i, types.float32)
        return self._vectors.load_split_24(block.master, block.remainder, i)

    def _sq_exponent(self, results: list[_Moments], before: Any) -> Any:
        """Return the new exponent of the second moment as int32."""
        b = self._vectors.builder
        # Of the rounded values: an exponent is then a function of the values that are stored. A
        # load, which has only these, finds the same one. A factor of 2 in the scale would change
        # the last bits of later updates.
        top = self._largest([result.second for result in results])
        top = b.lshr(
            _clamp_below(b, top, codes.FIRST_CODE << codes.CODE_SHIFT), _int(codes.CODE_SHIFT)
        )
        code = b.sub(top, _int(codes.FIRST_CODE))
        wanted = b.add(before, b.ashr(b.sub(code, _int(codes.TOP_CODE)), _int(3)))
        after = _clamp_below(b, wanted, codes.SQ_MIN_EXPONENT)
        largest = _int(codes.SQ_MAX_EXPONENT)
        return b.select(b.icmp_signed("<", after, largest), after, largest)

    def _avg_exponent(self, results: list[_Moments]) -> Any:
        """Return the new exponent of the first moment as int32."""
        b = self._vectors.builder
        top = self._largest([self._vectors.magnitude_bits(result.first) for result in results])
        top = b.lshr(b.add(top, _int(codes.AVG_CARRY)), _int(23))
        exponent = b.sub(top, _int(codes.AVG_OCTAVES))
        return _clamp_below(b, exponent, codes.AVG_MIN_EXPONENT)

    def _largest(self, vectors: list[Any]) -> Any:
        largest = vectors[0]
        for other in vectors[1:]:
            largest = self._vectors.larger_bits(largest, other)
        return self._vectors.largest_bits(largest)


@intrinsic
def adam_8bit_ir(
    typingctx: Any,
    gradient: Any,
    master: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    param_out: Any,
    exponents: Any,
    key: Any,
    row: Any,
    column: Any,
    run: Any,
    pitch: Any,
    scale: Any,
    shift: Any,
    scalars: Any,
    area: Any,
    start: Any,
) -> Any:
    """Update one range of elements, see `adam_8bit_plain.update_range`."""
    given = (gradient, master, remainder, exp_avg, exp_avg_sq, param_out)
    elements = Arrays(*map(element_of, given))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = Arrays(*addresses_of(context, builder, given, arguments))
        table = array_struct(context, builder, exponents, arguments[len(given)]).data
        key, row, column, run, pitch, scale, shift = arguments[len(given) + 1 : -3]
        numel = array_struct(context, builder, gradient, arguments[0]).nitems
        values = load_scalars(context, builder, scalars, arguments[-3])
        undo = undo_entries(context, builder, BLOCKS, area, *arguments[-2:])
        stack = stack_blocks(context, builder, elements)
        root_of_rest = Vectors(builder, 1).sqrt(values[at.ONE_MINUS_BETA2])
        of_parameter = _Scale(builder.trunc(scale, I32), shift, root_of_rest)

        def emit(plain: bool) -> None:
            block = _Block(builder, plain, values, elements)
            position = _Position(builder, row, column, run, pitch)
            _emit_spans(
                builder, block, arrays, stack, numel, table, of_parameter, key, position, undo
            )

        emit_both(builder, values, emit)
        return no_value(context)

    return types.void(*given, exponents, *[types.int64] * 7, scalars, area, types.int64), codegen


def update_range(
    gradient: Any,
    master: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    param_out: Any,
    exponents: Any,
    key: Any,
    row: Any,
    column: Any,
    run: Any,
    pitch: Any,
    scale: Any,
    shift: Any,
    scalars: Any,
    area: Any,
    start: Any,
) -> None:
    """Update one range of elements, see `adam_8bit_plain.update_range`."""
    adam_8bit_ir(
        gradient,
        master,
        remainder,
        exp_avg,
        exp_avg_sq,
        param_out,
        exponents,
        key,
        row,
        column,
        run,
        pitch,
        scale,
        shift,
        scalars,
        area,
        start,
    )


class _Position:
    """The index of a block's first element in the unsharded parameter, from block to block."""

    def __init__(self, builder: Any, row: Any, column: Any, run: Any, pitch: Any) -> None:
        self._builder = builder
        self._row = alloca_once_value(builder, row)
        self._column = alloca_once_value(builder, column)
        self._run = run
        self._pitch = pitch

    def index(self) -> Any:
        """Emit the index of the block."""
        return self._builder.add(self._builder.load(self._row), self._builder.load(self._column))

    def advance(self) -> None:
        """Emit the step to the next block."""
        b, run = self._builder, self._run
        column = b.add(b.load(self._column), constant(BLOCK_NUMEL))
        b.store(column, self._column)
        # A block ends within the run of most parameters, so a division is rare.
        with b.if_then(b.icmp_signed(">=", column, run), likely=False):
            runs = b.udiv(column, run)
            b.store(b.sub(column, b.mul(runs, run)), self._column)
            b.store(b.add(b.load(self._row), b.mul(runs, self._pitch)), self._row)


def _emit_spans(
    builder: Any,
    block: _Block,
    arrays: Arrays,
    stack: Arrays,
    numel: Any,
    exponents: Any,
    scale: _Scale,
    key: Any,
    position: _Position,
    undo: UndoEntries | None,
) -> None:
    """Emit the update of two spans of a range: the whole blocks, and the rest."""
    b = builder
    whole = b.and_(numel, constant(-BLOCK_NUMEL))
    # A loop over the two spans, so that the code for a block is emitted only once.
    spans = for_range_slice(b, constant(0), constant(2), constant(1), INTP)
    with spans as (span, _):
        is_whole = b.icmp_signed("==", span, constant(0))
        start = b.select(is_whole, constant(0), whole)
        end = b.select(is_whole, whole, numel)
        is_partial = b.and_(b.not_(is_whole), b.icmp_signed("<", start, end))
        copies = Copies(b, arrays, stack, start, end, constant(0))
        with b.if_then(is_partial, likely=False):
            copies.to_stack()
        in_place = each(lambda array: b.gep(array, [start]), arrays)
        blocks = each(lambda array, copy: b.select(is_whole, array, copy), in_place, stack)
        loop = for_range_slice(b, start, end, constant(BLOCK_NUMEL), INTP)
        with loop as (at_element, done):
            offset = b.mul(done, constant(BLOCK_NUMEL))
            current = each(lambda array: b.gep(array, [offset]), blocks)
            shift = constant(BLOCK_NUMEL.bit_length() - 2)  # two exponents for each block
            of_block = b.gep(exponents, [b.lshr(at_element, shift)])
            words = BlockWords(b, key, position.index())
            prefetch_ahead(b, current)
            if undo is not None:
                used = b.select(is_whole, constant(BLOCK_NUMEL), b.sub(end, start))
                undo.push_block(current, at_element, used, constant(0), of_block)
            block.update(current, of_block, scale, words)
            position.advance()
        with b.if_then(is_partial, likely=False):
            copies.from_stack()


def _exponent(builder: Any, exponents: Any, column: int) -> Any:
    return builder.load(builder.gep(exponents, [constant(column)]))


def _store_exponent(builder: Any, value: Any, exponents: Any, column: int) -> None:
    builder.store(builder.trunc(value, I8), builder.gep(exponents, [constant(column)]))


def _clamp_below(builder: Any, value: Any, least: int) -> Any:
    limit = ir.Constant(value.type, least)
    return builder.select(builder.icmp_signed(">", value, limit), value, limit)


def _int(value: int) -> ir.Constant:
    return ir.Constant(I32, value)
