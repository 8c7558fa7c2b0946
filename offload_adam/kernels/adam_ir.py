"""The Adam update of one contiguous range of elements, as vector instructions in LLVM IR.

The update of one vector is a chain of dependent instructions, about 90 cycles long: gradient,
moments, square root, division, weight. If the loop ran one whole chain after the other, the waiting
instructions would fill the processor's reorder buffer. The processor would then issue too few loads
to saturate the memory. So the loop is a software pipeline of four stages. Each iteration runs every
stage once, for four independent vectors. With five vectors:

                v0         v1         v2         v3         v4
    prologue    moments    moments    moments
                root       root
                quotient
    i = 3       weight     quotient   root       moments
    i = 4                  weight     quotient   root       moments
    epilogue                          weight     quotient   root
                                                 weight     quotient
                                                            weight

Registers carry results to the next iteration: one quotient, one direction and root, one direction
and second moment. Ranges of fewer than three vectors, and the elements before and after whole
vectors, run the same stages one after the other. Both orders compute the same bits.

The 16-bit parameter is written with nontemporal stores, which bypass the caches. The kernel does
not read it, and an ordinary store would first read the cache line.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
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
from offload_adam.kernels.ir_vectors import Vectors
from offload_adam.kernels.numba_private import (
    alloca_once_value,
    array_struct,
    for_range_slice,
    no_value,
)
from offload_adam.kernels.undo import VECTORS
from offload_adam.kernels.undo_ir import UndoEntries, undo_entries

_LANES = 16  # float32 in one AVX-512 register, or in two AVX2 registers
_INTP = ir.IntType(64)


def supports_ir() -> bool:
    """Return whether this machine uses the IR kernel (True) or `adam_plain` (False).

    - x86-64: IR kernel, written for AVX2 and AVX-512. Without FMA both kernels call libm for every
      multiply-add and are ten times slower; the IR kernel is still the faster one.
    - AArch64: IR kernel. It has not been run there; the assembly has no calls, and spills fewer
      values to the stack than with AVX2.
    - Others: `adam_plain`; nothing was checked. LLVM splits 16 lanes on any target. But it may call
      a function for each lane of an instruction that the target lacks, or fail to compile it.

    On x86-64 without F16C (before 2012, or with NUMBA_CPU_NAME=generic), float16 crashes in both.
    """
    return platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64")


class _Arrays(NamedTuple):
    """The addresses of a range's arrays, or the types of their elements; None for absent arrays."""

    gradient: Any
    master: Any
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any
    param_out: Any


class _Stages:
    """The four stages of the update of one vector; each passes its results to the next."""

    def __init__(
        self,
        builder: Any,
        lanes: int,
        plain: bool,
        scalars: list[Any],
        arrays: _Arrays,
        elements: _Arrays,
        undo: UndoEntries | None,
    ) -> None:
        self._vectors = Vectors(builder, lanes)
        self._formula = Formula(self._vectors, plain, scalars)
        self._arrays = arrays
        self._elements = elements
        self._undo = undo

    def moments(self, i: Any) -> tuple[Any, Any]:
        """Update the moments; return the direction and the second moment for its denominator."""
        v, formula, arrays = self._vectors, self._formula, self._arrays
        if self._undo is not None:
            # The whole entry here, although the weight changes two vectors later.
            planes = (arrays.master, arrays.exp_avg, arrays.exp_avg_sq, arrays.max_exp_avg_sq)
            places = [v.builder.gep(plane, [i]) for plane in planes if plane is not None]
            self._undo.push(places, v.lanes, i)
        gradient = v.load(arrays.gradient, i, self._elements.gradient)
        weight = None if formula.plain else v.load(arrays.master, i, types.float32)
        g = formula.gradient(gradient, weight)
        m = formula.exp_avg(v.load_moment(arrays.exp_avg, i, types.float32), g)
        v.store(m, arrays.exp_avg, i, types.float32)
        second = formula.exp_avg_sq(v.load_moment(arrays.exp_avg_sq, i, types.float32), g)
        v.store(second, arrays.exp_avg_sq, i, types.float32)
        if arrays.max_exp_avg_sq is not None:
            second = v.larger(second, v.load_moment(arrays.max_exp_avg_sq, i, types.float32))
            v.store(second, arrays.max_exp_avg_sq, i, types.float32)
        return formula.direction(m, g, second), second

    def root(self, direction: Any, second: Any) -> tuple[Any, Any]:
        """Return the direction and the root of the second moment."""
        return direction, self._vectors.sqrt(second)

    def quotient(self, direction: Any, root: Any) -> tuple[Any]:
        """Return the direction divided by its denominator."""
        return (self._formula.quotient(direction, root),)

    def weight(self, i: Any, quotient: Any, *, nontemporal: bool = False) -> None:
        """Update the master weight, and write the 16-bit parameter if there is one.

        Args:
            nontemporal: bypass the caches for the parameter; its address must then be aligned to
                16 elements.
        """
        v = self._vectors
        w = self._formula.weight(v.load(self._arrays.master, i, types.float32), quotient)
        v.store(w, self._arrays.master, i, types.float32)
        if self._arrays.param_out is not None:
            store = v.store_nontemporal if nontemporal else v.store
            store(w, self._arrays.param_out, i, self._elements.param_out)


@intrinsic
def adam_ir(
    typingctx: Any,
    gradient: Any,
    master: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    param_out: Any,
    scalars: Any,
    area: Any,
    start: Any,
) -> Any:
    """Update one range of elements; all arrays are contiguous and have its length."""
    given = (gradient, master, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out)
    elements = _Arrays(*map(element_of, given))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = _Arrays(*addresses_of(context, builder, given, arguments))
        numel = array_struct(context, builder, gradient, arguments[0]).nitems
        values = load_scalars(context, builder, scalars, arguments[len(given)])
        undo = undo_entries(context, builder, VECTORS, area, *arguments[-2:])

        def emit(plain: bool) -> None:
            def stages(lanes: int) -> _Stages:
                return _Stages(builder, lanes, plain, values, arrays, elements, undo)

            _emit_range(builder, stages, arrays, numel)

        emit_both(builder, values, emit)
        return no_value(context)

    return types.void(*given, scalars, area, types.int64), codegen


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
    """Update one range of elements, see `adam_plain.update_range`; all state is float32.

    `remainder` is None. `key` and `index` are not used, because no value is rounded stochastically.
    """
    adam_ir(gradient, master, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, scalars, area, start)


@intrinsic
def finish_stores(typingctx: Any) -> Any:
    """Make the thread's nontemporal stores visible before its later stores."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # x86 orders nontemporal stores only at a fence. Without one, the thread that launched the
        # kernel could see that it has finished and still read an old parameter.
        builder.fence("seq_cst")
        return no_value(context)

    return types.void(), codegen


def _emit_range(
    builder: Any, stages: Callable[[int], _Stages], arrays: _Arrays, numel: Any
) -> None:
    """Emit the pipeline over whole vectors, and loops over the single elements around them."""
    wide, single = stages(_LANES), stages(1)
    start = _emit_lead(builder, arrays.param_out, numel)
    lanes = _constant(_LANES)
    whole = builder.mul(builder.sdiv(builder.sub(numel, start), lanes), lanes)
    end = builder.add(start, whole)
    _emit_in_turn(builder, single, _constant(0), start, 1)
    # The pipeline's prologue starts three vectors.
    many = builder.icmp_signed(">=", whole, _constant(3 * _LANES))
    with builder.if_else(many) as (then, otherwise):
        with then:
            _emit_pipeline(builder, wide, start, end)
        with otherwise:
            _emit_in_turn(builder, wide, start, end, _LANES)
    _emit_in_turn(builder, single, end, numel, 1)


def _emit_lead(builder: Any, param_out: Any, numel: Any) -> Any:
    """Emit the number of elements before the first aligned vector of `param_out`.

    It is 0 in an optimizer's own memory, where parameters start at whole vectors.
    """
    if param_out is None:
        return _constant(0)
    # (-address) modulo 32, the bytes of a vector of 16-bit elements; then in elements of 2 bytes.
    before = builder.neg(builder.ptrtoint(param_out, _INTP))
    nbytes = builder.and_(before, _constant(2 * _LANES - 1))
    lead = builder.lshr(nbytes, _constant(1))
    return builder.select(builder.icmp_signed("<", lead, numel), lead, numel)


def _emit_in_turn(builder: Any, stages: _Stages, start: Any, end: Any, lanes: int) -> None:
    """Emit a loop that runs all stages of a vector before those of the next."""
    with for_range_slice(builder, start, end, _constant(lanes), _INTP) as (i, _):
        stages.weight(i, *stages.quotient(*stages.root(*stages.moments(i))))


def _emit_pipeline(builder: Any, stages: _Stages, start: Any, end: Any) -> None:
    """Emit the pipeline of the module's docstring, for three vectors or more."""

    def away(i: Any, vectors: int) -> Any:
        return builder.add(i, _constant(vectors * _LANES))

    def weight(i: Any, quotient: Any) -> None:
        stages.weight(i, quotient, nontemporal=True)

    quotient = stages.quotient(*stages.root(*stages.moments(start)))
    root = stages.root(*stages.moments(away(start, 1)))
    moments = stages.moments(away(start, 2))
    # Stack slots here stand for phi nodes; LLVM turns them into registers.
    carried = [alloca_once_value(builder, one) for one in (*quotient, *root, *moments)]
    loop = for_range_slice(builder, away(start, 3), end, _constant(_LANES), _INTP)
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
