"""The file in which a rank keeps its optimizer state.

    header     magic, format, sizes and identity, with a checksum
    words      valid_from, done, and the launch that began last: 8 bytes each, written by one store
    records    two slots: what was prepared and what was decided for even and odd steps
    undo       old values of the elements that a kernel is modifying
    arena      the state; starts at a huge page

All of it is one shared mapping. A process that is killed dies between two instructions, so the file
then holds a prefix of its stores, in program order. Each write below leaves the file valid after
every prefix.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from offload_adam.errors import KeptStateError
from offload_adam.kept.holder import Holder, NotKeptError, unusable
from offload_adam.kept.pages import FilePages
from offload_adam.kept.space import allocate, map_new
from offload_adam.layout.flat import align
from offload_adam.printable import show

_MAGIC = b"OAdamKpt"
_FORMAT = 1
_BYTE_ORDER = 0x01020304
# Magic, byte order and format; sizes of the parts and of the file; length of the identity; CRC.
_HEADER = struct.Struct("=8sIIQQQQQII")
_CRC_NBYTES = 4
_BLOCK_NBYTES = 512  # of stat's st_blocks
_MAX_IDENTITY_NBYTES = 2**20

_CACHE_LINE_NBYTES = 64
_HUGE_PAGE_NBYTES = 2**21
_WORD_NBYTES = 8
_VALID_FROM, _DONE, _LAUNCH, _LAUNCH_PIECES = range(4)

_PREPARED, _DECISION = range(2)
# Sequence number, length of the content, CRC: one word each, before the content.
_RECORD_WORDS = 3
_RECORD_KEY = struct.Struct("=QQQ")


class Sizes(NamedTuple):
    """Bytes of a file's parts.

    prepared_nbytes, decision_nbytes: largest content of a record of each kind.
    """

    prepared_nbytes: int
    decision_nbytes: int
    undo_nbytes: int
    arena_nbytes: int

    @property
    def overhead_nbytes(self) -> int:
        """Bytes of the file before the arena."""
        return _Layout(0, self).arena


class Found(NamedTuple):
    """The records of a file.

    prepared: sequence number of the newest valid prepared record; 0 without one.
    decided: sequence number of the newest valid decision; 0 without one.
    valid_from: the state can be used only if the decision to resume from has at least this number.
    """

    prepared: int
    decided: int
    valid_from: int


class KeptFile:
    """A mapped file with a rank's state, the records of its last steps, and its progress.

    Owns: the mapping and its views, until `close`. The file itself stays with its holder.
    Lifecycle: `create` or `attach`, between `acquire` and `release` of the holder.
    Threads: one at a time.
    A forked child shares no page with its parent: its writes do not reach the file.

    Attributes:
        sizes: of the parts.
        mapping: the whole file.
        arena_start: the arena is `mapping[arena_start : arena_start + sizes.arena_nbytes]`. A
            multiple of a page, and of 2 MiB if the arena is as large.
        undo: (undo_nbytes,) uint8, a view of the mapping; starts at a multiple of 64 bytes.
    """

    def __init__(self, file: int, mapping: mmap.mmap, layout: _Layout) -> None:
        """Use a mapping with a valid header; see `create` and `attach`.

        Args:
            file: a descriptor, which the caller may close.
        """
        self._layout = layout
        self.sizes = layout.sizes
        self.mapping = mapping
        self.arena_start = layout.arena
        self.undo: npt.NDArray[np.uint8] = np.frombuffer(
            mapping, np.uint8, layout.sizes.undo_nbytes, layout.undo
        )
        # A store through this view is one store of 8 bytes.
        self._words = memoryview(mapping)[: layout.arena].cast("Q")
        self._first_word = layout.words // _WORD_NBYTES
        self._pages = FilePages(file, mapping)

    @classmethod
    def create(
        cls, holder: Holder, identity: str, sizes: Sizes, *, reserve: bool = True
    ) -> KeptFile:
        """Create a zeroed file. An existing file is removed.

        Args:
            identity: JSON text that says what the state belongs to; up to 1 MiB.
            reserve: allocate the arena's pages. False leaves that to the caller, who can place them
                on NUMA nodes.

        Raises:
            HostMemoryError: the file system has not enough space. No file is left then.
            OSError: the file cannot be created.
            ValueError: the identity is too long.
        """
        text = identity.encode()
        if len(text) > _MAX_IDENTITY_NBYTES:
            raise ValueError(
                f"The identity has {len(text):,} bytes, at most {_MAX_IDENTITY_NBYTES:,} are kept."
            )
        layout = _Layout(len(text), sizes)
        file = holder.create()
        try:
            try:
                reserved_nbytes = layout.end if reserve else layout.arena
                mapping = map_new(file, holder.place, layout.end, reserved_nbytes)
            except BaseException:
                holder.remove()
                raise
            fields = (_MAGIC, _BYTE_ORDER, _FORMAT, *sizes, len(mapping), len(text))
            crc = _crc_of_header(_HEADER.pack(*fields, 0), text)
            header = _HEADER.pack(*fields, crc) + text
            mapping[len(_MAGIC) : len(header)] = header[len(_MAGIC) :]
            mapping[: len(_MAGIC)] = _MAGIC  # last: without it, the file is no kept state
            return cls(file, mapping, layout)
        finally:
            os.close(file)

    @classmethod
    def attach(cls, holder: Holder, identity: str, sizes: Sizes) -> KeptFile:
        """Map the file that an earlier process has created with the same arguments.

        Raises:
            NotKeptError: there is no such file, it is damaged, or of other arguments.
            KeptStateError: it may be intact, but cannot be used: the system does not open or map
                it, it is another user's, or no regular file.
        """
        kept, found = _open(holder)
        if found != identity:
            difference = _difference(found, identity)
            raise NotKeptError(f"{holder.place} is of another state: {difference}.")
        if kept.sizes != sizes:
            raise NotKeptError(f"{holder.place} has parts of {kept.sizes}, not of {sizes}.")
        return kept

    def found(self) -> Found:
        """Check all records, and return which are valid."""
        prepared, decided = (
            max(self._valid_sequences(kind), default=0) for kind in (_PREPARED, _DECISION)
        )
        return Found(prepared, decided, self.valid_from)

    def write_prepared(self, sequence: int, content: bytes) -> None:
        """Replace the prepared record of `sequence - 2`, and remove its decision.

        The records of the newest decided step stay, if the number rises only after a decision.

        Args:
            sequence: from 1 on.

        Raises:
            ValueError: the content is larger than `prepared_nbytes`.
        """
        self._check_fits(_PREPARED, content)
        # Otherwise the old decision would seem to belong to the new record's slot.
        self._words[self._layout.record(_DECISION, sequence) // _WORD_NBYTES] = 0
        self._write(_PREPARED, sequence, content)

    def write_decision(self, sequence: int, content: bytes) -> None:
        """Write the decision on the prepared record of the same number.

        Raises:
            ValueError: the content is larger than `decision_nbytes`.
        """
        self._check_fits(_DECISION, content)
        self._write(_DECISION, sequence, content)

    def read_prepared(self, sequence: int) -> bytes | None:
        """Return the content of a prepared record; None if it is absent or damaged."""
        return self._read(_PREPARED, sequence)

    def read_decision(self, sequence: int) -> bytes | None:
        """Return the content of a decision; None if it is absent or damaged."""
        return self._read(_DECISION, sequence)

    @property
    def valid_from(self) -> int:
        """See `Found.valid_from`; 0 in a new file."""
        return self._words[self._first_word + _VALID_FROM]

    @valid_from.setter
    def valid_from(self, sequence: int) -> None:
        self._words[self._first_word + _VALID_FROM] = sequence

    @property
    def done(self) -> int:
        """Number of the last launch that is complete; 0 in a new file. It may only rise."""
        return self._words[self._first_word + _DONE]

    @done.setter
    def done(self, number: int) -> None:
        self._words[self._first_word + _DONE] = number

    @property
    def launch(self) -> int:
        """Number of the launch that began last; 0 in a new file."""
        return self._words[self._first_word + _LAUNCH]

    def begin_launch(self, number: int, num_pieces: int) -> int:
        """Record that a launch begins, and return its number of pieces.

        That is `num_pieces`, or the recorded number if the process died in the same launch.

        Args:
            number: from 1 on, one more than `done`.
        """
        launch, pieces = self._first_word + _LAUNCH, self._first_word + _LAUNCH_PIECES
        if self.launch == number:
            return self._words[pieces]
        # In this order: the old launch is complete, so its pieces are not needed any more.
        self._words[pieces] = num_pieces
        self._words[launch] = number
        return num_pieces

    def make_private(self, copied: Iterable[tuple[int, int]] = ()) -> None:
        """Let no later write of this process reach the file; see `FilePages.make_private`."""
        self._pages.make_private(copied)

    def close(self) -> None:
        """Drop the references to the mapping. Idempotent.

        It is unmapped with its last view, such as a tensor of the arena.
        """
        self._pages.close()
        if hasattr(self, "mapping"):
            # Without `mapping.close()`, which would unmap it although tensors still view it: torch
            # holds a reference to the mapping, but no lock on its buffer.
            del self.mapping, self.undo, self._words

    def _check_fits(self, kind: int, content: bytes) -> None:
        capacity = self._layout.capacities[kind]
        if len(content) > capacity:
            raise ValueError(
                f"A record of {len(content):,} bytes does not fit into {capacity:,} bytes of the "
                "kept file."
            )

    def _write(self, kind: int, sequence: int, content: bytes) -> None:
        start = self._layout.record(kind, sequence)
        word, content_start = start // _WORD_NBYTES, start + _RECORD_WORDS * _WORD_NBYTES
        self._words[word] = 0  # invalid until the last store
        self.mapping[content_start : content_start + len(content)] = content
        self._words[word + 1] = len(content)
        self._words[word + 2] = _crc_of_record(kind, sequence, content)
        self._words[word] = sequence

    def _read(self, kind: int, sequence: int) -> bytes | None:
        start = self._layout.record(kind, sequence)
        word, content_start = start // _WORD_NBYTES, start + _RECORD_WORDS * _WORD_NBYTES
        found, length, crc = self._words[word : word + _RECORD_WORDS]
        if sequence < 1 or found != sequence or length > self._layout.capacities[kind]:
            return None
        content = self.mapping[content_start : content_start + length]
        return content if crc == _crc_of_record(kind, sequence, content) else None

    def _valid_sequences(self, kind: int) -> Iterator[int]:
        for slot in range(2):
            sequence = self._words[self._layout.record(kind, slot) // _WORD_NBYTES]
            if self._read(kind, sequence) is not None:
                yield sequence


def is_kept_file(holder: Holder) -> bool:
    """Return whether a file has kept state of this user, whatever its layout."""
    try:
        kept, _ = _open(holder, allocates=False)
    except (NotKeptError, KeptStateError):
        return False
    kept.close()
    return True


def peek(holder: Holder) -> bytes | None:
    """Return the prepared record of the newest decided step, without a check of the identity.

    Works while another process uses the file.

    Returns:
        None if no step was decided, or the file is not valid. `valid_from` and the arena are not
        checked.
    """
    try:
        kept, _ = _open(holder, allocates=False)
    except (NotKeptError, KeptStateError):
        return None
    try:
        return kept.read_prepared(kept.found().decided)
    finally:
        kept.close()


class _Layout:
    """Where the parts of a file start, in bytes."""

    def __init__(self, identity_nbytes: int, sizes: Sizes) -> None:
        self.sizes = sizes
        self.capacities = sizes.prepared_nbytes, sizes.decision_nbytes
        # Whole pages, so that the identity does not change the size of the file.
        self.words = align(_HEADER.size + identity_nbytes, mmap.PAGESIZE)
        self._records = self.words + _CACHE_LINE_NBYTES
        self._record_nbytes = [
            align(_RECORD_WORDS * _WORD_NBYTES + capacity, _CACHE_LINE_NBYTES)
            for capacity in self.capacities
        ]
        self.undo = self._records + 2 * sum(self._record_nbytes)
        is_large = sizes.arena_nbytes >= _HUGE_PAGE_NBYTES
        page_nbytes = _HUGE_PAGE_NBYTES if is_large else mmap.PAGESIZE
        self.arena = align(self.undo + sizes.undo_nbytes, page_nbytes)
        self.end = self.arena + sizes.arena_nbytes

    def record(self, kind: int, sequence: int) -> int:
        """Return where a record of this kind and number starts: prepared, then its decision."""
        slot = self._records + sequence % 2 * sum(self._record_nbytes)
        return slot + sum(self._record_nbytes[:kind])


def _open(holder: Holder, *, allocates: bool = True) -> tuple[KeptFile, str]:
    """Map a file, and return it with its identity, both checked.

    Args:
        allocates: the pages of the arena that were never written, too. False if the arena is not
            accessed: a process that has just created the file may be placing them.

    Raises:
        NotKeptError, KeptStateError: see `KeptFile.attach`.
    """
    place, file = holder.place, holder.open()
    if file is None:
        raise NotKeptError(f"{place} does not exist.")
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise unusable(place, "is not a regular file")
        if status.st_uid != os.geteuid():
            raise unusable(place, f"belongs to user {status.st_uid}")
        if status.st_size < _HEADER.size:
            raise NotKeptError(f"{place} is too short.")
        # Exactly the file: an access beyond its end would end the process by SIGBUS.
        mapping = mmap.mmap(file, status.st_size)
        layout, identity = _read_header(place, mapping)
        # A file system may have no space any more for pages that were never written. An access to
        # them would then be a SIGBUS, too.
        if allocates and status.st_blocks * _BLOCK_NBYTES < status.st_size:
            allocate(file, status.st_size)
        return KeptFile(file, mapping, layout), identity
    except OSError as error:
        raise unusable(place, f"cannot be mapped: {error.strerror}") from None
    finally:
        os.close(file)


def _read_header(place: str, mapping: mmap.mmap) -> tuple[_Layout, str]:
    magic, byte_order, version, *sizes, file_nbytes, identity_nbytes, crc = _HEADER.unpack_from(
        mapping
    )
    if magic != _MAGIC:
        raise NotKeptError(f"{place} is no kept state, or its creation was interrupted.")
    if (byte_order, version) != (_BYTE_ORDER, _FORMAT):
        raise NotKeptError(f"{place} is of another format: version {version}, not {_FORMAT}.")
    layout = _Layout(identity_nbytes, Sizes(*sizes))
    if file_nbytes != len(mapping) or layout.end > file_nbytes:
        raise NotKeptError(f"{place} has {len(mapping):,} bytes instead of {file_nbytes:,}.")
    text = mapping[_HEADER.size : _HEADER.size + identity_nbytes]
    if crc != _crc_of_header(mapping[: _HEADER.size], text):
        raise NotKeptError(f"{place} has a damaged header.")
    return layout, text.decode()


def _crc_of_header(header: bytes, identity: bytes) -> int:
    return zlib.crc32(identity, zlib.crc32(header[:-_CRC_NBYTES]))


def _crc_of_record(kind: int, sequence: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(_RECORD_KEY.pack(kind, sequence, len(content))))


def _difference(found: str, expected: str) -> str:
    """Say where two identities first differ."""
    try:
        return next(_differences(json.loads(found), json.loads(expected), "identity"))
    except (ValueError, RecursionError, StopIteration):  # not JSON, or the same values
        return "its identity differs"


def _differences(found: object, expected: object, path: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *found]):
            yield from _differences(found.get(key), expected.get(key), f"{path}.{key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
    elif found != expected:
        yield f"{path} is {show(found)}, not {show(expected)}"
