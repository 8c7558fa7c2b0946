"""Compares our files for torch.load with those of torch.save, record by record."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_adam.checkpoint import torch_file
from offload_adam.checkpoint.rank_file import as_bytes
from offload_adam.checkpoint.torch_file import LOADABLE_DTYPES, Streamed, write_torch_file
from offload_adam.dtypes import DTYPES, equal_bits


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2, 3, 5, 7, generator=generator)
    return {
        "fp32": real,
        "channels_last": real.clone(memory_format=torch.channels_last),
        "bf16": real.bfloat16(),
        "fp16": real.half(),
        "fp64": real.double(),
        "int64": (real * 99).long(),
        "int32": (real * 99).int(),
        "uint8": (real * 9).to(torch.uint8),
        "bool": real > 0,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        **{str(dtype): of_dtype(dtype) for dtype in sorted(LOADABLE_DTYPES, key=str)},
    }


def of_dtype(dtype: torch.dtype) -> torch.Tensor:
    content = torch.arange(96, dtype=torch.uint8)
    return (content % 2 if dtype is torch.bool else content).view(dtype).view(2, -1)


def content_of(make: Callable[[str, torch.Tensor], Any]) -> dict[str, Any]:
    """Return an object with tensors or `Streamed` ones in it; one of them is in it twice."""
    made = {name: make(name, tensor) for name, tensor in tensors().items()}
    return {
        "model": {**made, "tied": made["bf16"]},
        "groups": [{"betas": (0.9, 0.999), "names": ["a", "b"], "foreach": None, "on": True}],
        "state": {0: {"step": make("step", torch.tensor(7.0))}},
        "step": 5,
        "word": "ü",
    }


def streamed(name: str, tensor: torch.Tensor) -> Streamed:
    """Return a `Streamed` for a tensor, with several blocks."""
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim])
    flat = tensor.permute(order).reshape(-1)
    pieces = [as_bytes(piece) for piece in flat.split(64)]
    return Streamed(name, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), lambda: pieces)


def records(path: Path) -> dict[str, bytes]:
    """Return the records of a file by name. zipfile verifies their checksums."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def assert_is_what_was_saved(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert equal_bits(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_is_what_was_saved(found[key], value)
    else:
        assert found == expected


def test_every_record_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    write_torch_file(tmp_path / "ours.pt", content_of(streamed))
    torch.save(content_of(lambda _, tensor: tensor), tmp_path / "torchs.pt")
    expected = records(tmp_path / "torchs.pt")
    del expected[".data/serialization_id"]  # a hash that only identifies the file
    assert records(tmp_path / "ours.pt") == expected


@pytest.mark.parametrize("large_nbytes", [2**30, 100])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_nbytes: int, mmap: bool
) -> None:
    """Records have 64-bit lengths from 1 GiB on; in one case here from 100 bytes on."""
    monkeypatch.setattr(torch_file, "_LARGE_NBYTES", large_nbytes)
    path = tmp_path / "t.pt"
    write_torch_file(path, content_of(streamed))
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert_is_what_was_saved(found, content_of(lambda _, tensor: tensor))
    assert found["model"]["tied"].data_ptr() == found["model"]["bf16"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        needed = {info.extract_version for info in archive.infolist() if info.file_size >= 100}
    assert needed == {45 if large_nbytes == 100 else 20}
    reader: Any = torch._C.PyTorchFileReader(str(path))
    offsets = [reader.get_record_offset(name) for name in reader.get_all_records()]
    assert [offset % 64 for offset in offsets] == [0] * len(offsets)


def test_a_dtype_that_torch_cannot_save_is_rejected(tmp_path: Path) -> None:
    others = {*DTYPES.values()} - LOADABLE_DTYPES
    assert DTYPES["int4"] in others
    for dtype in others:
        tensor = of_dtype(dtype)
        with pytest.raises(ValueError, match=f"cannot hold tensors of {dtype}"):
            write_torch_file(tmp_path / "t.pt", {"a": tensor})
        with pytest.raises(KeyError, match="is not recognized"):
            torch.save(tensor, tmp_path / "torchs.pt")
    assert not (tmp_path / "t.pt").exists()


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        write_torch_file(tmp_path / "t.pt", {})
    assert (tmp_path / "t.pt").read_bytes() == b"kept"


def test_lengths_are_those_of_the_tensors() -> None:
    for name, tensor in tensors().items():
        found = streamed(name, tensor)
        assert sum(len(block) for block in found.blocks()) == tensor.nbytes
        assert found.numel == tensor.numel()
