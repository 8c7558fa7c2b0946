"""Encodes Python values as JSON, and decodes them exactly as they were.

A type that JSON lacks becomes an object with its name under "$type":

    (1, inf)    {"$type": "tuple", "items": [1, {"$type": "float", "value": "inf"}]}
    {3: "a"}    {"$type": "dict", "pairs": [[3, "a"]]}

A dict that has the key "$type" is encoded as pairs, so "$type" in JSON always names a type.
Types are compared exactly: a subclass would be decoded as its base class, so it is rejected.
Decoding constructs only the types below, and allocates memory in proportion to the text.
"""

from __future__ import annotations

import binascii
import io
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import torch

from offload_adam.dtypes import DTYPE_NAMES, TORCH_DTYPES, in_order
from offload_adam.errors import CheckpointError
from offload_adam.printable import show

TAG = "$type"
MAX_NBYTES = 1024 * 1024
"""Limit of one tensor, array or bytes object: larger ones would make the manifest slow to parse."""
MAX_TEXT_NBYTES = 64 * 1024 * 1024
"""Limit of one encoded value, estimated. A value that is in several places counts several times."""
# A level takes up to 3 Python frames to decode, and Python allows 1,000 frames by default.
_MAX_DEPTH = 50
# 1,234 digits. Python converts at most 4,300 digits (14,284 bits) from or to text by default.
_MAX_INT_BITS = 4096

_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "torch.Size": torch.Size,
}
_MAPPINGS: dict[str, type[dict[Any, Any]]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
    "defaultdict": defaultdict,
}
_FACTORIES = {kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict, set)}
_TENSOR_DTYPES = {str(dtype): dtype for dtype in DTYPE_NAMES}
_ARRAY_DTYPES = {
    np.dtype(name).newbyteorder(order).str: np.dtype(name).newbyteorder(order)
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for order in ("<", ">")
}
_MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError),
    *(TypeError, ValueError),
)
"""Errors of the decoders if a value is malformed. Others, such as MemoryError, propagate."""

_Path = tuple[Any, ...]
"""The name of the outermost value, then the keys that lead to a value inside it."""


def encode(value: object, name: str) -> Any:
    """Return a value as lists, dicts with text keys, strings, finite numbers, bools and None.

    Args:
        name: what error messages call the value.

    Raises:
        CheckpointError: the value, or one inside it, cannot be encoded; the message names its path.
            Or it is too large or nested too deeply, see `check_size`.
    """
    check_size(value, name)
    return _encode(value, (name,))


def check_size(value: object, name: str) -> None:
    """Check that a value has at most `_MAX_DEPTH` levels and `MAX_TEXT_NBYTES` as text.

    The time is proportional to the memory that the value takes: a list that holds another one
    several times, and so on for some levels, may be small in memory and enormous as text.

    Raises:
        CheckpointError: it is nested more deeply, contains itself, or is larger.
    """
    nbytes, _ = _measure(value, 1, name, {})
    if nbytes > MAX_TEXT_NBYTES:
        raise CheckpointError(
            f"{name} would take about {nbytes:,} bytes in the manifest, more than the limit of "
            f"{MAX_TEXT_NBYTES:,}. Register larger data as a buffer of the model."
        )


def _measure(
    value: object, level: int, name: str, known: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Return about how many bytes a value takes as text, and how many levels it has.

    Args:
        level: of the value itself, from 1.
        known: the result by the id of each container that has been measured.
    """
    nbytes, height = (8 if isinstance(value, (int, float, NoneType)) else 64), 1
    if isinstance(value, str):
        # JSON escapes other characters, mostly by six bytes.
        nbytes = 8 + len(value) * (1 if value.isascii() and value.isprintable() else 6)
    elif isinstance(value, (bytes, bytearray)):
        nbytes += 4 * len(value) // 3
    elif isinstance(value, torch.Tensor):
        # A larger one is rejected by itself, with its place.
        nbytes += 4 * min(value.numel() * value.element_size(), MAX_NBYTES) // 3
    elif isinstance(value, np.ndarray):
        nbytes += 4 * min(value.nbytes, MAX_NBYTES) // 3
    elif id(value) in known:
        nbytes, height = known[id(value)]
    elif isinstance(value, (list, tuple, set, frozenset, dict)) and level <= _MAX_DEPTH:
        for item in chain(value.keys(), value.values()) if isinstance(value, dict) else value:
            item_nbytes, item_height = _measure(item, level + 1, name, known)
            nbytes, height = nbytes + item_nbytes, max(height, 1 + item_height)
        known[id(value)] = nbytes, height
    if level + height - 1 > _MAX_DEPTH:
        raise CheckpointError(
            f"{name} has more than {_MAX_DEPTH} levels of nesting, or contains itself. Nest its "
            "values less deeply."
        )
    return nbytes, height


def decode(value: Any, name: str) -> Any:
    """Return the value that `encode` encoded. Tensors are on the host.

    Args:
        name: what error messages call the value.

    Raises:
        CheckpointError: `value` is not a result of `encode`.
    """
    try:
        return _decode(value)
    except _MALFORMED as error:
        raise CheckpointError(
            f"{name} cannot be decoded ({type(error).__name__}: {str(error).rstrip('.')}). Load it "
            "with the version of offload_adam that wrote it, or load another checkpoint."
        ) from error


def _encode(value: Any, path: _Path) -> Any:
    # Compared with `is`, not isinstance: a bool is an int, and a subclass would lose its type.
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        if value.bit_length() > _MAX_INT_BITS:
            raise _rejected(path, f"an integer of {value.bit_length()} bits", "Save it as bytes")
        return value
    if kind is float:
        return value if math.isfinite(value) else {TAG: "float", "value": repr(value)}
    if kind is str:
        # JSON does not define what a lone surrogate means.
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _rejected(path, "text with a lone surrogate", "Save it as bytes")
        return value
    if kind is list:
        return _encode_all(value, path)
    for tag, sequence in _SEQUENCES.items():
        if kind is sequence:
            return {TAG: tag, "items": _encode_all(value, path)}
    for tag, mapping in _MAPPINGS.items():
        if kind is mapping:
            return _encode_mapping(tag, value, path)
    if kind is complex:
        return {TAG: "complex", "items": _encode_all((value.real, value.imag), path)}
    if kind in (bytes, bytearray):
        return {TAG: kind.__name__, "data": _to_base64(value, path)}
    if kind is io.BytesIO:
        return {TAG: "BytesIO", "data": _to_base64(value.getvalue(), path), "at": value.tell()}
    if kind is torch.dtype:
        return {TAG: "torch.dtype", "value": str(value)}
    if kind is torch.device:
        return {TAG: "torch.device", "value": str(value)}
    if kind is torch.Tensor:
        return _encode_tensor(value, path)
    if kind is np.ndarray or isinstance(value, np.generic):
        return _encode_array(value, path)
    raise _rejected(
        path,
        f"of type {kind.__name__}",
        "Save numbers, text, bytes, tensors, arrays, lists, tuples, sets and dicts",
    )


def _rejected(path: _Path, what: str, remedy: str) -> CheckpointError:
    where = str(path[0]) + "".join(f"[{show(key)}]" for key in path[1:])
    return CheckpointError(f"{where} is {what}, which a checkpoint cannot hold. {remedy}.")


def _encode_all(values: Iterable[Any], path: _Path) -> list[Any]:
    return [_encode(value, (*path, index)) for index, value in enumerate(values)]


def _encode_mapping(tag: str, value: dict[Any, Any], path: _Path) -> Any:
    keys = [_encode(key, (*path, key)) for key in value]
    values = [_encode(inner, (*path, key)) for key, inner in value.items()]
    if tag == "dict" and TAG not in value and all(type(key) is str for key in value):
        return dict(zip(keys, values, strict=True))
    found = {TAG: tag, "pairs": [list(pair) for pair in zip(keys, values, strict=True)]}
    # Only the factory of a defaultdict, and only by name: decoding calls no other function.
    factory = getattr(value, "default_factory", None)
    if factory is not None:
        name = getattr(factory, "__name__", "")
        if _FACTORIES.get(name) is not factory:
            raise _rejected(
                path, f"a defaultdict of {name or type(factory).__name__}", "Save a dict instead"
            )
        found["factory"] = name
    return found


def _encode_tensor(value: torch.Tensor, path: _Path) -> Any:
    is_dense = value.layout is torch.strided and not value.is_nested and not value.is_meta
    if not is_dense or value.dtype not in DTYPE_NAMES:
        what = f"a tensor of {value.dtype}, {value.layout} on {value.device}"
        raise _rejected(path, what, "Save a dense tensor with data, of a dtype such as float32")
    if value.requires_grad:
        raise _rejected(path, "a tensor that requires gradients", "Save tensor.detach()")
    _require_small(value.nbytes, path)  # before a copy of any size is made
    flat = in_order(value, tuple(range(value.dim()))).view(torch.uint8)
    return {
        TAG: "torch.Tensor",
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "data": _to_base64(flat.numpy(force=True).tobytes(), path),
    }


def _encode_array(value: np.ndarray[Any, Any] | np.generic, path: _Path) -> Any:
    is_array = isinstance(value, np.ndarray)
    # The table has no structured or object dtypes. Scalars must be exactly of the type to which the
    # dtype's text is decoded: np.longlong and subclasses of NumPy's scalar types are not.
    dtype = _ARRAY_DTYPES.get(value.dtype.str)
    if dtype != value.dtype or not (is_array or type(value) is value.dtype.type is dtype.type):
        raise _rejected(
            path,
            f"of type {type(value).__name__} and dtype {value.dtype}",
            "Save numbers of a dtype such as int64 or float32",
        )
    _require_small(value.nbytes, path)
    found = {TAG: "numpy.ndarray" if is_array else "numpy.generic", "dtype": value.dtype.str}
    if is_array:
        found["shape"] = list(value.shape)
    return {**found, "data": _to_base64(value.tobytes(), path)}


def _require_small(nbytes: int, path: _Path) -> None:
    if nbytes > MAX_NBYTES:
        remedy = f"The limit is {MAX_NBYTES:,} bytes: register larger data as a buffer of the model"
        raise _rejected(path, f"{nbytes:,} bytes long", remedy)


def _to_base64(data: bytes | bytearray, path: _Path) -> str:
    _require_small(len(data), path)
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _from_base64(data: str) -> bytearray:
    return bytearray(binascii.a2b_base64(data.encode("ascii"), strict_mode=True))


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: _decode(inner) for key, inner in value.items()}
    fields = dict(value)
    tag = fields.pop(TAG)
    if tag not in _DECODERS:
        raise ValueError(f"unknown type {show(tag)}")
    # A wrong field raises a TypeError, which `decode` replaces.
    return _DECODERS[tag](**fields)


def _decode_sequence(make: Callable[[list[Any]], Any], /, items: list[Any]) -> Any:
    found = [_decode(inner) for inner in items]
    if make in (set, frozenset):
        _require_few_collisions(found)
    return make(found)


def _require_few_collisions(keys: Sequence[Any]) -> None:
    """Reject many keys with equal hashes, since constructing a dict or set takes quadratic time."""
    if len(keys) > 1000 and len({hash(key) for key in keys}) < len(keys) / 2:
        raise ValueError("most keys have equal hashes")


def _decode_mapping(
    kind: type[dict[Any, Any]], /, pairs: Sequence[tuple[Any, Any]], factory: str | None = None
) -> Any:
    found = kind()
    keys = [_decode(key) for key, _ in pairs]
    _require_few_collisions(keys)
    found.update({key: _decode(inner) for key, (_, inner) in zip(keys, pairs, strict=True)})
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    if factory is not None:
        found.default_factory = _FACTORIES[factory]  # type: ignore[attr-defined]
    return found


def _decode_float(value: str) -> float:
    return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value]


def _decode_complex(items: list[Any]) -> complex:
    real, imaginary = (_decode(inner) for inner in items)
    return complex(real, imaginary)


def _decode_bytes_io(data: str, at: int) -> io.BytesIO:
    file = io.BytesIO(_from_base64(data))
    file.seek(at)
    return file


def _decode_tensor(dtype: str, shape: list[int], data: str) -> torch.Tensor:
    content, torch_dtype = _from_base64(data), _TENSOR_DTYPES[dtype]
    if math.prod(shape) * torch_dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes are not a {dtype} tensor of shape {shape}")
    if not content:
        return torch.empty(shape, dtype=torch_dtype, device="cpu")
    flat = torch.frombuffer(content, dtype=torch.uint8)
    # A byte other than 0 and 1 would be an invalid bool: `to` makes it True.
    is_bool = torch_dtype is torch.bool
    return (flat.to(torch_dtype) if is_bool else flat.view(torch_dtype)).view(shape)


def _decode_array(dtype: str, shape: list[int], data: str) -> np.ndarray[Any, Any]:
    numpy_dtype = _ARRAY_DTYPES[dtype]
    if numpy_dtype == np.bool_:  # as in _decode_tensor
        return np.frombuffer(_from_base64(data), np.uint8).astype(np.bool_).reshape(shape)
    return np.frombuffer(_from_base64(data), numpy_dtype).reshape(shape)


def _decode_scalar(dtype: str, data: str) -> Any:
    return _decode_array(dtype, [], data)[()]


_DECODERS: Mapping[str, Callable[..., Any]] = {
    **{tag: partial(_decode_sequence, make) for tag, make in _SEQUENCES.items()},
    **{tag: partial(_decode_mapping, kind) for tag, kind in _MAPPINGS.items()},
    "float": _decode_float,
    "complex": _decode_complex,
    "bytes": lambda data: bytes(_from_base64(data)),
    "bytearray": _from_base64,
    "BytesIO": _decode_bytes_io,
    "torch.dtype": lambda value: TORCH_DTYPES[value],
    "torch.device": lambda value: torch.device(value),
    "torch.Tensor": _decode_tensor,
    "numpy.ndarray": _decode_array,
    "numpy.generic": _decode_scalar,
}
