"""What the bytes of a checkpoint mean: `manifest.json`, and Python values as JSON, exactly.

The manifest says what a checkpoint holds, where, and how to know that it is whole. It holds all
but the tensors: what JSON lacks is an object with its type's name as a tag.

    (1, inf)    {"$type": "tuple", "items": [1, {"$type": "float", "value": "inf"}]}
    {3: "a"}    {"$type": "dict", "pairs": [[3, "a"]]}

A mapping with the key "$type" is written in pairs, so an object with that key is always a tag.
Types are compared exactly: a subclass would come back as its base class, so it is rejected.
Decoding makes instances of the types below and of no others, and allocates no more than the text.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from offload_adam.errors import CheckpointError
from offload_adam.layout.budget import CHECKPOINT_BLOCK_NBYTES
from offload_adam.state.state_shard import Box, range_of_box

FORMAT_VERSION = 3
"""2 has no tags of `encode` in it, and no `values`."""
READABLE_VERSIONS = (2, FORMAT_VERSION)
MANIFEST_NAME = "manifest.json"
BLOCK_NBYTES = CHECKPOINT_BLOCK_NBYTES

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that a checkpoint may hold, by safetensors' names."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
Count = Annotated[int, Field(ge=0)]
StepCount = Annotated[FiniteFloat, Field(ge=0, le=2**24)]
"""torch counts in float32, which goes no further than this."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Piece(_Entry):
    """One contiguous box of a tensor: its elements start at byte `start` of a file."""

    offsets: list[Count]
    sizes: list[Count]
    file: str
    start: Count

    @property
    def box(self) -> Box:
        """The box, in the tensor's dimensions as they lie in memory."""
        return Box(tuple(self.offsets), tuple(self.sizes))


class TensorEntry(_Entry):
    """One tensor. Boxes count in its dimensions as they lie in memory, the outermost first.

    order: which logical dimension each of these is; shape is the logical one.
    """

    dtype: str
    shape: list[Count]
    order: list[Count]
    pieces: list[Piece]

    @property
    def memory_shape(self) -> list[int]:
        """The sizes of the dimensions as they lie in memory."""
        return [self.shape[dim] for dim in self.order]


class FileEntry(_Entry):
    """One file: its length, and the CRC-32 of each 4 MiB of it."""

    nbytes: Count
    checksums: list[Count]


class RankEntry(_Entry):
    """One rank's file, and the pieces of tensors in it: this rank's part of the manifest."""

    name: str
    file: FileEntry
    tensors: dict[str, TensorEntry]


class GroupEntry(_Entry):
    """One group of the optimizer: the names of its parameters, and its options."""

    parameters: list[str]
    options: dict[str, Any]


class OptimizerEntry(_Entry):
    """What of an optimizer is no tensor.

    steps: completed updates by the name of each trained parameter.
    further: what the kind of optimizer adds.
    """

    groups: list[GroupEntry]
    steps: dict[str, StepCount]
    further: dict[str, Any]


class Manifest(_Entry):
    """All of a checkpoint but the tensors' bytes.

    tied: further names of the model's tensors, each with the one that the tensor stands under.
    values: entries of the model's state dict that are no tensors, encoded.
    extra: what the caller of `save_checkpoint` gave, encoded.
    """

    format_version: Count
    step: Count
    world_size: Count
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    optimizer: OptimizerEntry
    tied: dict[str, str]
    values: dict[str, Any] = {}
    extra: dict[str, Any]

    def decoded_values(self) -> dict[str, Any]:
        """Return what of the model's state dict is no tensor."""
        return {name: decode(value, name) for name, value in self.values.items()}

    def decoded_extra(self) -> dict[str, Any]:
        """Return what the caller of `save_checkpoint` gave.

        Raises:
            CheckpointError: it cannot be decoded.
        """
        if self.format_version == 2:
            return self.extra
        found = decode(self.extra, "extra")
        if not isinstance(found, dict):
            raise CheckpointError(f"extra is a {type(found).__name__}, and must be a dict")
        return found

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return sealed(self.model_dump())


def sealed(values: dict[str, Any]) -> str:
    """Return a mapping as JSON that holds its own SHA-256, so that a flipped bit is seen.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps({"sha256": _digest(values), **values}, allow_nan=False)


def _digest(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest: nothing in it leads out of the folder, overlaps or is missing.

    Raises:
        CheckpointError: naming the entry and its problem.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST_NAME}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no plain file")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: str | bytes, origin: str) -> Manifest:
    """Parse the text of a manifest.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_repetition)
        if isinstance(values, dict):
            digest = values.pop("sha256", None)
            if digest != _digest(values):
                raise CheckpointError(f"{origin} is damaged: its checksum is another")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not JSON: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version not in READABLE_VERSIONS:
        other = "or a newer one" if version > FORMAT_VERSION else "or begin anew"
        raise CheckpointError(
            f"{origin} has format version {version}, and this package reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: use the version of offload_adam that "
            f"wrote it, {other}"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{origin}: {where or 'all of it'}: {first['msg']}") from error
    try:
        manifest.decoded_values()
        manifest.decoded_extra()
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    _check_files(manifest, origin)
    for name, entry in manifest.tensors.items():
        try:
            _check_tensor(manifest, entry)
        except ValueError as error:
            raise CheckpointError(f"{origin}: tensor {name!r}: {error}") from error
    for alias, name in manifest.tied.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CheckpointError(f"{origin}: {alias!r} cannot be another name of {name!r}")
    return manifest


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; reject a duplicate key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _check_files(manifest: Manifest, origin: str) -> None:
    for name, entry in manifest.files.items():
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise CheckpointError(f"{origin}: {name!r} is no plain file name")
        if len(entry.checksums) != -(-entry.nbytes // BLOCK_NBYTES):
            raise CheckpointError(f"{origin}: {name} has not one checksum for each 4 MiB")


def _check_tensor(manifest: Manifest, entry: TensorEntry) -> None:
    """Check that the pieces of a tensor cover it exactly once and lie inside their files."""
    if entry.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {entry.dtype!r}")
    if sorted(entry.order) != list(range(len(entry.shape))):
        raise ValueError(f"{entry.order} is no order of {len(entry.shape)} dimensions")
    for piece in entry.pieces:
        file = manifest.files.get(piece.file)
        if file is None:
            raise ValueError(f"{piece.file!r} is not a file of the checkpoint")
        start, end = range_of_box(entry.memory_shape, piece.box)
        if piece.start + (end - start) * DTYPES[entry.dtype].itemsize > file.nbytes:
            raise ValueError(f"a piece ends behind the end of {piece.file}")
    ranges = [(start, end) for start, end, _ in sorted_pieces(entry)]
    numel = math.prod(entry.shape)
    for (_, end), (start, _) in pairwise([(0, 0), *ranges, (numel, numel)]):
        if start > end:
            raise ValueError(f"elements {end} to {start - 1} are missing")
        if start < end:
            raise ValueError(f"element {start} stands twice")


def sorted_pieces(entry: TensorEntry) -> list[tuple[int, int, Piece]]:
    """Return the flat range [start, end) of every piece that has elements, ascending."""
    found = [(*range_of_box(entry.memory_shape, piece.box), piece) for piece in entry.pieces]
    return sorted((item for item in found if item[1] > item[0]), key=lambda item: item[:2])


def decoded_optimizer(saved: Mapping[str, Any], format_version: int) -> Any:
    """Decode the output of `plain_state` from a manifest.

    Raises:
        CheckpointError: it cannot be decoded.
    """
    if format_version > 2:
        return decode(saved, "the saved optimizer")
    # Format 2 had no tags, and made a list of the only tuple.
    groups = [
        {**group, "options": {**group["options"], "betas": tuple(group["options"]["betas"])}}
        for group in saved["groups"]
    ]
    return {**saved, "groups": groups}


TAG = "$type"
MAX_NBYTES = 1024 * 1024
"""Of one tensor, array or bytes: larger ones would make the manifest slow to parse."""
_MAX_DEPTH = 50  # a level takes up to 4 in JSON, and pydantic stops at 255
_MAX_INT_BITS = 4096  # Python parses no integer of more than 4300 digits

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
_TORCH_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.complex32),
    )
}
_ARRAY_DTYPES = {
    np.dtype(name).newbyteorder(order).str: np.dtype(name).newbyteorder(order)
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
    for order in ("<", ">")
}
_MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError),
    *(TypeError, ValueError),
)

_Path = tuple[Any, ...]
"""The name of the outermost value, and the keys that lead from there to one inside it."""


def encode(value: object, name: str) -> Any:
    """Return a value as JSON has it, see above.

    Args:
        name: of the value, for errors.

    Raises:
        CheckpointError: naming the place of a value that would not come back as it is.
    """
    return _encode(value, (name,))


def decode(value: Any, name: str) -> Any:
    """Return what `encode` was given. Tensors come back on the host.

    Raises:
        CheckpointError: `encode` has not written this.
    """
    try:
        return _decode(value)
    except _MALFORMED as error:
        raise CheckpointError(f"{name} cannot be decoded: {error!r}") from error


def _encode(value: Any, path: _Path) -> Any:
    kind = type(value)
    if len(path) > _MAX_DEPTH:
        raise CheckpointError(
            f"{path[0]} has more than {_MAX_DEPTH} levels, or contains itself: give a flatter one"
        )
    if value is None or kind is bool:
        return value
    if kind is int:
        if value.bit_length() > _MAX_INT_BITS:
            raise _rejected(path, f"an integer of {value.bit_length()} bits", "give it as bytes")
        return value
    if kind is float:
        return value if math.isfinite(value) else {TAG: "float", "value": repr(value)}
    if kind is str:
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _rejected(path, "text with a lone surrogate", "give it as bytes")
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
        return {TAG: kind.__name__, "data": _text_of(value, path)}
    if kind is io.BytesIO:
        return {TAG: "BytesIO", "data": _text_of(value.getvalue(), path), "at": value.tell()}
    if kind is torch.dtype and str(value) in _TORCH_DTYPES:
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
        "give numbers, text, bytes, tensors, arrays, lists, tuples, sets and dicts",
    )


def _rejected(path: _Path, what: str, remedy: str) -> CheckpointError:
    where = str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
    return CheckpointError(f"{where} is {what}, which a checkpoint cannot hold: {remedy}")


def _encode_all(values: Iterable[Any], path: _Path) -> list[Any]:
    return [_encode(value, (*path, index)) for index, value in enumerate(values)]


def _encode_mapping(tag: str, value: dict[Any, Any], path: _Path) -> Any:
    keys = [_encode(key, (*path, key)) for key in value]
    values = [_encode(inner, (*path, key)) for key, inner in value.items()]
    if tag == "dict" and TAG not in value and all(type(key) is str for key in value):
        return dict(zip(keys, values, strict=True))
    found = {TAG: tag, "pairs": [list(pair) for pair in zip(keys, values, strict=True)]}
    factory = getattr(value, "default_factory", None)
    if factory is not None:
        name = getattr(factory, "__name__", "")
        if _FACTORIES.get(name) is not factory:
            raise _rejected(path, f"a defaultdict of {factory!r}", "give a dict")
        found["factory"] = name
    return found


def _encode_tensor(value: torch.Tensor, path: _Path) -> Any:
    if value.layout is not torch.strided or value.is_meta or str(value.dtype) not in _TORCH_DTYPES:
        what = f"a tensor of {value.dtype}, {value.layout} on {value.device}"
        raise _rejected(path, what, "give a dense one")
    if value.requires_grad:
        raise _rejected(path, "a tensor that requires gradients", "give tensor.detach()")
    _require_small(value.nbytes, path)  # before it is copied
    flat = value.resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    return {
        TAG: "torch.Tensor",
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "data": _text_of(flat.view(torch.uint8).numpy().tobytes(), path),
    }


def _encode_array(value: np.ndarray[Any, Any] | np.generic, path: _Path) -> Any:
    is_array = isinstance(value, np.ndarray)
    dtype = _ARRAY_DTYPES.get(value.dtype.str)
    if dtype != value.dtype or not (is_array or type(value) is value.dtype.type is dtype.type):
        raise _rejected(
            path, f"of type {type(value).__name__} and {value.dtype}", "give plain numbers"
        )
    _require_small(value.nbytes, path)
    found = {TAG: "numpy.ndarray" if is_array else "numpy.generic", "dtype": value.dtype.str}
    if is_array:
        found["shape"] = list(value.shape)
    return {**found, "data": _text_of(value.tobytes(), path)}


def _require_small(nbytes: int, path: _Path) -> None:
    if nbytes > MAX_NBYTES:
        remedy = f"the limit is {MAX_NBYTES:,} bytes; make it a buffer of the model"
        raise _rejected(path, f"{nbytes:,} bytes long", remedy)


def _text_of(data: bytes | bytearray, path: _Path) -> str:
    _require_small(len(data), path)
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _bytes_of(data: str) -> bytearray:
    return bytearray(binascii.a2b_base64(data.encode("ascii"), strict_mode=True))


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: _decode(inner) for key, inner in value.items()}
    return _DECODERS[value[TAG]](**{key: inner for key, inner in value.items() if key != TAG})


def _decode_sequence(make: Callable[[list[Any]], Any], /, items: list[Any]) -> Any:
    return make([_decode(inner) for inner in items])


def _decode_mapping(
    kind: type[dict[Any, Any]], /, pairs: Sequence[tuple[Any, Any]], factory: str | None = None
) -> Any:
    found = kind()
    found.update({_decode(key): _decode(inner) for key, inner in pairs})
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    if factory is not None:
        found.default_factory = _FACTORIES[factory]  # type: ignore[attr-defined]
    return found


def _decode_float(value: str) -> float:
    return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value]


def _decode_complex(items: list[Any]) -> complex:
    real, imaginary = (_decode(inner) for inner in items)
    return complex(real, imaginary)


def _decode_file(data: str, at: int) -> io.BytesIO:
    file = io.BytesIO(_bytes_of(data))
    file.seek(at)
    return file


def _decode_tensor(dtype: str, shape: list[int], data: str) -> torch.Tensor:
    content, kind = _bytes_of(data), _TORCH_DTYPES[dtype]
    if math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes for the shape {shape}")
    if not content:
        return torch.empty(shape, dtype=kind, device="cpu")
    flat = torch.frombuffer(content, dtype=torch.uint8)
    # A bool must be 0 or 1 in memory.
    return (flat.to(kind) if kind is torch.bool else flat.view(kind)).view(shape)


def _decode_array(dtype: str, shape: list[int], data: str) -> np.ndarray[Any, Any]:
    kind = _ARRAY_DTYPES[dtype]
    if kind == np.bool_:
        return np.frombuffer(_bytes_of(data), np.uint8).astype(np.bool_).reshape(shape)
    return np.frombuffer(_bytes_of(data), kind).reshape(shape)


def _decode_scalar(dtype: str, data: str) -> Any:
    return _decode_array(dtype, [], data)[()]


_DECODERS: Mapping[str, Callable[..., Any]] = {
    **{tag: partial(_decode_sequence, make) for tag, make in _SEQUENCES.items()},
    **{tag: partial(_decode_mapping, kind) for tag, kind in _MAPPINGS.items()},
    "float": _decode_float,
    "complex": _decode_complex,
    "bytes": lambda data: bytes(_bytes_of(data)),
    "bytearray": _bytes_of,
    "BytesIO": _decode_file,
    "torch.dtype": lambda value: _TORCH_DTYPES[value],
    "torch.device": lambda value: torch.device(value),
    "torch.Tensor": _decode_tensor,
    "numpy.ndarray": _decode_array,
    "numpy.generic": _decode_scalar,
}
