"""Writes a rank's file of a checkpoint: safetensors with checksums.

RankFile      the parts of one rank; each becomes one or more blobs
FileWriter    one safetensors file, blob after blob
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path

import torch

from offload_adam.checkpoint.format import (
    BLOCK_NBYTES,
    DTYPE_NAMES,
    DTYPES,
    FileEntry,
    Piece,
    RankEntry,
    TensorEntry,
)
from offload_adam.state.state_shard import boxes_of_range


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous range of a named tensor, in the order of its elements in memory.

    Boxes have the tensor's dimensions in memory order, the outermost first. Another safetensors
    reader therefore finds a channels_last weight with its channels in the last dimension.

    shape, order: of the whole tensor, see `format.TensorEntry`.
    data: 1-d, on any device; elements [start, end) in memory order.
    bucket: the bucket whose update modifies `data`; None if no update does.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    start: int
    end: int
    data: torch.Tensor
    bucket: int | None = None

    @property
    def dtype_name(self) -> str:
        """The name of the dtype in safetensors."""
        return DTYPE_NAMES[self.data.dtype]

    def blobs(self) -> Iterator[tuple[Blob, tuple[int, ...]]]:
        """Divide the range into boxes; yield each one as a blob with its offsets in the tensor."""
        # safetensors has only rectangular tensors, so a flat range becomes a few boxes.
        memory_shape = [self.shape[dim] for dim in self.order]
        done = 0
        for box in boxes_of_range(memory_shape, self.start, self.end):
            numel = prod(box.sizes)
            data = host_bytes(self.data[done : done + numel])
            label = ",".join(map(str, box.offsets))
            yield Blob(f"{self.name}@{label}", self.dtype_name, box.sizes, data), box.offsets
            done += numel


class RankFile:
    """Writes the parts of one rank into its file, `path`.

    Owns: the open file, until `finish` or `close`.
    Lifecycle: `write` in any number of calls, for all parts in the order given to the constructor;
    then `finish`.
    Threads: any thread, one at a time.
    """

    def __init__(self, folder: Path, name: str, parts: Sequence[Part]) -> None:
        self.path = folder / name
        cut = {part.name: list(part.blobs()) for part in parts}
        self._blobs = {label: [blob for blob, _ in boxes] for label, boxes in cut.items()}
        self._file = FileWriter(self.path, [b for blobs in self._blobs.values() for b in blobs])
        self._tensors = {
            part.name: TensorEntry(
                dtype=part.dtype_name,
                shape=list(part.shape),
                order=list(part.order),
                pieces=[
                    Piece(
                        offsets=list(offsets),
                        sizes=list(blob.sizes),
                        file=name,
                        start=self._file.starts[blob.name],
                    )
                    for blob, offsets in cut[part.name]
                ],
            )
            for part in parts
        }

    def write(self, parts: Iterable[Part]) -> None:
        """Write the next parts."""
        for part in parts:
            for blob in self._blobs[part.name]:
                self._file.write(blob)

    def finish(self) -> RankEntry:
        """Flush the file to the disk, and return this rank's part of the manifest."""
        return RankEntry(name=self.path.name, file=self._file.finish(), tensors=self._tensors)

    def close(self) -> None:
        """Close the file, complete or not. Idempotent."""
        self._file.close()


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file, such as `rank-00000-of-00002.safetensors`."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Blob:
    """One entry of a safetensors file.

    dtype: its name in safetensors.
    data: views with `nbytes` bytes in total; iterated once, when the blob is written.
    """

    name: str
    dtype: str
    sizes: tuple[int, ...]
    data: Iterable[memoryview]

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return DTYPES[self.dtype].itemsize * prod(self.sizes)


class FileWriter:
    """Writes a safetensors file, blob after blob, without copying the data.

        8 bytes   length of the header
        header    JSON: dtype, shape and offsets of each blob; padded to a multiple of 8 bytes
        data      the blobs

    starts: offset in bytes of each blob in the file, by name; set by the constructor.

    Owns: the open file, until `finish` or `close`.
    Lifecycle: `write` for every blob in the order given to the constructor, then `finish`.
    Source: Hugging Face, the safetensors format.
    """

    def __init__(self, path: Path, blobs: Sequence[Blob]) -> None:
        header: dict[str, object] = {}
        offset = 0
        for blob in blobs:
            end = offset + blob.nbytes
            header[blob.name] = {
                "dtype": blob.dtype,
                "shape": list(blob.sizes),
                "data_offsets": [offset, end],
            }
            offset = end
        # The header comes before the data, so all sizes must be known before the first write.
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        self.starts: dict[str, int] = {}
        position = 8 + len(text)
        for blob in blobs:
            self.starts[blob.name] = position
            position += blob.nbytes
        self._path = path
        self._expected_nbytes = position
        # Unbuffered: blocks are large, and an error is raised by the write that fails.
        self._raw = path.open("xb", buffering=0)
        self._file = _SummedFile(self._raw)
        try:
            self._file.write(memoryview(len(text).to_bytes(8, "little")))
            self._file.write(memoryview(text))
        except BaseException:
            self.close()
            raise

    def write(self, blob: Blob) -> None:
        """Write the next blob."""
        assert self._file.nbytes == self.starts[blob.name], (
            "blobs are written in the order of the header"
        )
        for view in blob.data:
            if view.nbytes:  # a view with a zero in its shape cannot be cast
                self._file.write(view.cast("B"))

    def finish(self) -> FileEntry:
        """Flush the file to the disk, close it and return its entry in the manifest."""
        self._file.finish_block()
        assert self._file.nbytes == self._expected_nbytes, "every blob has been written"
        os.fsync(self._raw.fileno())  # the rename that commits must not reach the disk first
        # A broken file system may report success although it has lost data.
        if os.fstat(self._raw.fileno()).st_size != self._file.nbytes:
            message = "the file has another length than was written"
            raise OSError(errno.EIO, message, str(self._path))
        self.close()
        return FileEntry(nbytes=self._file.nbytes, checksums=self._file.checksums)

    def close(self) -> None:
        """Close the file, complete or not. Idempotent."""
        self._raw.close()


class _SummedFile:
    """Writes to a file and computes the CRC-32 of each block of 4 MiB."""

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._checksum = 0
        self._filled = 0
        self.checksums: list[int] = []
        self.nbytes = 0

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), BLOCK_NBYTES):
            self._write_some(data[start : start + BLOCK_NBYTES])

    def _write_some(self, data: memoryview) -> None:
        while data:
            # A write may write only a part, for example just before the disk is full.
            part = data[: BLOCK_NBYTES - self._filled]
            part = part[: self._file.write(part)]
            self._checksum = zlib.crc32(part, self._checksum)
            self._filled += len(part)
            self.nbytes += len(part)
            data = data[len(part) :]
            if self._filled == BLOCK_NBYTES:
                self.finish_block()

    def finish_block(self) -> None:
        if self._filled:
            self.checksums.append(self._checksum)
            self._checksum = self._filled = 0


def host_bytes(data: torch.Tensor) -> Iterator[memoryview]:
    """Yield all bytes of a 1-d tensor, in order. Each view is valid until the next one.

    The view of a host tensor is its memory. A device tensor is copied, one block at a time.
    """
    if data.device.type == "cpu":
        yield as_bytes(data)
        return
    for piece in data.split(BLOCK_NBYTES // data.element_size()):
        yield as_bytes(piece.cpu())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a 1-d host tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.detach().view(torch.uint8).numpy().data
    return view
