"""Writes one rank's file of a checkpoint, in the safetensors format, and computes its checksums."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch

from offload_adam.checkpoint.format import (
    BLOCK_NBYTES,
    FileEntry,
    Piece,
    RankEntry,
    TensorEntry,
)
from offload_adam.dtypes import DTYPE_NAMES, safetensors_entry
from offload_adam.memory.codes import CodedMoment, Plane
from offload_adam.state.boxes import Box


@dataclass(frozen=True, slots=True)
class Part:
    """The boxes of a named tensor that this rank writes.

    Boxes have the tensor's dimensions in memory order, the outermost first. Another safetensors
    reader therefore finds a channels_last weight with its channels in the last dimension.

    shape, order: of the whole tensor, see `format.TensorEntry`.
    boxes: in the order of the file, each with elements; none if this rank has no elements.
    data: (n,), on any device: the elements of the boxes, one box after the other. Moments in codes
        are decoded while they are written.
    bucket: the bucket whose update modifies `data`; None if no update does.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    boxes: Sequence[Box]
    data: Plane
    bucket: int | None = None


class RankFile:
    """Writes the parts of one rank into a safetensors file, without copying the data.

        8 bytes   length of the header
        header    JSON: dtype, shape and offsets of each box; padded to a multiple of 8 bytes
        data      the boxes of the first part, then those of the next one

    Owns: the open file, until `finish` or `close`.
    Lifecycle: `write` in any number of calls, for all parts in the order given to the constructor;
    then `finish`.
    Threads: any thread, one at a time.
    Source: Hugging Face, the safetensors format.
    """

    def __init__(self, folder: Path, name: str, parts: Sequence[Part]) -> None:
        self.path = folder / name
        header: dict[str, object] = {}
        boxes: dict[str, list[tuple[Box, int]]] = {}  # with their offsets in the data
        nbytes = 0
        for part in parts:
            boxes[part.name] = []
            assert sum(box.numel for box in part.boxes) == part.data.numel()
            for box in part.boxes:
                boxes[part.name].append((box, nbytes))
                end = nbytes + box.numel * part.data.element_size()
                dtype, shape = safetensors_entry(part.data.dtype, list(box.sizes))
                header[f"{part.name}@{','.join(map(str, box.offsets))}"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [nbytes, end],
                }
                nbytes = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        data_start = 8 + len(text)
        self._expected_nbytes = data_start + nbytes
        self._tensors = {
            part.name: TensorEntry(
                dtype=DTYPE_NAMES[part.data.dtype],
                shape=list(part.shape),
                order=list(part.order),
                pieces=[
                    Piece(
                        offsets=list(box.offsets),
                        sizes=list(box.sizes),
                        file=name,
                        start=data_start + start,
                    )
                    for box, start in boxes[part.name]
                ],
            )
            for part in parts
        }
        # Unbuffered: blocks are large, and an error is raised by the write that fails.
        self._raw = self.path.open("xb", buffering=0)
        self._file = _SummedFile(self._raw)
        try:
            self._file.write(memoryview(len(text).to_bytes(8, "little")))
            self._file.write(memoryview(text))
        except BaseException:
            self.close()
            raise

    def write(self, parts: Iterable[Part]) -> None:
        """Write the next parts."""
        for part in parts:
            pieces = self._tensors[part.name].pieces
            # The header is already written, so it fixes where each part begins.
            assert not pieces or pieces[0].start == self._file.nbytes, (
                "parts must be written in the order of the header"
            )
            # The boxes of a part are consecutive, so its data is written as one.
            for view in host_bytes(part.data):
                self._file.write(view)

    def finish(self) -> RankEntry:
        """Flush the file to the disk, close it, and return this rank's part of the manifest."""
        self._file.finish_block()
        nbytes = self._file.nbytes
        assert nbytes == self._expected_nbytes, "a part of the header was not written"
        os.fsync(self._raw.fileno())  # the rename that commits must not reach the disk first
        # A broken file system may report success although it has lost data.
        found = os.fstat(self._raw.fileno()).st_size
        if found != nbytes:
            message = (
                f"the file has {found:,} bytes after {nbytes:,} were written. Check the disk and "
                "its file system"
            )
            raise OSError(errno.EIO, message, str(self.path))
        self.close()
        entry = FileEntry(nbytes=nbytes, checksums=self._file.checksums)
        return RankEntry(name=self.path.name, file=entry, tensors=self._tensors)

    def close(self) -> None:
        """Close the file, complete or not. Idempotent."""
        self._raw.close()


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file, such as `rank-00000-of-00002.safetensors`."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


class _SummedFile:
    """Writes to a file and computes the CRC-32 of each block of 4 MiB."""

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._checksum = 0  # of the current block
        self._filled = 0  # bytes of the current block
        self.checksums: list[int] = []
        self.nbytes = 0

    def write(self, data: memoryview) -> None:
        while data:
            part = data[: BLOCK_NBYTES - self._filled]
            # A write may write only a part, for example just before the disk is full.
            part = part[: self._file.write(part)]
            self._checksum = zlib.crc32(part, self._checksum)
            self._filled += len(part)
            self.nbytes += len(part)
            data = data[len(part) :]
            if self._filled == BLOCK_NBYTES:
                self.finish_block()

    def finish_block(self) -> None:
        """Store the checksum of the current block, which may be shorter at the end of the file."""
        if self._filled:
            self.checksums.append(self._checksum)
            self._checksum = self._filled = 0


def host_bytes(data: Plane) -> Iterator[memoryview]:
    """Yield all bytes of a 1-d tensor, in order. Each view is valid until the next one.

    The view of a host tensor is its memory. A device tensor is copied, one block at a time, and a
    moment in codes is decoded so.
    """
    if isinstance(data, CodedMoment):
        yield from map(as_bytes, data.chunks())
        return
    if data.device.type == "cpu":
        yield as_bytes(data)
        return
    # As bytes, because torch cannot copy tensors of all dtypes.
    for piece in data.view(torch.uint8).split(BLOCK_NBYTES):
        yield as_bytes(piece.cpu())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a 1-d host tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.detach().view(torch.uint8).numpy().data
    return view
