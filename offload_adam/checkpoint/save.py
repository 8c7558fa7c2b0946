"""Write a checkpoint: every rank its own shards, committed by one rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from offload_adam.checkpoint.content import Part, sharded_parts, to_plain, whole_part, whole_tensors
from offload_adam.checkpoint.files import Blob, flush_folder, write_file
from offload_adam.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    parse_manifest,
)
from offload_adam.coordinator.admission import gather_texts, together
from offload_adam.coordinator.membership import Membership
from offload_adam.errors import CheckpointError
from offload_adam.observe.place import HERE
from offload_adam.sharded_optimizer import ShardedOptimizer

PARTIAL_SUFFIX = ".partial"
_TOKEN_NAME = "token"


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write model and optimizer into a new folder that every rank sees. Collective.

    Each rank writes the ranges that it owns, straight from where they lie; a device's in copies of
    one range. All of it goes to `<path>.partial`, and one rename makes it a checkpoint when every
    rank's bytes are on the disk: a crash at any moment leaves earlier checkpoints as they are.

    Args:
        extra: anything that JSON can hold, for `load_checkpoint` to return.

    Raises:
        CheckpointError: the path exists, the folder is not shared by all ranks, or something of
            `extra` cannot be written. On every rank.
        OSError: on the rank where writing failed, a PeerError on the others.
    """
    target = Path(path)
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    membership = optimizer.membership
    with HERE.at("checkpoint", patient=True):
        state = together(
            membership,
            "preparing a checkpoint",
            lambda: to_plain({"optimizer": optimizer.plain_state(), "extra": extra or {}}),
        )
        _open_folder(target, partial, membership)
        written = together(
            membership, "writing a checkpoint", lambda: _write(partial, model, optimizer)
        )
        texts = gather_texts(membership, json.dumps(written))

        def commit() -> None:
            if membership.rank == 0:
                step = optimizer.num_steps
                _commit(target, partial, [json.loads(text) for text in texts], state, step)

        together(membership, "committing a checkpoint", commit)


def _open_folder(target: Path, partial: Path, membership: Membership) -> None:
    """Make the folder on rank 0, and see on every rank that it is the same one."""
    token = uuid.uuid4().hex

    def make() -> None:
        if target.exists():
            raise CheckpointError(f"{target} exists: a checkpoint is never written over")
        if membership.rank == 0:
            # What an interrupted save has left is of no use to anybody.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / _TOKEN_NAME).write_text(token, encoding="ascii")

    together(membership, "opening a checkpoint", make)
    expected = gather_texts(membership, token)[0]

    def look() -> None:
        path = partial / _TOKEN_NAME
        if not path.is_file() or path.read_text(encoding="ascii") != expected:
            raise CheckpointError(
                f"{partial.parent} is not shared: this rank does not see what rank 0 has written"
            )

    together(membership, "looking for rank 0's folder", look)
    if membership.rank == 0:
        (partial / _TOKEN_NAME).unlink(missing_ok=True)


def _write(partial: Path, model: nn.Module, optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Write this rank's file, and return what the manifest has to say of it."""
    membership = optimizer.membership
    parts: list[Part] = []
    if membership.rank == 0 or optimizer.is_sharded:
        parts += [part for part in sharded_parts(model, optimizer) if part.end > part.start]
    if membership.rank == 0:
        whole = whole_tensors(model, optimizer)
        parts += [whole_part(name, tensor) for name, tensor in whole.items()]
        known = {part.name for part in parts}
        empty = (part for part in sharded_parts(model, optimizer) if part.name not in known)
        parts += empty
    name = f"rank-{membership.rank:05d}-of-{membership.world_size:05d}.safetensors"
    blobs: list[Blob] = []
    tensors: dict[str, Any] = {}
    for part in parts:
        entry = tensors.setdefault(
            part.name,
            {
                "dtype": part.dtype_name,
                "shape": list(part.shape),
                "order": list(part.order),
                "pieces": [],
            },
        )
        for blob, offsets in part.blobs():
            blobs.append(blob)
            entry["pieces"].append([blob.name, list(offsets), list(blob.sizes)])
    file, starts = write_file(partial / name, blobs)
    for entry in tensors.values():
        entry["pieces"] = [
            Piece(offsets=offsets, sizes=sizes, file=name, start=starts[label]).model_dump()
            for label, offsets, sizes in entry["pieces"]
        ]
    return {"file": name, "entry": file.model_dump(), "tensors": tensors}


def _commit(
    target: Path, partial: Path, written: list[dict[str, Any]], state: dict[str, Any], step: int
) -> None:
    """Put the ranks' parts together, check that nothing is missing, and rename."""
    tensors: dict[str, TensorEntry] = {}
    for rank in written:
        for name, values in rank["tensors"].items():
            entry = TensorEntry.model_validate(values)
            before = tensors.get(name)
            if before is not None:
                entry = before.model_copy(update={"pieces": [*before.pieces, *entry.pieces]})
            tensors[name] = entry
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        step=step,
        world_size=len(written),
        tensors=tensors,
        files={rank["file"]: FileEntry.model_validate(rank["entry"]) for rank in written},
        state=state,
    )
    text = manifest.to_json()
    parse_manifest(text, str(target))
    with (partial / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    partial.rename(target)
    flush_folder(target.parent)
