"""The Adam update of one contiguous run of elements, written as vector instructions.

The arithmetic of one element is a chain of some ninety cycles, from the gradient through a root and
a quotient to the rounded weight. A processor that meets the whole chain of one vector before the
next one's start runs out of room for what waits, and cannot keep the memory busy; so each turn of
the loop does the four stages for four different vectors, none of which waits for another.

The rounded weight is written past the caches, for nothing of it has been read: an ordinary store
would read the line first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.misc import NoneType
from numba.extending import intrinsic

from offload_adam.kernels import scalars as at
from offload_adam.kernels.ir_vectors import Vectors

_LANES = 16
_INTP = ir.IntType(64)


class _Streams(NamedTuple):
    """The addresses of a run's arrays, and the types of their elements; None where absent."""

    gradient: Any
    master: Any
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any
    rounded: Any


class _Stages:
    """The four stages of the update of one vector, each of which hands its results to the next.

    A `plain` update has neither L2 nor Nesterov, and leaves their multiplications out.

    A stored moment below 2**-126 counts as 0: denormal arithmetic is up to a hundred times slower
    on some processors, and with any `eps` above 1e-12 the weight does not see the difference.

    A second moment that exceeds float32, after a gradient above about 1e20, stays infinite, and its
    weight no longer moves: as in torch, whose quotient is 0 then.
    """

    def __init__(
        self,
        builder: Any,
        lanes: int,
        plain: bool,
        scalars: list[Any],
        streams: _Streams,
        elements: _Streams,
    ) -> None:
        self._builder = builder
        self._plain = plain
        self._vectors = Vectors(builder, lanes)
        self._scalars = [self._vectors.splat(scalar) for scalar in scalars]
        self._streams = streams
        self._elements = elements

    def moments(self, i: Any) -> tuple[Any, Any]:
        """Update the moments; return the direction and the second moment to divide it by."""
        b, v, s = self._builder, self._vectors, self._scalars
        gradient = v.load(self._streams.gradient, i, self._elements.gradient)
        if self._plain:
            g = b.fmul(s[at.GRADIENT_SCALE], gradient)
        else:
            w = v.load(self._streams.master, i, types.float32)
            g = v.fma(s[at.GRADIENT_SCALE], gradient, b.fmul(s[at.L2], w))
        m = v.flush_tiny(v.load(self._streams.exp_avg, i, types.float32))
        fresh = b.fmul(s[at.ONE_MINUS_BETA1], g)
        m = v.fma(s[at.BETA1], m, v.fma(s[at.BETA1_REST], m, fresh))
        v.store(m, self._streams.exp_avg, i, types.float32)
        before = v.flush_tiny(v.load(self._streams.exp_avg_sq, i, types.float32))
        fresh = b.fmul(b.fmul(s[at.ONE_MINUS_BETA2], g), g)
        second = v.fma(s[at.BETA2], before, v.fma(s[at.BETA2_REST], before, fresh))
        # The rest of beta2 may be negative or 0, and infinity times that gives NaN in the sum.
        second = v.where_infinite(before, before, second)
        v.store(second, self._streams.exp_avg_sq, i, types.float32)
        if self._streams.max_exp_avg_sq is not None:
            largest = v.flush_tiny(v.load(self._streams.max_exp_avg_sq, i, types.float32))
            second = v.larger(second, largest)
            v.store(second, self._streams.max_exp_avg_sq, i, types.float32)
        if not self._plain:
            m = v.fma(s[at.MOMENT], m, b.fmul(s[at.FRESH], g))
        # A gradient that exceeds float32 by its scale or decay makes both infinite: their quotient
        # would be NaN.
        return v.where_infinite(second, v.zeros(), m), second

    def root(self, direction: Any, second: Any) -> tuple[Any, Any]:
        """Return the direction and the root of the second moment."""
        return direction, self._vectors.sqrt(second)

    def quotient(self, direction: Any, root: Any) -> tuple[Any]:
        """Return the direction over its denominator.

        Divided before it is scaled: a small moment times the step size would be denormal.
        """
        scale, eps = self._scalars[at.DENOMINATOR_SCALE], self._scalars[at.EPS]
        return (self._builder.fdiv(direction, self._vectors.fma(scale, root, eps)),)

    def weight(self, i: Any, quotient: Any, *, past_caches: bool = False) -> None:
        """Update the weight and write it rounded; `past_caches` wants an aligned address there."""
        b, v, s = self._builder, self._vectors, self._scalars
        w = v.load(self._streams.master, i, types.float32)
        step = b.fmul(s[at.STEP_SIZE], quotient)
        w = b.fsub(w, v.fma(s[at.DECAY], w, step))
        v.store(w, self._streams.master, i, types.float32)
        if self._streams.rounded is not None:
            store = v.store_past_caches if past_caches else v.store
            store(w, self._streams.rounded, i, self._elements.rounded)


@intrinsic
def update_run(
    typingctx: Any,
    gradient: Any,
    master: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    rounded: Any,
    scalars: Any,
) -> Any:
    """Update one run of elements; all arrays are contiguous and have its length."""
    given = (gradient, master, exp_avg, exp_avg_sq, max_exp_avg_sq, rounded)
    elements = _Streams(*(None if isinstance(kind, NoneType) else kind.dtype for kind in given))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays: list[Any] = [
            None if element is None else context.make_array(kind)(context, builder, argument)
            for element, kind, argument in zip(elements, given, arguments, strict=False)
        ]
        streams = _Streams(*(None if array is None else array.data for array in arrays))
        row = context.make_array(scalars)(context, builder, arguments[-1]).data
        values = [
            builder.load(builder.gep(row, [ir.Constant(_INTP, place)]))
            for place in range(at.NUM_SCALARS)
        ]

        def emit(plain: bool) -> None:
            def stages(lanes: int) -> _Stages:
                return _Stages(builder, lanes, plain, values, streams, elements)

            _emit_run(builder, stages, streams, arrays[0].nitems)

        with builder.if_else(_is_plain(builder, values)) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                emit(False)
        return context.get_dummy_value()

    return types.void(*given, scalars), codegen


def _is_plain(builder: Any, scalars: list[Any]) -> Any:
    """Emit whether there is neither L2 nor Nesterov."""
    usual = {at.L2: 0.0, at.MOMENT: 1.0, at.FRESH: 0.0}
    plain = ir.Constant(ir.IntType(1), 1)
    for place, value in usual.items():
        same = builder.fcmp_ordered("==", scalars[place], ir.Constant(ir.FloatType(), value))
        plain = builder.and_(plain, same)
    return plain


@intrinsic
def finish_stores(typingctx: Any) -> Any:
    """Make what `update_run` wrote past the caches visible to whoever sees a later write."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _emit_run(
    builder: Any, stages: Callable[[int], _Stages], streams: _Streams, numel: Any
) -> None:
    """Emit whole vectors, four in flight where there are that many, and single elements around."""
    wide, single = stages(_LANES), stages(1)
    start = _emit_lead(builder, streams.rounded, numel)
    lanes = _constant(_LANES)
    whole = builder.mul(builder.sdiv(builder.sub(numel, start), lanes), lanes)
    end = builder.add(start, whole)
    _emit_in_turn(builder, single, _constant(0), start, 1)
    many = builder.icmp_signed(">=", whole, _constant(3 * _LANES))
    with builder.if_else(many) as (then, otherwise):
        with then:
            _emit_pipeline(builder, wide, start, end)
        with otherwise:
            _emit_in_turn(builder, wide, start, end, _LANES)
    _emit_in_turn(builder, single, end, numel, 1)


def _emit_lead(builder: Any, rounded: Any, numel: Any) -> Any:
    """Emit how many elements come before the first aligned vector of the rounded weights.

    None in an optimizer's own memory, where parameters start at whole blocks.
    """
    if rounded is None:
        return _constant(0)
    before = builder.neg(builder.ptrtoint(rounded, _INTP))
    nbytes = builder.and_(before, _constant(2 * _LANES - 1))
    lead = builder.lshr(nbytes, _constant(1))
    return builder.select(builder.icmp_signed("<", lead, numel), lead, numel)


def _emit_in_turn(builder: Any, stages: _Stages, start: Any, end: Any, lanes: int) -> None:
    """Emit a loop that takes each vector through all stages before the next."""
    with cgutils.for_range_slice(builder, start, end, _constant(lanes), _INTP) as (i, _):
        stages.weight(i, *stages.quotient(*stages.root(*stages.moments(i))))


def _emit_pipeline(builder: Any, stages: _Stages, start: Any, end: Any) -> None:
    """Emit a loop that takes four vectors, one behind the other, through one stage each."""

    def away(i: Any, vectors: int) -> Any:
        return builder.add(i, _constant(vectors * _LANES))

    def weight(i: Any, quotient: Any) -> None:
        stages.weight(i, quotient, past_caches=True)

    quotient = stages.quotient(*stages.root(*stages.moments(start)))
    root = stages.root(*stages.moments(away(start, 1)))
    moments = stages.moments(away(start, 2))
    # Memory in the program's text, registers in the machine's.
    carried = [cgutils.alloca_once_value(builder, one) for one in (*quotient, *root, *moments)]
    loop = cgutils.for_range_slice(builder, away(start, 3), end, _constant(_LANES), _INTP)
    with loop as (i, _):
        quotient, *pending = map(builder.load, carried)
        weight(away(i, -3), quotient)
        results = (
            *stages.quotient(*pending[:2]),
            *stages.root(*pending[2:]),
            *stages.moments(i),
        )
        for place, result in zip(carried, results, strict=True):
            builder.store(result, place)
    quotient, *pending = map(builder.load, carried)
    weight(away(end, -3), quotient)
    weight(away(end, -2), *stages.quotient(*pending[:2]))
    weight(away(end, -1), *stages.quotient(*stages.root(*pending[2:])))


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INTP, value)
