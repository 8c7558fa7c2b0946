"""The format of a checkpoint: a folder with `manifest.json` and one safetensors file per rank.

    manifest.json                       everything except tensors, and where each tensor is
    rank-00000-of-00002.safetensors     rank 0's pieces of the tensors
    rank-00001-of-00002.safetensors     rank 1's

The manifest has checksums of the files and of its own text. `offload_adam.encoding` describes how
values that JSON lacks are written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from offload_adam.dtypes import DTYPES, MAX_DIMS
from offload_adam.encoding import decode
from offload_adam.errors import CheckpointError
from offload_adam.layout.budget import CHECKPOINT_BLOCK_NBYTES
from offload_adam.options import MAX_STEP_COUNT, StateFormat
from offload_adam.printable import show
from offload_adam.state.boxes import Box, find_fault, range_of_box

FORMAT_VERSION = 3
"""Version 2 does not encode values (see `offload_adam.encoding`), and has no `Manifest.values`.

A dtype that is added to `DTYPES` needs no new version: readers reject a name that they lack. Boxes
that are not contiguous in the tensor needed none either: older readers reject them.
"""
READABLE_VERSIONS = (2, FORMAT_VERSION)
MANIFEST_NAME = "manifest.json"
BLOCK_NBYTES = CHECKPOINT_BLOCK_NBYTES
"""Bytes of a file under one checksum: 4 MiB. Changing it makes saved checkpoints unreadable."""
LOAD_ANOTHER = "Load another checkpoint."
"""What to do about a damaged checkpoint, for error messages."""

MAX_MANIFEST_NBYTES = 256 * 1024 * 1024
"""Largest manifest. That of 10**12 parameters in fp32 has 40 MB, most of them checksums."""

_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
NumSteps = Annotated[int, Field(ge=0, le=2**53)]
StepCount = Annotated[FiniteFloat, Field(ge=0, le=MAX_STEP_COUNT, multiple_of=1)]


E = TypeVar("E", bound=BaseModel)
# torch, files and memory count elements and bytes in 64 bits.
Natural = Annotated[int, Field(ge=0, lt=2**63)]
# The first invalid item of a list is reported. A million of them would take gigabytes.
T = TypeVar("T")
FailFastList = Annotated[list[T], Field(fail_fast=True)]
Dims = Annotated[list[Natural], Field(max_length=MAX_DIMS)]


class _Entry(BaseModel):
    """Base of the manifest's entries. It rejects unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Piece(_Entry):
    """A box of a tensor. Its elements are contiguous in `file`, from byte `start`."""

    offsets: Dims
    sizes: Dims
    file: str
    start: Natural

    @property
    def box(self) -> Box:
        """The box, in the dimensions of the tensor in memory order."""
        return Box(tuple(self.offsets), tuple(self.sizes))


class TensorEntry(_Entry):
    """One tensor. The boxes of its pieces list the dimensions in memory order, outermost first.

    dtype: one of `DTYPES`.
    shape: the sizes of the logical dimensions.
    order: the logical dimension of each dimension in memory order.

    Example: a channels_last weight of logical shape (5, 3, 2, 2) has the order [0, 2, 3, 1] and the
    memory shape [5, 2, 2, 3].
    """

    dtype: str
    shape: Dims
    order: Dims
    pieces: FailFastList[Piece]

    @property
    def memory_shape(self) -> list[int]:
        """The sizes of the dimensions in memory order."""
        return [self.shape[dim] for dim in self.order]


class FileEntry(_Entry):
    """One file: its length in bytes, and the CRC-32 of each block of 4 MiB."""

    nbytes: Natural
    checksums: FailFastList[Natural]


class RankEntry(_Entry):
    """One rank's part of the manifest: its file, and the pieces of tensors in it."""

    name: str
    file: FileEntry
    tensors: dict[str, TensorEntry]


class GroupEntry(_Entry):
    """One parameter group: the names of its parameters, and its options, encoded."""

    parameters: FailFastList[str]
    options: dict[str, Any]


class OptimizerEntry(_Entry):
    """The state of an optimizer except tensors.

    steps: number of updates of each trained parameter, by its name.
    further: state of the optimizer's subclass, encoded.
    formats: format of each parameter's state, by its name. Parameters with fp32 state are omitted.
    scales: of second moments in codes, by the parameter's name; see `memory.codes`.
    """

    groups: list[GroupEntry]
    steps: dict[str, StepCount]
    further: dict[str, Any]
    formats: dict[str, StateFormat] = {}
    scales: dict[str, float] = {}

    def format_of(self, name: str) -> StateFormat:
        """Return the format in which the state of a parameter was saved."""
        return self.formats.get(name, "fp32")

    @model_serializer(mode="wrap")
    def _serialized(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the entry; earlier versions reject `formats` and `scales`, so omit empty ones."""
        values: dict[str, Any] = serialize(self)
        for key in ("formats", "scales"):
            if not values.get(key):
                values.pop(key, None)
        return values


class PlainState(_Entry):
    """The state of an optimizer except tensors, as `torch.distributed.checkpoint` saves it."""

    format_version: Natural = 2  # which version 2 did not name
    num_steps: NumSteps
    optimizer: OptimizerEntry


class Manifest(_Entry):
    """Everything in a checkpoint except the bytes of the tensors.

    tied: other names of tied tensors, each with the name under which the tensor is saved.
    values: entries of the model's state dict that are not tensors, encoded.
    extra: the argument of `save_checkpoint`, encoded.
    """

    format_version: Natural
    step: NumSteps
    world_size: Natural
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    optimizer: OptimizerEntry
    tied: dict[str, str]
    values: dict[str, Any] = {}
    extra: dict[str, Any]

    def decoded_values(self) -> dict[str, Any]:
        """Return the entries of the model's state dict that are not tensors.

        Raises:
            CheckpointError: an entry cannot be decoded.
        """
        return {name: decode(value, name) for name, value in self.values.items()}

    def decoded_extra(self) -> dict[str, Any]:
        """Return the `extra` that was given to `save_checkpoint`.

        Raises:
            CheckpointError: `extra` cannot be decoded.
        """
        if self.format_version == 2:
            return self.extra  # saved as plain JSON, without encoding
        found = decode(self.extra, "extra")
        if not isinstance(found, dict):
            raise CheckpointError(
                f"extra must be a dict, not a {type(found).__name__}. {LOAD_ANOTHER}"
            )
        return found


def sealed(values: dict[str, Any]) -> str:
    """Return values as JSON with their SHA-256, as in `manifest.json`.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps({"sha256": _digest(values), **values}, allow_nan=False)


def _digest(values: dict[str, Any]) -> str:
    # Sorted and without spaces: the digest depends neither on the order of keys nor on the layout.
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    No file name may lead out of the folder, and the pieces of a tensor must lie inside their files
    and cover each element exactly once. The files themselves are not opened.

    Raises:
        CheckpointError: the manifest is missing, damaged, invalid or of an unknown version. The
            message names the invalid entry.
    """
    path = folder / MANIFEST_NAME
    try:
        if not path.exists():
            raise CheckpointError(_describe_missing(folder))
        # As the files of ranks: a link could lead out of the folder, and reading a pipe could hang.
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is not a regular file. {LOAD_ANOTHER}")
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_NBYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Check its permissions and the disk."
        ) from error
    return parse_manifest(text, str(path))


def _describe_missing(folder: Path) -> str:
    """Return what is wrong with a folder without a manifest, and what to pass instead."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        return f"{folder} {problem}. Pass the folder of a checkpoint."
    problem = f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}."
    below = [*folder.glob(f"*/{MANIFEST_NAME}"), *folder.glob(f"*/*/{MANIFEST_NAME}")]
    if below:
        newest = max(below, key=lambda path: path.stat().st_mtime).parent
        return f"{problem} The newest checkpoint below it is {newest}."
    return f"{problem} Pass a folder that save_checkpoint wrote."


def parse_manifest(text: str | bytes, origin: str) -> Manifest:
    """Parse and check the text of a manifest.

    Args:
        origin: the path of the manifest, for error messages.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    if len(text) > MAX_MANIFEST_NBYTES:
        raise CheckpointError(
            f"{origin} has more than {MAX_MANIFEST_NBYTES:,} bytes, the limit of a manifest. Move "
            "large values out of extra and of the model's extra state, or load another checkpoint."
        )
    manifest = validated(Manifest, _unsealed(text, origin), origin)
    # Decode once now: load_checkpoint must not find invalid values after it has modified the state.
    try:
        manifest.decoded_values()
        manifest.decoded_extra()
        decoded_optimizer(manifest.optimizer.model_dump(), manifest.format_version)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    _check_files(manifest, origin)
    used = dict.fromkeys(manifest.files, 0)
    for name, entry in manifest.tensors.items():
        try:
            _check_tensor(manifest, entry)
            for piece in entry.pieces:
                used[piece.file] += piece.box.numel * DTYPES[entry.dtype].itemsize
                if used[piece.file] > manifest.files[piece.file].nbytes:
                    raise ValueError(f"it shares bytes of {piece.file} with other tensors")
        except ValueError as error:
            raise CheckpointError(
                f"{origin}: tensor {name!r}: {str(error).rstrip('.')}. {LOAD_ANOTHER}"
            ) from error
    for alias, name in manifest.tied.items():
        listed = f"{origin}: {alias!r} is listed as another name of {name!r}"
        if name not in manifest.tensors:
            raise CheckpointError(f"{listed}, which is not a saved tensor. {LOAD_ANOTHER}")
        if alias in manifest.tensors:
            raise CheckpointError(f"{listed}, but is itself a saved tensor. {LOAD_ANOTHER}")
    return manifest


def validated(kind: type[E], values: Any, origin: str) -> E:
    """Return an entry with a field `format_version`, from its values in a file.

    Raises:
        CheckpointError: the version is unknown, or a field is missing, unknown or invalid.
    """
    # The version comes before the fields, which differ between versions.
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version not in READABLE_VERSIONS:
        other = " or a newer one" if version > FORMAT_VERSION else ""
        raise CheckpointError(
            f"{origin} has format version {show(version)}, but this version of offload_adam reads "
            f"only {' and '.join(map(str, READABLE_VERSIONS))}. Use the version that wrote it"
            f"{other}."
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{origin}: {where or 'its content'}: {first['msg']}. {LOAD_ANOTHER}"
        ) from error


def _unsealed(text: str | bytes, origin: str) -> Any:
    """Return the values of a sealed text, without their digest. They may still be of any type."""
    try:
        values = json.loads(text, object_pairs_hook=without_repetition)
        # Compare before any field is checked: a message about a damaged field would mislead.
        if isinstance(values, dict):
            digest = values.pop("sha256", None)
            if digest != _digest(values):
                raise CheckpointError(f"{origin} is damaged: its checksum is wrong. {LOAD_ANOTHER}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {error}. {LOAD_ANOTHER}") from error
    return values


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; reject duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _check_files(manifest: Manifest, origin: str) -> None:
    """Check the names of the files, and that each file has one checksum per block."""
    for name, entry in manifest.files.items():
        # A name such as ../x would lead out of the folder.
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise CheckpointError(
                f"{origin}: {name!r} is not a plain file name that a rank could have written. "
                f"{LOAD_ANOTHER}"
            )
        needed = -(-entry.nbytes // BLOCK_NBYTES)
        if len(entry.checksums) != needed:
            raise CheckpointError(
                f"{origin}: {name} has {entry.nbytes:,} bytes and needs {needed} checksum(s), one "
                f"for each 4 MiB, but has {len(entry.checksums)}. {LOAD_ANOTHER}"
            )


def _check_tensor(manifest: Manifest, entry: TensorEntry) -> None:
    """Check that the pieces of a tensor lie inside their files and cover each element once.

    Raises:
        ValueError: the message is a fragment, to which the caller adds the tensor's name.
    """
    if entry.dtype not in DTYPES:
        raise ValueError(
            f"unknown dtype {entry.dtype!r}: use the versions of offload_adam and torch that wrote "
            "it"
        )
    if sorted(entry.order) != list(range(len(entry.shape))):
        raise ValueError(
            f"order {entry.order} is not a permutation of {len(entry.shape)} dimensions"
        )
    shape = entry.memory_shape
    # torch also computes the strides of tensors without elements, and these must not overflow.
    if math.prod(max(size, 1) for size in shape) * DTYPES[entry.dtype].itemsize >= 2**63:
        raise ValueError(f"no memory can hold a tensor of {shape}")
    for piece in entry.pieces:
        file = manifest.files.get(piece.file)
        if file is None:
            raise ValueError(f"{piece.file!r} is not a file of the checkpoint")
        range_of_box(shape, piece.box)
        end_byte = piece.start + piece.box.numel * DTYPES[entry.dtype].itemsize
        if end_byte > file.nbytes:
            raise ValueError(
                f"a piece exceeds the end of {piece.file}: it ends at byte {end_byte:,} of "
                f"{file.nbytes:,}"
            )
    numel = math.prod(shape)
    pieces = flat_pieces(entry)
    if pieces is None:
        boxes = [piece.box for piece in entry.pieces if piece.box.numel > 0]
        fault = find_fault(shape, boxes)
        if fault is not None:
            element, count = fault
            problem = "is missing" if count == 0 else f"is in {count} pieces"
            raise ValueError(f"element {list(element)} in memory order {problem}")
        return
    # In ascending order, each range must begin where the one before it ends.
    ranges = [(start, end) for start, end, _ in pieces]
    for (_, end), (start, _) in pairwise([(0, 0), *ranges, (numel, numel)]):
        if start > end:
            raise ValueError(f"elements {end} to {start - 1} are missing")
        if start < end:
            raise ValueError(f"element {start} is in two pieces")


def flat_pieces(entry: TensorEntry) -> list[tuple[int, int, Piece]] | None:
    """Return (start, end, piece) of each non-empty piece in ascending order.

    The piece holds elements [start, end) of the tensor, counted in memory order.

    Returns:
        None if the elements of a piece are not contiguous in the tensor.
    """
    found = []
    shape = entry.memory_shape
    for piece in entry.pieces:
        bounds = range_of_box(shape, piece.box)
        if bounds is None:
            return None
        if bounds[0] < bounds[1]:
            found.append((*bounds, piece))
    return sorted(found, key=lambda item: item[:2])


def decoded_optimizer(saved: Mapping[str, Any], format_version: int) -> Any:
    """Decode the saved result of `optimizer_access.plain_state`.

    Args:
        saved: `Manifest.optimizer` as a dict.
        format_version: of the checkpoint in which `saved` is.

    Raises:
        CheckpointError: `saved` cannot be decoded.
    """
    if format_version > 2:
        found = decode(saved, "the saved optimizer")
        for options in (found["further"], *(group["options"] for group in found["groups"])):
            if type(options) is not dict:
                raise CheckpointError(
                    f"The saved options of the optimizer must be dicts, not {show(options)}. "
                    f"{LOAD_ANOTHER}"
                )
        return found
    # Version 2 did not encode values, so `betas`, the only tuple, was saved as a list.
    groups = []
    for group in saved["groups"]:
        options = dict(group["options"])
        if isinstance(options.get("betas"), list):
            options["betas"] = tuple(options["betas"])
        groups.append({**group, "options": options})
    return {**saved, "groups": groups}
