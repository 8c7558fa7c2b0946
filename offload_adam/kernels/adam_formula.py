"""What the IR kernels share: the formula of the update as vector instructions, and its arguments.

`Formula` has no loads and stores, which depend on the format of the state.

`adam_plain` is the same arithmetic in Python: change both. Both compute the same bits, because each
states where a multiply-add is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from offload_adam.kernels import scalars as at
from offload_adam.kernels.ir_vectors import Vectors
from offload_adam.kernels.numba_private import array_struct


class Formula:
    """Emits the steps of one update in the order of its methods; all values are float32 vectors.

    Callers compute the root of the second moment themselves, because they schedule it separately.

    A `plain` update has neither L2 nor Nesterov, and omits their multiplications.

    The moments come from `Vectors.load_moment`: a stored moment below 2**-126 counts as 0. Denormal
    arithmetic is up to a hundred times slower on some processors, and with any `eps` above 1e-12
    the weight is the same.

    A second moment that overflows float32, after a gradient above about 1e20, stays infinite, and
    its weight no longer changes. torch does the same, because its quotient is then 0.
    """

    def __init__(self, vectors: Vectors, plain: bool, scalars: list[Any]) -> None:
        self._builder = vectors.builder
        self._vectors = vectors
        self._scalars = [vectors.splat(scalar) for scalar in scalars]
        self.plain = plain

    def gradient(self, gradient: Any, weight: Any) -> Any:
        """Return the scaled gradient plus the L2 term; a plain update does not use `weight`."""
        b, s = self._builder, self._scalars
        if self.plain:
            return b.fmul(s[at.GRADIENT_SCALE], gradient)
        return self._vectors.fma(s[at.GRADIENT_SCALE], gradient, b.fmul(s[at.L2], weight))

    def exp_avg(self, before: Any, g: Any) -> Any:
        """Return the updated first moment."""
        v, s = self._vectors, self._scalars
        # beta1 is the sum of two float32, see `scalar_row`.
        fresh = self._builder.fmul(s[at.ONE_MINUS_BETA1], g)
        return v.fma(s[at.BETA1], before, v.fma(s[at.BETA1_REST], before, fresh))

    def exp_avg_sq(self, before: Any, g: Any) -> Any:
        """Return the updated second moment."""
        b, v, s = self._builder, self._vectors, self._scalars
        fresh = b.fmul(b.fmul(s[at.ONE_MINUS_BETA2], g), g)
        second = v.fma(s[at.BETA2], before, v.fma(s[at.BETA2_REST], before, fresh))
        # BETA2_REST may be negative or 0. With an infinite moment the sum would be NaN.
        return v.where_infinite(before, before, second)

    def numerator(self, m: Any, g: Any) -> Any:
        """Return the numerator of the update, if moments cannot be infinite.

        It is the first moment, or Nesterov's combination of the first moment and the gradient.
        """
        v, s = self._vectors, self._scalars
        if self.plain:
            return m
        return v.fma(s[at.MOMENT], m, self._builder.fmul(s[at.FRESH], g))

    def direction(self, m: Any, g: Any, second: Any) -> Any:
        """Return the numerator of the update, or 0 if the second moment is infinite."""
        v = self._vectors
        # If scaling or decay overflows the gradient, both moments are infinite, and their quotient
        # would be NaN.
        return v.where_infinite(second, v.zeros(), self.numerator(m, g))

    def quotient(self, direction: Any, root: Any, scale: Any = None) -> Any:
        """Return the direction divided by its denominator.

        Args:
            scale: a scalar that replaces DENOMINATOR_SCALE.
        """
        # `weight` multiplies by the step size after this division. Before it, the product of the
        # step size and a small moment would be denormal.
        by = self._scalars[at.DENOMINATOR_SCALE] if scale is None else self._vectors.splat(scale)
        return self._builder.fdiv(direction, self._vectors.fma(by, root, self._scalars[at.EPS]))

    def weight(self, before: Any, quotient: Any) -> Any:
        """Return the updated master weight."""
        b, s = self._builder, self._scalars
        step = b.fmul(s[at.STEP_SIZE], quotient)
        return b.fsub(before, self._vectors.fma(s[at.DECAY], before, step))


def element_of(kind: Any) -> Any:
    """Return the type of an array's elements, None for an array that is absent."""
    return None if isinstance(kind, types.NoneType) else kind.dtype


def addresses_of(
    context: Any, builder: Any, kinds: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
    """Return the addresses of arrays, None for each that is absent.

    Args:
        kinds: types of the arrays.
        arguments: their values, in the same order; further values are ignored.
    """
    return [
        None if element_of(kind) is None else array_struct(context, builder, kind, argument).data
        for kind, argument in zip(kinds, arguments, strict=False)
    ]


def load_scalars(context: Any, builder: Any, kind: Any, row: Any) -> list[Any]:
    """Emit the loads of a row of scalars, before the loop over elements.

    Args:
        kind, row: type and value of the array.
    """
    data = array_struct(context, builder, kind, row).data
    return [
        builder.load(builder.gep(data, [ir.Constant(ir.IntType(64), place)]))
        for place in range(at.NUM_SCALARS)
    ]


def emit_both(builder: Any, scalars: list[Any], emit: Callable[[bool], None]) -> None:
    """Emit a loop twice, for a `plain` update and for others.

    So the test runs once for a range and not for each element.

    Args:
        emit: emits the loop; its argument is `Formula.plain`.
    """
    with builder.if_else(_is_plain(builder, scalars)) as (then, otherwise):
        with then:
            emit(True)
        with otherwise:
            emit(False)


def _is_plain(builder: Any, scalars: list[Any]) -> Any:
    """Emit the test for an update with neither L2 nor Nesterov."""
    usual = {at.L2: 0.0, at.MOMENT: 1.0, at.FRESH: 0.0}
    plain = ir.Constant(ir.IntType(1), 1)
    for place, value in usual.items():
        same = builder.fcmp_ordered("==", scalars[place], ir.Constant(ir.FloatType(), value))
        plain = builder.and_(plain, same)
    return plain
