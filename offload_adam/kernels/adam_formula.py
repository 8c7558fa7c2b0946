"""The formula of the Adam update as vector instructions, without loads and stores.

`adam_plain` is the same arithmetic in Python: change both. Both compute the same bits, because each
states where a multiply-add is fused.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from offload_adam.kernels import scalars as at
from offload_adam.kernels.ir_vectors import Vectors


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

    def direction(self, m: Any, g: Any, second: Any) -> Any:
        """Return the numerator of the update.

        It is the first moment, or Nesterov's combination of the first moment and the gradient.
        """
        v, s = self._vectors, self._scalars
        if not self.plain:
            m = v.fma(s[at.MOMENT], m, self._builder.fmul(s[at.FRESH], g))
        # If scaling or decay overflows the gradient, both moments are infinite, and their quotient
        # would be NaN.
        return v.where_infinite(second, v.zeros(), m)

    def quotient(self, direction: Any, root: Any) -> Any:
        """Return the direction divided by its denominator."""
        # `weight` multiplies by the step size after this division. Before it, the product of the
        # step size and a small moment would be denormal.
        scale, eps = self._scalars[at.DENOMINATOR_SCALE], self._scalars[at.EPS]
        return self._builder.fdiv(direction, self._vectors.fma(scale, root, eps))

    def weight(self, before: Any, quotient: Any) -> Any:
        """Return the updated master weight."""
        b, s = self._builder, self._scalars
        step = b.fmul(s[at.STEP_SIZE], quotient)
        return b.fsub(before, self._vectors.fma(s[at.DECAY], before, step))


def is_plain(builder: Any, scalars: list[Any]) -> Any:
    """Emit the test for an update with neither L2 nor Nesterov."""
    usual = {at.L2: 0.0, at.MOMENT: 1.0, at.FRESH: 0.0}
    plain = ir.Constant(ir.IntType(1), 1)
    for place, value in usual.items():
        same = builder.fcmp_ordered("==", scalars[place], ir.Constant(ir.FloatType(), value))
        plain = builder.and_(plain, same)
    return plain


def load_scalars(builder: Any, row: Any) -> list[Any]:
    """Emit the loads of a row of scalars, before the loop over elements."""
    return [
        builder.load(builder.gep(row, [ir.Constant(ir.IntType(64), place)]))
        for place in range(at.NUM_SCALARS)
    ]
