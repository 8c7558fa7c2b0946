"""The files of a checkpoint: safetensors, streamed out with checksums and read back verified.

A save writes into a folder of its own, `<checkpoint>.<node>-<process>-<random>.partial`, and one
rename makes it a checkpoint. The name says which process writes: a later save can remove what a
killed one has left, and never touches the folder of a save that still runs.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path

import psutil
import torch

from offload_adam.checkpoint.format import (
    BLOCK_NBYTES,
    DTYPE_NAMES,
    DTYPES,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Piece,
    RankEntry,
    TensorEntry,
    parse_manifest,
)
from offload_adam.errors import CheckpointError
from offload_adam.state.state_shard import boxes_of_range

NUM_BLOCKS = 4
"""Blocks that are kept while a checkpoint is read: a tensor's pieces lie in one or two files."""

PARTIAL_SUFFIX = ".partial"
_OWNER = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}" + re.escape(PARTIAL_SUFFIX))

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links answer."""

_in_progress: set[str] = set()
"""Names that this process is writing to."""


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous range of a named tensor, as it lies in memory.

    Boxes count in the tensor's dimensions as they lie in memory: who reads a file with another
    safetensors reader finds a channels_last weight with its channels last.

    shape, order: of the whole tensor, see `format.TensorEntry`.
    data: 1-d, on any device; elements [start, end) in memory order.
    bucket: whose update writes to it, None for none.
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
        """Safetensors' name of the dtype."""
        return DTYPE_NAMES[self.data.dtype]

    def blobs(self) -> Iterator[tuple[Blob, tuple[int, ...]]]:
        """Yield the boxes that the range is cut into, as they lie, with their offsets."""
        memory_shape = [self.shape[dim] for dim in self.order]
        done = 0
        for box in boxes_of_range(memory_shape, self.start, self.end):
            numel = prod(box.sizes)
            data = host_bytes(self.data[done : done + numel])
            label = ",".join(map(str, box.offsets))
            yield Blob(f"{self.name}@{label}", self.dtype_name, box.sizes, data), box.offsets
            done += numel


def host_bytes(data: torch.Tensor) -> Iterator[memoryview]:
    """Yield views that together are all bytes of a 1-d tensor, each valid until the next.

    A host tensor's are views of its memory. A device's are copied, one block at a time.
    """
    if data.device.type == "cpu":
        yield as_bytes(data)
        return
    for piece in data.split(BLOCK_NBYTES // data.element_size()):
        yield as_bytes(piece.cpu())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a 1-d host tensor's memory."""
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.detach().view(torch.uint8).numpy().data
    return view


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
        return DTYPES[self.dtype].itemsize * prod(self.sizes)


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
        """Close the file, whole or not. Idempotent."""
        self._file.close()


def open_regular(path: Path) -> int:
    """Open a plain file for reading, without following a link or waiting at a pipe.

    Raises:
        CheckpointError: it is not a regular file, or cannot be opened.
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
    """The blocks that were verified last, shared by all files of a checkpoint.

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

    def allocate_block(self) -> bytearray:
        """Return memory for another block; evict the least recently used one if all are taken."""
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

    def _verified(self, number: int) -> memoryview:
        start = number * BLOCK_NBYTES
        length = min(BLOCK_NBYTES, self._entry.nbytes - start)
        known = self._memory.find(self._path, number)
        if known is not None:
            return memoryview(known)[:length]
        block = self._memory.allocate_block()
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


def partial_name(name: str) -> str:
    """Return a new name for what this process writes before it is renamed to `name`.

    It counts as in progress until `publish` or `discard`.
    """
    own = f"{name}.{_node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
    _in_progress.add(own)
    return own


def commit_files(partial: Path, target: Path, manifest: Manifest) -> None:
    """Check that nothing is missing, write the manifest, and rename `partial` to `target`.

    Raises:
        CheckpointError: a file is not there: some rank has written to another disk, or to one that
            has gone since. Or another save has written to `target` meanwhile.
    """
    text = manifest.to_json()
    parse_manifest(text, str(target))
    for name, entry in manifest.files.items():
        VerifiedFile(partial, name, entry).close()
    with (partial / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    publish(partial, target)
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Let the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, target: Path) -> None:
    """Rename a completed file or folder to its target.

    Raises:
        CheckpointError: another process has written a folder there meanwhile.
    """
    try:
        _rename(partial, target)
    except OSError as error:
        if not os.path.lexists(target):
            raise
        raise CheckpointError(
            f"{target} was written by another process meanwhile, and this one's is discarded: give "
            "each job a path of its own"
        ) from error
    _in_progress.discard(partial.name)


def _rename(partial: Path, target: Path) -> None:
    """Rename atomically, unless there is something at the target: of several saves one succeeds."""
    if partial.is_file():
        # A rename would replace another file, a link does not.
        try:
            os.link(partial, target)
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(target):
                raise
        else:
            partial.unlink()
            return
    partial.rename(target)  # a folder replaces no folder with files in it


def discard(partial: Path) -> None:
    """Remove what will not be published; what cannot be removed now is left to a later save."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink()
    _in_progress.discard(partial.name)


def remove_abandoned(target: Path) -> None:
    """Remove the folders of earlier saves to `target` that no process writes any more.

    Only processes of this node can be looked for: what a process of another one has left stays.
    """
    for partial in target.parent.glob(f"{glob.escape(target.name)}.*{PARTIAL_SUFFIX}"):
        owner = _OWNER.fullmatch(partial.name.removeprefix(target.name))
        if owner is None or owner[1] != _node():
            continue
        process = int(owner[2])
        ours = process == os.getpid()
        if partial.name not in _in_progress if ours else not psutil.pid_exists(process):
            discard(partial)


def _node() -> str:
    """Return what tells apart where process ids mean the same processes: host, boot, container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    known = [
        socket.gethostname(),
        boot.read_text(encoding="ascii") if boot.exists() else "",
        os.readlink(namespace) if namespace.exists() else "",
    ]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:8]
