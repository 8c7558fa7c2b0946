"""Records are read back exactly, and bytes of any other content are rejected."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_adam.kept.record import pack, unpack

VALUES: dict[str, Any] = {
    "clip": 0.1 + 0.2,
    "tiny": 5e-324,
    "step": 2**70,
    "skipped": False,
    "extra": {"rng": [1, 2.5, None, "ä\ud800\n"], "empty": {}},
    "inf": [math.inf, -math.inf, -0.0],
}


def arrays() -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "present": rng.random(13) < 0.5,
        "steps": rng.integers(-(2**63), 2**63 - 1, (3, 5)),
        "bits": np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32),
        "lr": rng.random((2, 3, 4)).transpose(2, 0, 1),
        "bytes": rng.integers(0, 256, 17).astype(np.uint8)[::-2],
        "one": np.array(3.5),
        "none": np.zeros((0, 3), np.float32),
    }


def with_header(header: object, rest: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("=Q", len(text)) + text + rest


def test_values_and_arrays_are_read_back_exactly() -> None:
    values, found = unpack(pack(VALUES, arrays()))
    assert repr(values) == repr(VALUES)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].flags.writeable


def test_nan_stays_nan() -> None:
    values, _ = unpack(pack({"norm": math.nan}, {}))
    assert math.isnan(values["norm"])


@pytest.mark.parametrize("dtype", ["float16", ">i8", ">f4", "int32", "complex64", "U3", "O"])
def test_other_dtypes_are_rejected(dtype: str) -> None:
    with pytest.raises(ValueError, match="Array 'x' has dtype"):
        pack({}, {"x": np.zeros(2, dtype)})


def test_values_that_json_lacks_are_rejected() -> None:
    with pytest.raises(TypeError):
        pack({"x": {1, 2}}, {})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("=Q", 2**63) + b"[{}, []]",
        struct.pack("=Q", 3) + b"\xff\xfe\xfd",
        struct.pack("=Q", 100_000) + b"[" * 100_000,
        with_header([{}, []], b"more"),
        with_header([[], []]),
        with_header({}),
        with_header([{}, [["x", "int64", [2]]]], bytes(15)),
        with_header([{}, [["x", "int64", [2]]]], bytes(17)),
        with_header([{}, [["x", "int64", [-1, -2]]]], bytes(16)),
        with_header([{}, [["x", "int64", [True]]]], bytes(8)),
        with_header([{}, [["x", "int64", [1.0]]]], bytes(8)),
        with_header([{}, [["x", "int64", 1]]], bytes(8)),
        with_header([{}, [["x", "int64", "1"]]], bytes(8)),
        with_header([{}, [["x", "int64", [2**40, 2**40]]]], bytes(8)),
        with_header([{}, [["x", "int64", [0, 2**40, 2**40]]]]),
        with_header([{}, [["x", "int64", [1] * 100]]], bytes(8)),
        with_header([{}, [["x", "object", [1]]]], bytes(8)),
        with_header([{}, [["x", [], [1]]]], bytes(8)),
        with_header([{}, [["x", "bool", [8]]]], b"\2" * 8),
        with_header([{}, [[1, "int64", [1]]]], bytes(8)),
        with_header([{}, [["x", "int64", [1]], ["x", "int64", [1]]]], bytes(16)),
    ],
)
def test_bytes_of_other_content_are_rejected(content: bytes) -> None:
    with pytest.raises(ValueError, match="is damaged"):
        unpack(content)


def test_every_truncation_is_rejected() -> None:
    content = pack(VALUES, arrays())
    for length in range(len(content)):
        with pytest.raises(ValueError, match="is damaged"):
            unpack(content[:length])


@given(st.data())
def test_changed_bytes_are_read_or_rejected(data: st.DataObject) -> None:
    content = bytearray(pack({"a": 1.5}, {"x": np.arange(3), "y": np.ones((2, 2), np.bool_)}))
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(content) - 1))
        content[index] = data.draw(st.integers(0, 255))
    try:
        _, found = unpack(bytes(content))
    except ValueError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(content)
