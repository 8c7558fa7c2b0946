"""`manifest.json`: what a checkpoint holds, where, and how to know that it is whole."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from offload_adam.errors import CheckpointError
from offload_adam.layout.boxes import Box, range_of_box

FORMAT_VERSION = 3
"""2 has no tags of `encoding` in it, and no `values`."""
READABLE_VERSIONS = (2, FORMAT_VERSION)
MANIFEST_NAME = "manifest.json"
BLOCK_NBYTES = 4 * 1024 * 1024
"""Bytes of a file that have one checksum: so a part can be verified without reading the rest."""

ITEMSIZES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""safetensors' names of the dtypes that a checkpoint may hold."""

_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
Count = Annotated[int, Field(ge=0)]
StepCount = Annotated[FiniteFloat, Field(ge=0, le=2**24)]
"""torch counts in float32, which goes no further than this."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Piece(_Part):
    """One contiguous box of a tensor: its elements start at byte `start` of a file."""

    offsets: list[Count]
    sizes: list[Count]
    file: str
    start: Count


class TensorEntry(_Part):
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


class FileEntry(_Part):
    """One file: its length, and the CRC-32 of each 4 MiB of it."""

    nbytes: Count
    checksums: list[Count]


class GroupEntry(_Part):
    """One group of the optimizer: the names of its parameters, and its options."""

    parameters: list[str]
    options: dict[str, Any]


class OptimizerEntry(_Part):
    """What of an optimizer is no tensor.

    steps: completed updates by the name of each trained parameter.
    further: what the kind of optimizer adds.
    """

    groups: list[GroupEntry]
    steps: dict[str, StepCount]
    further: dict[str, Any]


class Manifest(_Part):
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
        return {name: _decode(value, name) for name, value in self.values.items()}

    def decoded_extra(self) -> dict[str, Any]:
        """Return what the caller of `save_checkpoint` gave.

        Raises:
            CheckpointError: it cannot be decoded.
        """
        if self.format_version == 2:
            return self.extra
        found = _decode(self.extra, "extra")
        if not isinstance(found, dict):
            raise CheckpointError(f"extra is a {type(found).__name__}, and must be a dict")
        return found

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return sealed(self.model_dump())


def _decode(value: Any, path: str) -> Any:
    # Imports torch, which takes seconds: `plan` reads this module's constants without it.
    from offload_adam.checkpoint.encoding import decode

    return decode(value, path)


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
        CheckpointError: saying what is wrong with which entry.
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
    """Return a JSON object, refusing a key that stands twice."""
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
    """Refuse a tensor whose pieces do not cover it once, or lie outside of their files."""
    if entry.dtype not in ITEMSIZES:
        raise ValueError(f"unknown dtype {entry.dtype!r}")
    if sorted(entry.order) != list(range(len(entry.shape))):
        raise ValueError(f"{entry.order} is no order of {len(entry.shape)} dimensions")
    shape = entry.memory_shape
    ranges = []
    for piece in entry.pieces:
        file = manifest.files.get(piece.file)
        if file is None:
            raise ValueError(f"{piece.file!r} is none of the checkpoint's files")
        box = Box(tuple(piece.offsets), tuple(piece.sizes))
        start, end = range_of_box(shape, box)
        if piece.start + (end - start) * ITEMSIZES[entry.dtype] > file.nbytes:
            raise ValueError(f"a piece ends behind the end of {piece.file}")
        if end > start:
            ranges.append((start, end))
    ranges.sort()
    ends = [0, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), prod(shape)]
    for end, start in zip(ends, starts, strict=True):
        if start > end:
            raise ValueError(f"elements {end} to {start - 1} are missing")
        if start < end:
            raise ValueError(f"element {start} stands twice")


def sorted_pieces(entry: TensorEntry) -> list[tuple[int, int, Piece]]:
    """Return the flat range [start, end) of every piece that has elements, ascending."""
    shape = entry.memory_shape
    found = []
    for piece in entry.pieces:
        start, end = range_of_box(shape, Box(tuple(piece.offsets), tuple(piece.sizes)))
        if end > start:
            found.append((start, end, piece))
    found.sort(key=lambda item: item[:2])
    assert all(one[1] == other[0] for one, other in pairwise(found))
    return found
