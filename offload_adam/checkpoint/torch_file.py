"""Writes a file in the format of `torch.save`, tensor after tensor, without holding them in memory.

    archive/data.pkl     the pickled object, in which each tensor names a storage
    archive/data/<key>   the bytes of one storage, at a multiple of 64 bytes for `mmap=True`
    archive/version, ... read by torch before the rest

`torch.save` takes tensors in memory. Its alternatives for tensors that are filled in later (fake
tensors, `skip_data`) are private or prototypes, and leave out checksums.
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

from offload_adam.checkpoint.rank_file import as_bytes
from offload_adam.torch_private import rebuild_tensor, rebuild_untyped_tensor

_FOLDER = "archive"
_ALIGNMENT_NBYTES = 64
_PADDING_ID = 0x4246  # torch's id of an extra field that holds padding
_FIELD = struct.Struct("<HH")
# Records from this size on get 64-bit lengths. zipfile writes the header before it knows the
# length, and raises an error beyond 2 GiB if the header has no room for 64 bits.
_LARGE_NBYTES = 2**30
_PICKLE_PROTOCOL = 2  # as torch.save
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}
_UNTYPED = {
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    *(torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2),
}
"""The dtypes without a storage class. A file has their bytes, and the dtype at the tensor."""
LOADABLE_DTYPES = {*_STORAGES, *_UNTYPED}
"""The dtypes that `torch.load(weights_only=True)` loads. `torch.save` rejects the others."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """A dense tensor whose bytes are read while the file is written.

    key: identifies the memory. Tensors with one key share memory again after loading.
    strides: in elements; the elements are contiguous in memory, in any order of dimensions.
    blocks: yields all bytes in memory order. Each view is valid until the next one.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: Callable[[], Iterable[memoryview]]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def write_torch_file(path: Path, content: object) -> None:
    """Write a file for `torch.load(path, weights_only=True)`, with or without `mmap=True`.

    Args:
        content: plain values, mappings, sequences, tensors, and `Streamed` for large tensors.

    Raises:
        OSError: the file exists or cannot be written.
        ValueError: a tensor has none of `LOADABLE_DTYPES`. No file is created.

    Source: PyTorch's notes on serialization; PKWARE, APPNOTE.TXT.
    """
    # Pickling first collects the tensors. Their bytes are read while their records are written.
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
                _write_record(archive, file.tell(), name, len(text), [memoryview(text)])
            for number, tensor in pickler.storages.values():
                nbytes = tensor.numel * tensor.dtype.itemsize
                _write_record(archive, file.tell(), f"data/{number}", nbytes, tensor.blocks())
            _write_record(archive, file.tell(), "version", 2, [memoryview(b"3\n")])
        file.flush()
        os.fsync(file.fileno())  # the caller renames the file: its content must be on disk first


def _write_record(
    archive: ZipFile, start: int, name: str, nbytes: int, blocks: Iterable[memoryview]
) -> None:
    """Write one record. Its header starts at byte `start`; its data is aligned to 64 bytes."""
    is_large = nbytes >= _LARGE_NBYTES
    record = ZipInfo(f"{_FOLDER}/{name}")
    record.CRC = 0  # FileHeader needs a value; zipfile writes the real one after the data
    header_nbytes = len(record.FileHeader(is_large)) + _FIELD.size
    # The extra field follows the record's name, so its length moves the data that comes after it.
    padding = -(start + header_nbytes) % _ALIGNMENT_NBYTES
    record.extra = _FIELD.pack(_PADDING_ID, padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=is_large) as out:
        for block in blocks:
            out.write(block)


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch.save does: a persistent id for the storage, and a view of it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PICKLE_PROTOCOL)
        self.storages: dict[str, _Storage] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = _in_memory(obj)
        if not isinstance(obj, Streamed):
            return NotImplemented
        if obj.dtype not in LOADABLE_DTYPES:
            raise ValueError(f"a file for torch.load cannot hold tensors of {obj.dtype}")
        # Tensors with one key get one storage, so tied weights are written once.
        storage = self.storages.setdefault(obj.key, _Storage(len(self.storages), obj))
        hooks: OrderedDict[int, Any] = OrderedDict()
        view = (storage, 0, obj.shape, obj.strides, False, hooks)
        if obj.dtype in _UNTYPED:
            return rebuild_untyped_tensor, (*view, obj.dtype)
        return rebuild_tensor, view

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        kind, size = _STORAGES.get(tensor.dtype, torch.UntypedStorage), tensor.numel
        if tensor.dtype in _UNTYPED:  # the size in bytes
            size *= tensor.dtype.itemsize
        return "storage", kind, str(obj.number), "cpu", size


class _Storage(NamedTuple):
    number: int
    tensor: Streamed


def _in_memory(tensor: torch.Tensor) -> Streamed:
    """Return a host tensor as a `Streamed`."""
    whole = tensor.contiguous()
    data = as_bytes(whole.view(-1))
    # The id stays unique: the pickler's memo keeps the tensor alive.
    return Streamed(
        f"in memory at {id(tensor)}",
        tensor.dtype,
        tuple(tensor.shape),
        whole.stride(),
        lambda: [data],
    )
