"""The format of a checkpoint: a folder with `manifest.json` and one safetensors file per rank.

    manifest.json                       everything except tensors, and where each tensor is
    rank-00000-of-00002.safetensors     rank 0's pieces of the tensors
    rank-00001-of-00002.safetensors     rank 1's

The manifest has checksums of the files and of itself. Values that JSON lacks are encoded, see
encoding.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from offload_adam.checkpoint.encoding import decode
from offload_adam.errors import CheckpointError
from offload_adam.layout.budget import CHECKPOINT_BLOCK_NBYTES
from offload_adam.state.state_shard import Box, range_of_box

FORMAT_VERSION = 3
"""Version 2 does not encode values (see encoding.py), and has no `Manifest.values`."""
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
"""The dtypes of a checkpoint's tensors, by their names in safetensors."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
Count = Annotated[int, Field(ge=0)]
StepCount = Annotated[FiniteFloat, Field(ge=0, le=2**24)]
"""Step counts are float32, as in torch: larger integers are not exact."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Piece(_Entry):
    """A box of a tensor. Its elements are contiguous in `file`, from byte `start`."""

    offsets: list[Count]
    sizes: list[Count]
    file: str
    start: Count

    @property
    def box(self) -> Box:
        """The box, in the dimensions of the tensor in memory order."""
        return Box(tuple(self.offsets), tuple(self.sizes))


class TensorEntry(_Entry):
    """One tensor. Its boxes have its dimensions in memory order, the outermost first.

    shape: logical.
    order: the logical dimension of each dimension in memory order.

    Example: a channels_last weight of logical shape (5, 3, 2, 2) has the order [0, 2, 3, 1] and the
    memory shape [5, 2, 2, 3].
    """

    dtype: str
    shape: list[Count]
    order: list[Count]
    pieces: list[Piece]

    @property
    def memory_shape(self) -> list[int]:
        """The sizes of the dimensions in memory order."""
        return [self.shape[dim] for dim in self.order]


class FileEntry(_Entry):
    """One file: its length in bytes, and the CRC-32 of each block of 4 MiB."""

    nbytes: Count
    checksums: list[Count]


class RankEntry(_Entry):
    """One rank's part of the manifest: its file, and the pieces of tensors in it."""

    name: str
    file: FileEntry
    tensors: dict[str, TensorEntry]


class GroupEntry(_Entry):
    """One parameter group: the names of its parameters, and its options, encoded."""

    parameters: list[str]
    options: dict[str, Any]


class OptimizerEntry(_Entry):
    """The state of an optimizer except tensors.

    steps: number of updates of each trained parameter, by its name.
    further: state of the optimizer's subclass, encoded.
    """

    groups: list[GroupEntry]
    steps: dict[str, StepCount]
    further: dict[str, Any]


class Manifest(_Entry):
    """Everything in a checkpoint except the bytes of the tensors.

    tied: other names of tied tensors, each with the name under which the tensor is saved.
    values: entries of the model's state dict that are not tensors, encoded.
    extra: the argument of `save_checkpoint`, encoded.
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
        """Return the entries of the model's state dict that are not tensors."""
        return {name: decode(value, name) for name, value in self.values.items()}

    def decoded_extra(self) -> dict[str, Any]:
        """Return the `extra` that was given to `save_checkpoint`.

        Raises:
            CheckpointError: it cannot be decoded.
        """
        if self.format_version == 2:
            return self.extra
        found = decode(self.extra, "extra")
        if not isinstance(found, dict):
            raise CheckpointError(f"extra must be a dict, not a {type(found).__name__}.")
        return found

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return sealed(self.model_dump())


def sealed(values: dict[str, Any]) -> str:
    """Return a mapping as JSON with its own SHA-256, which detects any damage to the text.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps({"sha256": _digest(values), **values}, allow_nan=False)


def _digest(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    All files are in the folder, and the pieces of a tensor cover each element exactly once.

    Raises:
        CheckpointError: naming the invalid entry and the problem.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file.")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: str | bytes, origin: str) -> Manifest:
    """Parse and check the text of a manifest.

    Args:
        origin: the path, for error messages.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    # The digest first: a message about a field of a damaged manifest would mislead.
    try:
        values = json.loads(text, object_pairs_hook=_without_repetition)
        if isinstance(values, dict):
            digest = values.pop("sha256", None)
            if digest != _digest(values):
                raise CheckpointError(
                    f"{origin} is damaged: its checksum is wrong. Load another checkpoint."
                )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not JSON: {error}. Load another checkpoint.") from error
    # Then the version: the fields of another one may differ.
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version not in READABLE_VERSIONS:
        other = " or a newer one" if version > FORMAT_VERSION else ""
        raise CheckpointError(
            f"{origin} has format version {version}, but this version of offload_adam reads only "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. Use the version that wrote it{other}."
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{origin}: {where or 'the manifest'}: {first['msg']}.") from error
    # Decode once now: load_checkpoint must not find invalid values after it has modified the state.
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
            raise CheckpointError(
                f"{origin}: tensor {name!r}: {str(error).rstrip('.')}."
            ) from error
    for alias, name in manifest.tied.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CheckpointError(f"{origin}: {alias!r} cannot be another name of {name!r}.")
    return manifest


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; reject duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _check_files(manifest: Manifest, origin: str) -> None:
    for name, entry in manifest.files.items():
        # A name such as ../x would lead out of the folder.
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise CheckpointError(f"{origin}: {name!r} is not a plain file name.")
        if len(entry.checksums) != -(-entry.nbytes // BLOCK_NBYTES):
            raise CheckpointError(f"{origin}: {name} does not have one checksum for each 4 MiB.")


def _check_tensor(manifest: Manifest, entry: TensorEntry) -> None:
    """Check that the pieces of a tensor cover it exactly once and lie inside their files."""
    if entry.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {entry.dtype!r}")
    if sorted(entry.order) != list(range(len(entry.shape))):
        raise ValueError(f"{entry.order} is not an order of {len(entry.shape)} dimensions")
    for piece in entry.pieces:
        file = manifest.files.get(piece.file)
        if file is None:
            raise ValueError(f"{piece.file!r} is not a file of the checkpoint")
        start, end = range_of_box(entry.memory_shape, piece.box)
        if piece.start + (end - start) * DTYPES[entry.dtype].itemsize > file.nbytes:
            raise ValueError(f"a piece exceeds the end of {piece.file}")
    # In ascending order, each range must begin where the one before it ends.
    ranges = [(start, end) for start, end, _ in sorted_pieces(entry)]
    numel = math.prod(entry.shape)
    for (_, end), (start, _) in pairwise([(0, 0), *ranges, (numel, numel)]):
        if start > end:
            raise ValueError(f"elements {end} to {start - 1} are missing")
        if start < end:
            raise ValueError(f"element {start} is in two pieces")


def sorted_pieces(entry: TensorEntry) -> list[tuple[int, int, Piece]]:
    """Return the flat range [start, end) of each non-empty piece, in ascending order."""
    found = [(*range_of_box(entry.memory_shape, piece.box), piece) for piece in entry.pieces]
    return sorted((item for item in found if item[1] > item[0]), key=lambda item: item[:2])


def decoded_optimizer(saved: Mapping[str, Any], format_version: int) -> Any:
    """Return what `plain_state` returned when the checkpoint was saved.

    Args:
        saved: `Manifest.optimizer` as a dict.

    Raises:
        CheckpointError: it cannot be decoded.
    """
    if format_version > 2:
        return decode(saved, "the saved optimizer")
    # Version 2 did not encode values, so `betas`, the only tuple, was saved as a list.
    groups = [
        {**group, "options": {**group["options"], "betas": tuple(group["options"]["betas"])}}
        for group in saved["groups"]
    ]
    return {**saved, "groups": groups}
