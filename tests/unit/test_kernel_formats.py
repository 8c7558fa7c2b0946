"""Widening and rounding in the kernels, over every 16-bit pattern, against torch's conversions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numba import types
from numba.extending import intrinsic

from offload_adam.kernels.compilation import jit_inlined
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.ir_vectors import Vectors
from offload_adam.kernels.numba_private import array_struct, no_value

SIXTEEN_BITS = [FloatFormat.BFLOAT16, FloatFormat.FLOAT16]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def convert(typingctx: Any, source: Any, target: Any, index: Any, lanes: Any) -> Any:
    """Load so many elements of one array and store them to the other, in its format."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before = array_struct(context, builder, source, arguments[0]).data
        after = array_struct(context, builder, target, arguments[1]).data
        vectors = Vectors(builder, lanes.literal_value)
        value = vectors.load(before, arguments[2], source.dtype)
        vectors.store(value, after, arguments[2], target.dtype)
        return no_value(context)

    return types.void(source, target, index, lanes), codegen


def _convert_all(source: Any, target: Any) -> None:
    whole = source.size // 16 * 16
    for i in range(0, whole, 16):
        convert(source, target, i, 16)
    for i in range(whole, source.size):
        convert(source, target, i, 1)


convert_all = jit_inlined(_convert_all)


def torch_dtype(target: FloatFormat) -> torch.dtype:
    """Return torch's dtype of the format."""
    dtype: torch.dtype = getattr(torch, target.value)
    return dtype


def rounded_by_kernel(values: npt.NDArray[np.float32], target: FloatFormat) -> npt.NDArray[Any]:
    """Return the kernel's bits of the values in the format."""
    out = np.empty(values.size, dtype=target.bits_dtype)
    convert_all(values, out)
    return out


def rounded_by_torch(values: npt.NDArray[np.float32], target: FloatFormat) -> npt.NDArray[Any]:
    """Return torch's bits of the values in the format."""
    narrow = torch.from_numpy(values).to(torch_dtype(target))
    return narrow.view(torch.int16).numpy().view(target.bits_dtype)


def widened(narrow: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the kernel's float32 of carried bits."""
    out = np.empty(narrow.size, dtype=np.float32)
    convert_all(narrow, out)
    return out


def every_pattern(target: FloatFormat) -> npt.NDArray[Any]:
    """Return all 65536 values of a 16-bit format as it is carried."""
    return np.arange(2**16, dtype=np.uint16).view(target.bits_dtype)


@pytest.mark.parametrize("target", SIXTEEN_BITS)
def test_every_pattern_widens_exactly(target: FloatFormat) -> None:
    narrow = every_pattern(target)
    ours = widened(narrow)
    theirs = torch.from_numpy(narrow.view(np.int16)).view(torch_dtype(target)).float().numpy()
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("target", SIXTEEN_BITS)
def test_every_pattern_survives_the_way_there_and_back(target: FloatFormat) -> None:
    values = widened(every_pattern(target))
    finite = ~np.isnan(values)
    back = rounded_by_kernel(values, target)
    np.testing.assert_array_equal(back[finite], every_pattern(target)[finite])
    assert np.all(np.isnan(widened(back[~finite])))


@pytest.mark.parametrize("target", SIXTEEN_BITS)
def test_ties_and_their_neighbours_round_as_torchs(target: FloatFormat) -> None:
    values = widened(every_pattern(target))
    values = np.sort(values[np.isfinite(values)]).astype(np.float64)
    # The middle between two neighbours is a float32, and so are the floats next to it.
    ties = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    beyond = np.float32(values[-1] + (values[-1] - values[-2]) / 2)  # the tie with infinity
    ties = np.concatenate((ties, [beyond, -beyond]))
    for cases in (ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)):
        kernel = rounded_by_kernel(cases.astype(np.float32), target)
        np.testing.assert_array_equal(kernel, rounded_by_torch(cases.astype(np.float32), target))


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_upper_half_rounds_to_bfloat16_as_torchs(low: int) -> None:
    values = ((np.arange(2**16, dtype=np.uint32) << 16) | np.uint32(low)).view(np.float32)
    ours = rounded_by_kernel(values, FloatFormat.BFLOAT16)
    nan = np.isnan(values)
    assert np.all(np.isnan(widened(ours[nan])))
    theirs = rounded_by_torch(values, FloatFormat.BFLOAT16)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])


@pytest.mark.parametrize("target", SIXTEEN_BITS)
def test_infinities_keep_their_sign(target: FloatFormat) -> None:
    values = np.array([np.inf, -np.inf, 3.4e38, -3.4e38], dtype=np.float32)
    expected = np.array([np.inf, -np.inf, np.inf, -np.inf], dtype=np.float32)
    np.testing.assert_array_equal(widened(rounded_by_kernel(values, target)), expected)
