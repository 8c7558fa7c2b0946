"""8-bit state in NumPy, from its specification: shares no code with the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_adam.kernels import scalars as at
from tests.unit.kernel_bf16_reference import PAIR_CONSTANTS as CONSTANTS
from tests.unit.kernel_bf16_reference import bits_of, decoded, splitmix64
from tests.unit.kernel_cases import HostState

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_WORD, _LONG = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class Place:
    """Where a range is in its unsharded parameter, its key, and its scale in this update."""

    key: int
    first: int = 0
    run: int = 1 << 40
    pitch: int = 1 << 40
    local_start: int = 0
    scale_bits: int = 0x3F800000
    shift: int = 0

    def columns(self) -> tuple[int, ...]:
        """Return the row of `places`."""
        whole = (self.key, self.first, self.run, self.pitch, self.local_start)
        return (*whole, self.scale_bits, self.shift)


@dataclass
class Unrounded:
    """The float32 values of one update before they are stored; v is in units of the scale."""

    weight: Float32Array
    m: Float32Array
    x: Float32Array
    words: IntArray


def fma(a: Any, b: Any, c: Any) -> Float32Array:
    """Return a * b + c of float32 with one rounding.

    The product is exact in float64. The sum is rounded to odd there, so that the second rounding,
    to float32, is that of the exact sum.
    """
    product, added = np.float64(a) * np.float64(b), np.float64(c)
    total = product + added
    part = total - product
    error = (product - (total - part)) + (added - part)
    bits = total.view(np.int64)
    is_even = bits & 1 == 0
    # An inexact float64 with an even last bit moves by one towards the exact sum.
    towards = np.where((error > 0) == (total > 0), 1, -1)
    moved = np.where((error != 0) & is_even & np.isfinite(total), bits + towards, bits)
    return moved.view(np.float64).astype(np.float32)


def float_of(bits: Any) -> Float32Array:
    return np.asarray(bits, dtype=np.int64).astype(np.uint32).view(np.float32)


def signed_bits(values: Float32Array) -> IntArray:
    return values.view(np.int32).astype(np.int64)


def words_of(place: Place, num_blocks: int) -> IntArray:
    """Return the random word of each element, (num_blocks, 128)."""
    words = np.empty((num_blocks, 128), dtype=np.int64)
    constants = np.array(CONSTANTS, dtype=np.uint64)
    for block in range(num_blocks):
        row, column = divmod(place.local_start + 128 * block, place.run)
        index = place.first + row * place.pitch + column
        hashed = splitmix64((place.key & _LONG) ^ (index * 0xD1342543DE82EF95 & _LONG))
        k1, k2 = np.uint64(hashed & _WORD), np.uint64(hashed >> 32 | 1)
        x = ((constants + k1) % np.uint64(1 << 32)) * k2 % np.uint64(1 << 32)
        words[block] = (x ^ x >> np.uint64(13)).astype(np.int64)
    return words


def in_blocks(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in rows of 128 elements; zeros are added to the last."""
    padded = np.zeros(-(-array.size // 128) * 128, dtype=array.dtype)
    padded[: array.size] = array
    return padded.reshape(-1, 128)


def joined_24(high: npt.NDArray[Any], low: npt.NDArray[Any]) -> Float32Array:
    """Return the master weights of a bfloat16 parameter and an int8 remainder."""
    weight = float_of(((high.astype(np.int64) << 16) + (low.astype(np.int64) << 8)) & _WORD)
    return np.where(np.isnan(weight), decoded(high), weight)


def split_24(
    weight: Float32Array, words: IntArray
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int8]]:
    """Return the bfloat16 parameter and the int8 remainder of rounded master weights."""
    bits = bits_of(weight).astype(np.int64)
    bits = np.where(np.isnan(weight), bits & 0xFFFF0000 | 0x400000, bits) + (words & 0xFF)
    high, low = bits + 0x8000 >> 16, bits >> 8 & 0xFF
    return high.astype(np.uint16), low.astype(np.uint8).view(np.int8)


def master_of(state: HostState) -> Float32Array:
    """Return the float32 master weights."""
    if state.remainder is None:
        return np.array(state.master, dtype=np.float32)
    return joined_24(state.master, state.remainder)


def decoded_sq(state: HostState, place: Place) -> Float64Array:
    """Return the second moments; `place` has the scale of the last update."""
    assert state.exponents is not None
    exponents = np.repeat(state.exponents[:, 1].astype(np.int64), 128)[: state.exp_avg_sq.size]
    codes = state.exp_avg_sq.astype(np.int64)
    scale = float(float_of(place.scale_bits)) * np.exp2(exponents - 127.0)
    v: Float64Array = scale * (1 + codes % 8 / 8) * np.exp2(codes // 8 - 31.0)
    return v


def decoded_avg(state: HostState) -> Float64Array:
    """Return the first moments."""
    if state.exp_avg.dtype == np.uint16:
        return decoded(state.exp_avg).astype(np.float64)
    assert state.exponents is not None
    exponents = np.repeat(state.exponents[:, 0].astype(np.int64), 128)[: state.exp_avg.size]
    magnitude = state.exp_avg.astype(np.int64) % 128
    least = np.where(exponents > 0, np.exp2(exponents - 127.0), 0)
    value = least * ((1 + magnitude % 16 / 16) * np.exp2(magnitude // 16) - 1)
    return np.where(state.exp_avg >= 128, -value, value)


def unrounded(
    state: HostState, gradient: Float32Array, row: Float32Array, place: Place
) -> Unrounded:
    """Return one update of a range before its results are stored, in blocks of 128."""
    assert state.exponents is not None
    shifted = state.exponents[:, 1:].astype(np.int64) - place.shift
    q = np.maximum(shifted, 63)
    lost = np.minimum(q - shifted, 64)
    scale = float_of(place.scale_bits + ((q - 127) << 23))
    weight = in_blocks(master_of(state))
    g = row[at.GRADIENT_SCALE] * in_blocks(gradient)
    is_plain = row[at.L2] == 0 and row[at.MOMENT] == 1 and row[at.FRESH] == 0
    if not is_plain:
        g = fma(row[at.GRADIENT_SCALE], in_blocks(gradient), row[at.L2] * weight)
    g = np.where(np.abs(g) > np.float32(2.0**30), np.float32(0), g)
    m = in_blocks(decoded_avg(state).astype(np.float32))
    if state.exp_avg.dtype == np.uint16:
        m = np.where(np.abs(m) < np.float32(2.0**-126), np.float32(0), m)
    m = fma(row[at.BETA1], m, fma(row[at.BETA1_REST], m, row[at.ONE_MINUS_BETA1] * g))
    y = g * (np.sqrt(row[at.ONE_MINUS_BETA2]) / np.sqrt(scale))
    x = fma(y, y, float_of((in_blocks(state.exp_avg_sq).astype(np.int64) + 768 - 8 * lost) << 20))
    direction = m if is_plain else fma(row[at.MOMENT], m, row[at.FRESH] * g)
    root_scale = row[at.DENOMINATOR_SCALE] * np.sqrt(scale)
    quotient = direction / fma(root_scale, np.sqrt(x), row[at.EPS])
    weight = weight - fma(row[at.DECAY], weight, row[at.STEP_SIZE] * quotient)
    return Unrounded(weight, m, x, words_of(place, len(weight)))


def updated(state: HostState, gradient: Float32Array, row: Float32Array, place: Place) -> HostState:
    """Return one update of a range; `param_out` is float16 if there is one."""
    assert state.exponents is not None
    new, numel = unrounded(state, gradient, row, place), gradient.size
    words, exponents = new.words, state.exponents.copy()
    q = np.maximum(state.exponents[:, 1:].astype(np.int64) - place.shift, 63)

    rounded = signed_bits(new.x) + (words >> 12)
    rounded = rounded.astype(np.int32).astype(np.int64)
    top = np.maximum((rounded.max(axis=1, keepdims=True) >> 20) - 768, 0)
    after = np.clip(q + ((top - 248) // 8), 63, 227)
    exponents[:, 1:] = after
    code = (rounded >> 20) - (768 + 8 * (after - q))
    code = np.maximum(code, 0) & 0xFF
    if state.exp_avg.dtype == np.uint16:
        m = (signed_bits(new.m) & _WORD) + (words & 0xFFFF) >> 16 & 0xFFFF
    else:
        top = (signed_bits(new.m) & 0x7FFFFFFF).max(axis=1, keepdims=True)
        e = np.maximum(8, (top >> 23) + (top % (1 << 23) > 0x770000) - 7)
        exponents[:, :1] = e
        shifted = signed_bits(np.abs(new.m) + float_of(e << 23))
        m = np.minimum(127, (shifted + (words & 0x7FFFF) >> 19) - 16 * e)
        m |= np.where(np.signbit(new.m), 128, 0)

    weight = new.weight.reshape(-1)[:numel]
    changed = replace(
        state,
        exp_avg=m.reshape(-1)[:numel].astype(state.exp_avg.dtype),
        exp_avg_sq=code.reshape(-1)[:numel].astype(np.uint8),
        exponents=exponents,
    )
    if state.param_out is not None:
        with np.errstate(over="ignore"):
            changed.param_out = weight.astype(np.float16).view(np.int16)
    if state.remainder is None:
        changed.master = weight
    else:
        changed.master, changed.remainder = split_24(weight, words.reshape(-1)[:numel])
    return changed
