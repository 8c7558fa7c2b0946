"""A file as `torch.save` writes it, tensor after tensor: none of them has to be in memory.

    archive/data.pkl     the object, in which each tensor names a storage
    archive/data/<key>   one storage's bytes, at a multiple of 64 bytes, so that it can be mapped
    archive/version, ... what torch looks at before it reads the rest

`torch.save` itself takes tensors that are there; what it has for those that are not, fake tensors
and records that are filled in later, is private or marked as a prototype, and leaves checksums out.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile, ZipInfo

import torch

from offload_adam.torch_private import rebuild_tensor

_FOLDER = "archive"
_ALIGNMENT_NBYTES = 64
_PADDING_ID = 0x4246  # what torch's own padding is called
_FIELD = struct.Struct("<HH")
_LARGE_NBYTES = 2**30
"""A record from here on has lengths of 64 bits; zipfile would take them from twice as many on."""
_PICKLE_PROTOCOL = 2  # torch's
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True, eq=False)
class Streamed:
    """A dense tensor on the host whose bytes come when they are written.

    key: two that have the same are one tensor, and share its memory again when they are loaded.
    strides: in elements, of a tensor whose elements lie together.
    blocks: yields views that together are all elements as they lie, each valid until the next.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: Callable[[], Iterable[memoryview]]

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)


class _Storage(NamedTuple):
    number: int
    tensor: Streamed


class _Pickler(pickle.Pickler):
    """Pickles streamed tensors as torch pickles its own: a storage by name, and a view of it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PICKLE_PROTOCOL)
        self.storages: dict[str, _Storage] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = _in_memory(obj)
        if not isinstance(obj, Streamed):
            return NotImplemented
        storage = self.storages.setdefault(obj.key, _Storage(len(self.storages), obj))
        hooks: OrderedDict[int, Any] = OrderedDict()
        view = (storage, 0, obj.shape, obj.strides, False, hooks)
        return rebuild_tensor, view

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        return "storage", _STORAGES[tensor.dtype], str(obj.number), "cpu", tensor.numel


def _in_memory(tensor: torch.Tensor) -> Streamed:
    """Return a host tensor for the file; the pickler keeps it, so that its id stays its own."""
    whole = tensor.contiguous()
    data = whole.view(-1).view(torch.uint8).numpy().data if whole.numel() else b""
    return Streamed(
        f"in memory at {id(tensor)}",
        tensor.dtype,
        tuple(tensor.shape),
        whole.stride(),
        lambda: [memoryview(data)],
    )


def write_torch_file(path: Path, content: object) -> None:
    """Write what `torch.load(path, weights_only=True)` reads, with `mmap=True` as well.

    Args:
        content: plain values, mappings, sequences and tensors, with `Streamed` for large ones.

    Raises:
        OSError: it cannot be written.

    Source: PyTorch's notes on serialization; PKWARE, APPNOTE.TXT.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with path.open("xb") as file:
        with ZipFile(file, "w") as archive:
            for name, text in (
                ("data.pkl", pickled.getvalue()),
                (".format_version", b"1"),
                (".storage_alignment", str(_ALIGNMENT_NBYTES).encode()),
                ("byteorder", sys.byteorder.encode()),
            ):
                _write(archive, file.tell(), name, len(text), [memoryview(text)])
            for number, tensor in pickler.storages.values():
                nbytes = tensor.numel * tensor.dtype.itemsize
                _write(archive, file.tell(), f"data/{number}", nbytes, tensor.blocks())
            _write(archive, file.tell(), "version", 2, [memoryview(b"3\n")])
        file.flush()
        os.fsync(file.fileno())


def _write(
    archive: ZipFile, start: int, name: str, nbytes: int, blocks: Iterable[memoryview]
) -> None:
    """Write one record at byte `start`, its content at a multiple of 64 bytes."""
    is_large = nbytes >= _LARGE_NBYTES
    record = ZipInfo(f"{_FOLDER}/{name}")
    record.CRC = 0  # until it is known; without one there is no header
    header_nbytes = len(record.FileHeader(is_large)) + _FIELD.size
    padding = -(start + header_nbytes) % _ALIGNMENT_NBYTES
    record.extra = _FIELD.pack(_PADDING_ID, padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=is_large) as out:
        for block in blocks:
            out.write(block)
