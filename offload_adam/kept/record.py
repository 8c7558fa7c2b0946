"""The content of a record: JSON values and arrays as bytes, without pickle.

    8 bytes   length of the header
    header    JSON: the values; name, dtype and shape of each array; padded to 8 bytes
    arrays    one after the other, each padded to 8 bytes

Numbers are in this machine's byte order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_adam.layout.flat import align

JSON = None | bool | int | float | str | list[Any] | tuple[Any, ...] | dict[str, Any]
"""A value that JSON represents, or an infinity or NaN. Tuples are read back as lists."""

_DTYPES = {name: np.dtype(name) for name in ("bool", "uint8", "int64", "float32", "float64")}
_LENGTH = struct.Struct("=Q")
_ALIGNMENT_NBYTES = 8


def pack(values: Mapping[str, JSON], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return values and arrays as bytes.

    Args:
        values: floats are kept exactly, but all NaNs become the same one.
        arrays: of bool, uint8, int64, float32 or float64, of any shape and strides.

    Raises:
        TypeError: JSON cannot represent a value.
        ValueError: an array has another dtype.
    """
    for name, array in arrays.items():
        if _DTYPES.get(array.dtype.name) != array.dtype:  # or the same name in another byte order
            raise ValueError(
                f"Array {name!r} has dtype {array.dtype.str}. Convert it to one of "
                f"{', '.join(_DTYPES)}."
            )
    entries = [[name, array.dtype.name, array.shape] for name, array in arrays.items()]
    header = json.dumps([dict(values), entries]).encode()
    header += b" " * (-len(header) % _ALIGNMENT_NBYTES)
    parts = [_LENGTH.pack(len(header)), header]
    for array in arrays.values():
        parts += array.tobytes(), bytes(-array.nbytes % _ALIGNMENT_NBYTES)
    return b"".join(parts)


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the values and the arrays of a result of `pack`. The arrays are copies.

    Raises:
        ValueError: the bytes are not a result of `pack`.
    """
    try:
        (header_nbytes,) = _LENGTH.unpack_from(content)
        start = _LENGTH.size + header_nbytes
        values, entries = json.loads(content[_LENGTH.size : start])
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, dtype_name, shape in entries:
            if not isinstance(name, str) or name in arrays:
                raise ValueError("the name of an array is not a text, or not unique")
            arrays[name] = _array(content, start, _DTYPES[dtype_name], shape)
            start += align(arrays[name].nbytes, _ALIGNMENT_NBYTES)
        if not isinstance(values, dict) or start != len(content):
            raise ValueError("values or length are wrong")
    # RecursionError: deeply nested JSON.
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        raise ValueError(f"A record of {len(content)} bytes is damaged: {error!r:.200}") from error
    return values, arrays


def step_of(prepared: bytes) -> int:
    """Return the number of the step whose prepared record this is, skipped steps included."""
    return int(unpack(prepared)[0]["num_steps"]) + 1


def _array(content: bytes, start: int, dtype: np.dtype[Any], shape: list[int]) -> npt.NDArray[Any]:
    """Copy the array that starts at a byte of the content."""
    # numpy checks the lengths, their product and the bounds, but would accept a bare number.
    array: npt.NDArray[Any] = np.ndarray(tuple(shape), dtype, content, start)
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise ValueError("a bool is neither 0 nor 1")  # numpy's behavior is undefined then
    return array.copy()
