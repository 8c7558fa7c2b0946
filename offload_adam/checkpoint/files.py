"""The files of a checkpoint: safetensors, streamed out with checksums and read back verified."""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

from offload_adam.checkpoint.manifest import BLOCK_NBYTES, ITEMSIZES, FileEntry
from offload_adam.errors import CheckpointError

NUM_BLOCKS = 4
"""Blocks that are kept while a checkpoint is read: a tensor's pieces lie in one or two files."""

NUM_OPEN_FILES = 8
"""Files of a checkpoint that are open at once: a process may open no more than 1,024 on many a
machine, and a checkpoint has one for each rank."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One entry of a file: a name, safetensors' dtype and sizes, and where its bytes come from.

    data: iterated once, when it is written; the views together are `nbytes` long.
    """

    name: str
    dtype: str
    sizes: tuple[int, ...]
    data: Iterable[memoryview]

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in a file."""
        return ITEMSIZES[self.dtype] * prod(self.sizes)


class _SummedFile:
    """Writes through to a file and keeps the checksum of each block."""

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
            # A write may take less than it is given: on a disk that fills up it first does.
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


class FileWriter:
    """Writes a safetensors file, blob after blob, from memory as it lies.

    starts: the byte at which each blob starts, by name, known from the beginning.

    Owns: the file, until `finish` or `close`.
    Lifecycle: `write` for every blob in the order of the constructor's, then `finish`.

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
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.starts: dict[str, int] = {}
        position = 8 + len(text)
        for blob in blobs:
            self.starts[blob.name] = position
            position += blob.nbytes
        self._path = path
        self._expected_nbytes = position
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
        assert self._file.nbytes == self.starts[blob.name], "blobs come in the header's order"
        for view in blob.data:
            if view.nbytes:  # a view with a zero in its shape cannot be cast
                self._file.write(view.cast("B"))

    def finish(self) -> FileEntry:
        """Flush all of it to the disk, and return the file's entry in the manifest."""
        self._file.finish_block()
        assert self._file.nbytes == self._expected_nbytes, "every blob has been written"
        os.fsync(self._raw.fileno())
        if os.fstat(self._raw.fileno()).st_size != self._file.nbytes:
            message = "the file is shorter than what was written to it"
            raise OSError(errno.EIO, message, str(self._path))
        self.close()
        return FileEntry(nbytes=self._file.nbytes, checksums=self._file.checksums)

    def close(self) -> None:
        """Close the file, whole or not. Idempotent."""
        self._raw.close()


def open_regular(path: Path) -> int:
    """Open a plain file for reading, without following a link or waiting at a pipe.

    Raises:
        CheckpointError: it is none, or cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no plain file")
    return descriptor


class BlockMemory:
    """Room for a few blocks, shared by all files of a checkpoint: what was verified last.

    Owns: at most `NUM_BLOCKS` blocks.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[Path, int], bytearray] = OrderedDict()

    def find(self, file: Path, number: int) -> bytearray | None:
        """Return a block that is verified, if it is still here."""
        block = self._blocks.get((file, number))
        if block is not None:
            self._blocks.move_to_end((file, number))
        return block

    def make_room(self) -> bytearray:
        """Return memory for another block, that of the one that was used longest ago."""
        if len(self._blocks) < NUM_BLOCKS:
            return bytearray(BLOCK_NBYTES)
        return self._blocks.popitem(last=False)[1]

    def keep(self, file: Path, number: int, block: bytearray) -> None:
        """Remember a block that is verified now."""
        self._blocks[file, number] = block


class VerifiedFile:
    """Reads parts of one file, every byte checked against the manifest before it is handed out.

    Owns: a descriptor.

    Args:
        memory: for blocks, its own where the file is read alone.
    """

    def __init__(
        self, folder: Path, name: str, entry: FileEntry, memory: BlockMemory | None = None
    ) -> None:
        self._path = folder / name
        self._entry = entry
        self._memory = memory or BlockMemory()
        self._descriptor = open_regular(self._path)
        nbytes = os.fstat(self._descriptor).st_size
        if nbytes != entry.nbytes:
            self.close()
            raise CheckpointError(f"{self._path} has {nbytes} bytes, expected {entry.nbytes}")

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill `target`, a view of bytes, from byte `start` of the file.

        Raises:
            CheckpointError: a block does not have its checksum, or cannot be read.
        """
        if not 0 <= start <= start + len(target) <= self._entry.nbytes:
            raise CheckpointError(f"{self._path} has no bytes {start} to {start + len(target)}")
        done = 0
        while done < len(target):
            number, skipped = divmod(start + done, BLOCK_NBYTES)
            block = self._verified(number)
            part = block[skipped : skipped + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)

    def verify(self) -> None:
        """Check every block."""
        for number in range(len(self._entry.checksums)):
            self._verified(number)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _verified(self, number: int) -> memoryview:
        start = number * BLOCK_NBYTES
        length = min(BLOCK_NBYTES, self._entry.nbytes - start)
        known = self._memory.find(self._path, number)
        if known is not None:
            return memoryview(known)[:length]
        block = self._memory.make_room()
        view = memoryview(block)[:length]
        self._fill(view, start)
        if zlib.crc32(view) != self._entry.checksums[number]:
            raise CheckpointError(
                f"{self._path} is damaged between byte {start} and {start + length}: its checksum "
                "is another"
            )
        self._memory.keep(self._path, number, block)
        return view

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self._path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self._path} ends before byte {start + len(view)}")
            done += count


class VerifiedFiles:
    """The files of a checkpoint, few of them open at once, and those that were read last.

    Owns: at most `NUM_OPEN_FILES` descriptors and `NUM_BLOCKS` blocks, until `close`.

    Raises:
        CheckpointError: a file is missing or has another length than it should.
    """

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._entries = entries
        self._memory = BlockMemory()
        self._open: OrderedDict[str, VerifiedFile] = OrderedDict()
        try:
            for name in entries:
                self[name]
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> VerifiedFile:
        """Return a file, open until `NUM_OPEN_FILES` others have been asked for."""
        file = self._open.get(name)
        if file is None:
            if len(self._open) == NUM_OPEN_FILES:
                _, oldest = self._open.popitem(last=False)
                oldest.close()
            file = VerifiedFile(self._folder, name, self._entries[name], self._memory)
            self._open[name] = file
        self._open.move_to_end(name)
        return file

    def verify(self) -> None:
        """Check every block of every file."""
        for name in self._entries:
            self[name].verify()

    def close(self) -> None:
        """Close what is open. Idempotent."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def flush_folder(folder: Path) -> None:
    """Let the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
