"""The Adam update with 8-bit codes of one range of elements, as a loop that Numba compiles.

It runs where `adam_ir.supports_ir` is False, and shows the whole formula in one place. The IR loop
in `adam_8bit_ir` computes the same bits. `adam_formula` and `codes` have the comments.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from offload_adam.kernels import scalars as at
from offload_adam.kernels.codes import (
    AVG_CARRY,
    AVG_MIN_EXPONENT,
    AVG_OCTAVES,
    AVG_SHIFT,
    CODE_SHIFT,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_CODE,
    GRADIENT_LIMIT,
    LARGEST_MAGNITUDE,
    MOST_LOST_OCTAVES,
    SIGN_BIT,
    SQ_MAX_EXPONENT,
    SQ_MIN_EXPONENT,
    TOP_CODE,
)
from offload_adam.kernels.compilation import jit_inlined
from offload_adam.kernels.intrinsics import (
    bfloat16_of_24,
    bits_of,
    float_of,
    flush_tiny,
    fma,
    join,
    remainder_of_24,
    round_for,
    round_randomly,
    widen,
)
from offload_adam.kernels.random_bits import random_word
from offload_adam.layout.flat import BLOCK_NUMEL

_ZERO = np.float32(0.0)
_LIMIT = np.float32(GRADIENT_LIMIT)


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
    """Update one range of elements, which begins at a block.

    Args:
        master: float32; or uint16, the bfloat16 bits of the parameter.
        remainder: int8, the next 8 bits of the master weight; None if `master` is float32.
        exp_avg: uint8 codes; or uint16, the bits of bfloat16.
        exp_avg_sq: uint8 codes.
        exponents: (num_blocks, 2) uint8, see `codes`.
        key: key of the random bits.
        row, column: the index of the range's first element in its unsharded parameter is
            row + column, and 0 <= column < run.
        run, pitch: after `run` elements, this index is `pitch` above the index of the run's first.
        scale: the bits of the scale D after its decay in this update.
        shift: q decreases by it, because D was multiplied by 2**shift in this update.
    """
    firsts = np.empty(BLOCK_NUMEL, dtype=np.float32)
    seconds = np.empty(BLOCK_NUMEL, dtype=np.int32)  # bits, after random bits were added
    root_of_rest = math.sqrt(scalars[at.ONE_MINUS_BETA2])
    for low in range(0, gradient.size, BLOCK_NUMEL):
        block = low // BLOCK_NUMEL
        count = min(BLOCK_NUMEL, gradient.size - low)
        position = column + low
        index = row + position // run * pitch + position % run
        shifted = np.int64(exponents[block, EXP_AVG_SQ]) - shift
        before: Any = max(shifted, np.int64(SQ_MIN_EXPONENT))
        stored_first = FIRST_CODE - 8 * min(before - shifted, MOST_LOST_OCTAVES)
        root_of_scale = math.sqrt(float_of(scale + ((before - 127) << 23)))
        by = root_of_rest / root_of_scale
        denominator_scale = scalars[at.DENOMINATOR_SCALE] * root_of_scale
        exponent: Any = np.int64(exponents[block, EXP_AVG])
        top_first: Any = 0
        top_second: Any = FIRST_CODE << CODE_SHIFT
        for j in range(count):
            i = low + j
            word = random_word(key, index, j)
            weight = master[i] if remainder is None else join(master[i], remainder[i])
            g = _gradient(gradient[i], weight, scalars)
            if abs(g) > _LIMIT:
                g = _ZERO
            m = _decoded_avg(exp_avg, exp_avg[i], exponent)
            fresh = scalars[at.ONE_MINUS_BETA1] * g
            m = fma(scalars[at.BETA1], m, fma(scalars[at.BETA1_REST], m, fresh))
            y = g * by
            x = fma(y, y, float_of((np.int64(exp_avg_sq[i]) + stored_first) << CODE_SHIFT))
            numerator = (
                m if _is_plain(scalars) else fma(scalars[at.MOMENT], m, scalars[at.FRESH] * g)
            )
            quotient = numerator / fma(denominator_scale, math.sqrt(x), scalars[at.EPS])
            weight = weight - fma(scalars[at.DECAY], weight, scalars[at.STEP_SIZE] * quotient)
            if remainder is None:
                master[i] = weight
            else:
                master[i] = bfloat16_of_24(weight, word)
                remainder[i] = remainder_of_24(weight, word)
            if param_out is not None:
                param_out[i] = round_for(param_out, weight)
            random = (np.int64(word) & 0xFFFFFFFF) >> (32 - CODE_SHIFT)
            firsts[j], seconds[j] = m, np.int32(np.int64(bits_of(x)) + random)
            top_first = max(top_first, np.int64(bits_of(m)) & 0x7FFFFFFF)
            top_second = max(top_second, np.int64(seconds[j]))

        top = (top_second >> CODE_SHIFT) - FIRST_CODE
        after = min(max(before + ((top - TOP_CODE) >> 3), SQ_MIN_EXPONENT), SQ_MAX_EXPONENT)
        exponents[block, EXP_AVG_SQ] = after
        first_code = FIRST_CODE + 8 * (after - before)
        exponent = max(((top_first + AVG_CARRY) >> 23) - AVG_OCTAVES, AVG_MIN_EXPONENT)
        if exp_avg.itemsize == 1:
            exponents[block, EXP_AVG] = exponent
        for j in range(count):
            word = random_word(key, index, j)
            bits = np.int64(seconds[j]) & 0xFFFFFFFF
            exp_avg_sq[low + j] = max((bits >> CODE_SHIFT) - first_code, 0)
            exp_avg[low + j] = _encoded_avg(exp_avg, firsts[j], exponent, word)


@jit_inlined
def _is_plain(scalars: Any) -> Any:
    return scalars[at.L2] == 0 and scalars[at.MOMENT] == 1 and scalars[at.FRESH] == 0


@jit_inlined
def _gradient(raw: Any, weight: Any, scalars: Any) -> Any:
    """Return the scaled gradient plus the L2 term."""
    g = widen(raw)
    if _is_plain(scalars):
        return scalars[at.GRADIENT_SCALE] * g
    return fma(scalars[at.GRADIENT_SCALE], g, scalars[at.L2] * weight)


@jit_inlined
def _decoded_avg(exp_avg: Any, stored: Any, exponent: Any) -> Any:
    """Return a stored first moment as float32."""
    if exp_avg.itemsize == 2:
        return flush_tiny(widen(np.uint16(stored)))
    smallest = exponent << 23
    magnitude = (np.int64(stored) & LARGEST_MAGNITUDE) << AVG_SHIFT
    value = float_of(smallest + magnitude) - float_of(smallest)
    return -value if stored & SIGN_BIT else value


@jit_inlined
def _encoded_avg(exp_avg: Any, m: Any, exponent: Any, word: Any) -> Any:
    """Return a first moment as an element of `exp_avg`, rounded stochastically."""
    if exp_avg.itemsize == 2:
        return np.int64(round_randomly(np.empty(0, np.uint16), m, np.uint32(word & 0xFFFF)))
    random = np.int64(word) & ((1 << AVG_SHIFT) - 1)
    shifted = np.int64(bits_of(abs(m) + float_of(exponent << 23)))
    magnitude = ((shifted + random) >> AVG_SHIFT) - (exponent << (23 - AVG_SHIFT))
    sign = (np.int64(bits_of(m)) >> 31) & SIGN_BIT
    return min(magnitude, LARGEST_MAGNITUDE) | sign
