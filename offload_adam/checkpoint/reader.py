"""Reads tensors of a checkpoint. Every byte is verified before it is used.

CheckpointReader    tensors, from whichever files hold their pieces
VerifiedFile        ranges of bytes of one file, verified block by block
"""

from __future__ import annotations

import os
import stat
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

from offload_adam.checkpoint.format import (
    BLOCK_NBYTES,
    LOAD_ANOTHER,
    FileEntry,
    Manifest,
    Piece,
    flat_pieces,
)
from offload_adam.checkpoint.rank_file import as_bytes
from offload_adam.dtypes import DTYPES, as_bits
from offload_adam.errors import CheckpointError
from offload_adam.state.boxes import (
    Box,
    boxes_of_range,
    inverse_order,
    overlap,
    range_of_box,
    views_of,
)

# A checkpoint has one file for each rank, and many systems let a process open only 1,024.
NUM_OPEN_FILES = 8
# Verified blocks in memory. The pieces of one tensor are usually in one or two files.
NUM_BLOCKS = 4
_NUM_FLAT = 2  # tensors that are read in turns: a parameter and the remainder of its master
_NUM_BLOCKS_OF_ROWS = 16
_Blocks = OrderedDict[tuple[Path, int], bytearray]
"""Verified blocks by file and number, the least recently used one first."""


class Read(NamedTuple):
    """One read of a file into a tensor.

    start: byte of the first element in the file.
    target: a view of the tensor that is filled.
    strides: of the elements of `target` in the file, in elements; never ascending.
    """

    file: str
    start: int
    target: torch.Tensor
    strides: tuple[int, ...]


class CheckpointReader:
    """Reads tensors of a checkpoint, with few of its files open at once.

    Owns: at most `NUM_OPEN_FILES` descriptors and `NUM_BLOCKS` blocks, until `close`.

    Raises:
        CheckpointError: a file is missing or does not have the length in the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder
        self._blocks = _Blocks()
        self._flat: OrderedDict[str, list[tuple[int, int, Piece]] | None] = OrderedDict()
        self._open: OrderedDict[str, VerifiedFile] = OrderedDict()
        try:
            # Open each file once, so that a missing file is an error before anything is loaded.
            for name in manifest.files:
                self._file(name)
        except BaseException:
            self.close()
            raise

    def verify(self) -> None:
        """Verify every byte of every file.

        Raises:
            CheckpointError: a file is damaged or cannot be read; the message names the bytes.
        """
        for name in self.manifest.files:
            self._file(name).verify()

    def reads(self, name: str, boxes: Sequence[Box], target: torch.Tensor) -> Iterator[Read]:
        """Yield the reads of some boxes of a tensor.

        Args:
            boxes: with their dimensions in the saved order.
            target: (n,) of the saved dtype, on any device: the elements of the boxes, one box after
                the other.
        """
        entry = self.manifest.tensors[name]
        itemsize = target.element_size()
        pieces, ranges = self._flat_pieces(name), _flat_ranges(entry.memory_shape, boxes)
        if pieces is not None and ranges is not None:
            for start, end, place in ranges:
                # Pieces are in ascending order, so those before `start` need not be looked at.
                number = max(0, bisect_right(pieces, start, key=itemgetter(0)) - 1)
                while number < len(pieces) and pieces[number][0] < end:
                    low, high, piece = pieces[number]
                    # The elements of the piece that are asked for: [first, last).
                    first, last = max(low, start), min(high, end)
                    if first < last:
                        part = target[place + first - start : place + last - start]
                        yield Read(piece.file, piece.start + (first - low) * itemsize, part, (1,))
                    number += 1
            return
        parts = views_of(target, boxes)
        for piece in entry.pieces:
            saved = piece.box
            for box, values in parts:
                common = overlap(saved, box)
                if common is not None:
                    strides = [prod(saved.sizes[dim + 1 :]) for dim in range(len(saved.sizes))]
                    skipped = sum(
                        (index - first) * stride
                        for index, first, stride in zip(
                            common.offsets, saved.offsets, strides, strict=True
                        )
                    )
                    part = values[common.slices(box.offsets)]
                    yield Read(piece.file, piece.start + skipped * itemsize, part, tuple(strides))

    def read(self, reads: Iterable[Read]) -> None:
        """Read all of `reads`.

        Raises:
            CheckpointError: a file is damaged or cannot be read.
        """
        # Sorted by file and byte, no block is read twice, although only few blocks stay in memory.
        for file, start, target, strides in sorted(reads, key=itemgetter(0, 1)):
            # As integers, because torch cannot copy tensors of all dtypes.
            self._read(file, start, as_bits(target), strides)

    def _read(self, file: str, start: int, target: torch.Tensor, strides: Sequence[int]) -> None:
        """Read the elements of `target`, as described by `Read`."""
        span = 1 + sum(
            (size - 1) * stride for size, stride in zip(target.shape, strides, strict=True)
        )
        most = BLOCK_NBYTES // target.itemsize
        if span == target.numel() and target.is_contiguous() and target.is_cpu:
            self._file(file).read_into(as_bytes(target.view(-1)), start)
        elif span <= most:
            # Gaps are read, too: they are in blocks that are read and verified anyway.
            values = torch.empty(span, dtype=target.dtype, device="cpu")
            self._file(file).read_into(as_bytes(values), start)
            target.copy_(values.as_strided(target.shape, strides))
        else:
            # In parts along the outermost dimension, as many indices at once as fit a block.
            dim = next(dim for dim, size in enumerate(target.shape) if size > 1)
            inner = span - (target.shape[dim] - 1) * strides[dim]
            count = max(1, (most - inner) // strides[dim] + 1)
            for part in target.split(count, dim):
                self._read(file, start, part, strides)
                start += count * strides[dim] * target.itemsize

    def piece(self, name: str, piece: Piece) -> torch.Tensor:
        """Return a piece of a tensor on the host, with the saved order of elements in memory."""
        entry = self.manifest.tensors[name]
        flat = torch.empty(piece.box.numel, dtype=DTYPES[entry.dtype], device="cpu")
        self.read([Read(piece.file, piece.start, flat, (1,))])
        return flat.view(piece.box.sizes).permute(inverse_order(entry.order))

    def box(self, name: str, box: Box) -> torch.Tensor:
        """Return a box of a tensor on the host, with the saved order of elements in memory.

        Args:
            box: with its dimensions in logical order, as those of the result.
        """
        entry = self.manifest.tensors[name]
        saved = box.permuted(entry.order)
        flat = torch.empty(box.numel, dtype=DTYPES[entry.dtype], device="cpu")
        if box.numel > 0:
            self.read(self.reads(name, [saved], flat))
        return flat.view(saved.sizes).permute(inverse_order(entry.order))

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor on the host, with the saved order of its elements in memory."""
        shape = self.manifest.tensors[name].shape
        return self.box(name, Box((0,) * len(shape), tuple(shape)))

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in its saved order. Each view is valid until the next one."""
        entry = self.manifest.tensors[name]
        numel, dtype = prod(entry.shape), DTYPES[entry.dtype]
        # Rows of a tensor whose pieces are columns are in many files. More of them at a time read
        # each block of these files less often.
        num_blocks = 1 if self._flat_pieces(name) is not None else _NUM_BLOCKS_OF_ROWS
        most = num_blocks * BLOCK_NBYTES // dtype.itemsize
        buffer = torch.empty(min(numel, most), dtype=dtype, device="cpu")
        for start in range(0, numel, max(1, buffer.numel())):  # range rejects a step of 0
            part = buffer[: numel - start]
            boxes = boxes_of_range(entry.memory_shape, start, start + part.numel())
            self.read(self.reads(name, boxes, part))
            yield as_bytes(part)

    def close(self) -> None:
        """Close all files. Idempotent."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _flat_pieces(self, name: str) -> list[tuple[int, int, Piece]] | None:
        """Return `flat_pieces` of a tensor. They are computed once for all reads in sequence."""
        if name not in self._flat:
            if len(self._flat) == _NUM_FLAT:
                self._flat.popitem(last=False)
            self._flat[name] = flat_pieces(self.manifest.tensors[name])
        return self._flat[name]

    def _file(self, name: str) -> VerifiedFile:
        """Return an open file; close the least recently used one if too many are open."""
        file = self._open.get(name)
        if file is None:
            if len(self._open) == NUM_OPEN_FILES:
                _, oldest = self._open.popitem(last=False)
                oldest.close()
            file = VerifiedFile(self._folder, name, self.manifest.files[name], self._blocks)
            self._open[name] = file
        self._open.move_to_end(name)
        return file


def _flat_ranges(shape: Sequence[int], boxes: Sequence[Box]) -> list[tuple[int, int, int]] | None:
    """Return (start, end, place) of the flat ranges that boxes consist of.

    Elements [start, end) of a tensor begin at element `place` of the boxes' elements.

    Returns:
        None if the elements of a box are not contiguous in the tensor.
    """
    ranges: list[tuple[int, int, int]] = []
    place = 0
    for box in boxes:
        bounds = range_of_box(shape, box)
        if bounds is None:
            return None
        if ranges and ranges[-1][1] == bounds[0]:
            ranges[-1] = (ranges[-1][0], bounds[1], ranges[-1][2])
        else:
            ranges.append((*bounds, place))
        place += box.numel
    return ranges


class VerifiedFile:
    """Reads ranges of one file, and verifies every byte against the checksums of the manifest.

    Owns: a descriptor, until `close`.

    Args:
        blocks: at most `NUM_BLOCKS` verified blocks, shared with other files; None to use its own.

    Raises:
        CheckpointError: the file is missing or does not have the length in the manifest.
    """

    def __init__(
        self, folder: Path, name: str, entry: FileEntry, blocks: _Blocks | None = None
    ) -> None:
        self._path = folder / name
        self._entry = entry
        self._blocks = _Blocks() if blocks is None else blocks
        self._descriptor = _open_regular(self._path)
        # Not the size of the path: another file may be there by now.
        nbytes = os.fstat(self._descriptor).st_size
        if nbytes != entry.nbytes:
            self.close()
            raise CheckpointError(
                f"{self._path} has {nbytes:,} bytes, but was written with {entry.nbytes:,}. "
                f"{LOAD_ANOTHER}"
            )

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill `target`, a view of single bytes, from byte `start` of the file on.

        Raises:
            CheckpointError: a block is damaged or cannot be read.
        """
        if not 0 <= start <= start + len(target) <= self._entry.nbytes:
            raise CheckpointError(
                f"{self._path} has no bytes {start:,} to {start + len(target):,}: it has "
                f"{self._entry.nbytes:,}. {LOAD_ANOTHER}"
            )
        done = 0
        while done < len(target):
            number, skipped = divmod(start + done, BLOCK_NBYTES)
            block = self._verified(number)
            part = block[skipped : skipped + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)

    def verify(self) -> None:
        """Verify every block."""
        for number in range(len(self._entry.checksums)):
            self._verified(number)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _verified(self, number: int) -> memoryview:
        """Return a block, from memory or from the file. It is valid until the next call."""
        start = number * BLOCK_NBYTES
        length = min(BLOCK_NBYTES, self._entry.nbytes - start)
        block = self._blocks.pop((self._path, number), None)
        if block is None:
            if len(self._blocks) < NUM_BLOCKS:
                block = bytearray(BLOCK_NBYTES)
            else:  # reuse the memory of the least recently used block
                _, block = self._blocks.popitem(last=False)
            view = memoryview(block)[:length]
            self._fill(view, start)
            if zlib.crc32(view) != self._entry.checksums[number]:
                raise CheckpointError(
                    f"{self._path} is damaged between byte {start:,} and {start + length:,}: its "
                    f"checksum is wrong. {LOAD_ANOTHER}"
                )
        # Only verified blocks, because a block in this dict is not verified again. Insertion at the
        # end marks it as the most recently used.
        self._blocks[self._path, number] = block
        return memoryview(block)[:length]

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        # preadv may return fewer bytes than requested.
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self._path} cannot be read from byte {start + done:,}: {error.strerror}. "
                    "Check the disk, or load another checkpoint."
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {start + done:,}, but was written with "
                    f"{self._entry.nbytes:,} bytes. {LOAD_ANOTHER}"
                )
            done += count


def _open_regular(path: Path) -> int:
    """Open a regular file for reading.

    Raises:
        CheckpointError: it cannot be opened, or is not a regular file.
    """
    # A link could lead out of the checkpoint. Without O_NONBLOCK, opening a pipe could hang.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened: {error.strerror}. Check that the checkpoint is complete and "
            "that its files can be read."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file. {LOAD_ANOTHER}")
    return descriptor
