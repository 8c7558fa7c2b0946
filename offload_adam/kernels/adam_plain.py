"""The Adam update of one contiguous range of elements, as a loop that Numba compiles.

It runs where `adam_ir.supports_ir` is False, and shows the whole formula in one place, for every
format of the state. The IR kernels compute the same bits, because both state where a multiply-add
is fused. `adam_formula` has the comments on the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from offload_adam.kernels import scalars as at
from offload_adam.kernels.intrinsics import (
    bfloat16_of,
    flush_tiny,
    fma,
    join,
    remainder_of,
    round_for,
    round_randomly,
    widen,
)
from offload_adam.kernels.random_bits import random_bits

_ZERO = np.float32(0.0)
_INFINITY = np.float32(np.inf)


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
    """Update one range of elements; all arrays are contiguous and have its length.

    Args:
        master: float32; or uint16, the bfloat16 bits of the parameter, which with `remainder` are
            the master weight.
        remainder: int16; None if `master` is float32.
        exp_avg, exp_avg_sq: float32; or uint16, the bits of bfloat16.
        key: key of the random bits; used only if the moments are bfloat16.
        index: index of the range's first element in its unsharded parameter; used only if the
            moments are bfloat16.
    """
    # Read here and not in the loop: LLVM must assume that the stores there change the row.
    gradient_scale, l2 = scalars[at.GRADIENT_SCALE], scalars[at.L2]
    beta1, beta1_rest = scalars[at.BETA1], scalars[at.BETA1_REST]
    beta2, beta2_rest = scalars[at.BETA2], scalars[at.BETA2_REST]
    one_minus_beta1, one_minus_beta2 = scalars[at.ONE_MINUS_BETA1], scalars[at.ONE_MINUS_BETA2]
    decay, step_size = scalars[at.DECAY], scalars[at.STEP_SIZE]
    moment, fresh = scalars[at.MOMENT], scalars[at.FRESH]
    scale, eps = scalars[at.DENOMINATOR_SCALE], scalars[at.EPS]
    plain = l2 == 0 and moment == 1 and fresh == 0
    for i in range(gradient.size):
        weight = master[i] if remainder is None else join(master[i], remainder[i])
        g = widen(gradient[i])
        g = gradient_scale * g if plain else fma(gradient_scale, g, l2 * weight)

        m = flush_tiny(widen(exp_avg[i]))
        m = fma(beta1, m, fma(beta1_rest, m, one_minus_beta1 * g))
        # Uses the bits of the other element of the pair: both moments of an element must be
        # rounded independently.
        exp_avg[i] = round_randomly(exp_avg, m, random_bits(key, (index + i) ^ 1))

        before = flush_tiny(widen(exp_avg_sq[i]))
        second = fma(beta2, before, fma(beta2_rest, before, one_minus_beta2 * g * g))
        second = before if before == _INFINITY else second
        exp_avg_sq[i] = round_randomly(exp_avg_sq, second, random_bits(key, index + i))
        if max_exp_avg_sq is not None:
            largest = flush_tiny(max_exp_avg_sq[i])
            second = second if second > largest else largest
            max_exp_avg_sq[i] = second

        direction = m if plain else fma(moment, m, fresh * g)
        direction = _ZERO if second == _INFINITY else direction
        quotient = direction / fma(scale, math.sqrt(second), eps)
        weight = weight - fma(decay, weight, step_size * quotient)
        if remainder is None:
            master[i] = weight
        else:
            master[i] = bfloat16_of(weight)
            remainder[i] = remainder_of(weight)
        if param_out is not None:
            param_out[i] = round_for(param_out, weight)
