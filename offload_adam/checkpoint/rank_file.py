"""The file of one rank: its parts as they lie, and what the manifest has to say of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from offload_adam.checkpoint.content import Part
from offload_adam.checkpoint.files import Blob, FileWriter
from offload_adam.checkpoint.manifest import FileEntry, Piece, TensorEntry


class RankEntry(BaseModel):
    """What one rank has written: its part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    file: FileEntry
    tensors: dict[str, TensorEntry]


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


class RankFile:
    """Writes the parts of one rank into its file, `path`.

    Owns: the file, until `finish` or `close`.
    Lifecycle: `write` for all parts in the order of the constructor's, in as many calls as suit,
    from any one thread at a time; then `finish`.
    """

    def __init__(self, folder: Path, name: str, parts: Sequence[Part]) -> None:
        self.path = folder / name
        self._blobs: dict[str, list[Blob]] = {}
        self._tensors: dict[str, TensorEntry] = {}
        pieces: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
        for part in parts:
            cut = list(part.blobs())
            self._blobs[part.name] = [blob for blob, _ in cut]
            pieces[part.name] = [(blob.name, offsets, blob.sizes) for blob, offsets in cut]
        self._file = FileWriter(self.path, [b for blobs in self._blobs.values() for b in blobs])
        for part in parts:
            self._tensors[part.name] = TensorEntry(
                dtype=part.dtype_name,
                shape=list(part.shape),
                order=list(part.order),
                pieces=[
                    Piece(
                        offsets=list(offsets),
                        sizes=list(sizes),
                        file=name,
                        start=self._file.starts[label],
                    )
                    for label, offsets, sizes in pieces[part.name]
                ],
            )

    def write(self, parts: Iterable[Part]) -> None:
        """Write the next parts."""
        for part in parts:
            for blob in self._blobs[part.name]:
                self._file.write(blob)

    def finish(self) -> RankEntry:
        """Flush the file to the disk, and return this rank's part of the manifest."""
        return RankEntry(name=self.path.name, file=self._file.finish(), tensors=self._tensors)

    def close(self) -> None:
        """Close the file, whole or not. Idempotent."""
        self._file.close()
