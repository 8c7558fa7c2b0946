"""Boxes, files and manifests: each invalid one is a clean error."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from offload_adam.checkpoint.format import (
    BLOCK_NBYTES,
    FORMAT_VERSION,
    FileEntry,
    GroupEntry,
    Manifest,
    OptimizerEntry,
    Piece,
    RankEntry,
    TensorEntry,
    parse_manifest,
    read_manifest,
    sealed,
)
from offload_adam.checkpoint.rank_file import Part, RankFile
from offload_adam.checkpoint.reader import VerifiedFile
from offload_adam.errors import CheckpointError
from offload_adam.printable import MAX_MESSAGE_LENGTH
from offload_adam.state.boxes import Box, boxes_of_range, range_of_box

shapes = st.lists(st.integers(1, 5), max_size=4)


@settings(max_examples=300)
@given(shapes, st.data())
def test_boxes_are_few_contiguous_and_cover_the_range_once(
    shape: list[int], data: st.DataObject
) -> None:
    numel = prod(shape)
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    boxes = boxes_of_range(shape, start, end)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    tensor = np.arange(numel).reshape(shape)
    found: list[int] = []
    for box in boxes:
        part = tensor[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].reshape(-1)
        assert range_of_box(shape, box) == (part[0], part[-1] + 1)
        found += part.tolist()
    assert found == list(range(start, end))


@pytest.mark.parametrize(("offsets", "sizes"), [((0, 0), (5, 4)), ((0, 3), (1, 2)), ((0,), (1,))])
def test_a_box_outside_of_the_tensor_is_rejected(
    offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="Box"):
        range_of_box((4, 4), Box(offsets, sizes))


@pytest.mark.parametrize(
    ("offsets", "sizes", "expected"),
    [
        ((0, 1), (2, 2), None),
        ((0, 0), (2, 3), None),
        ((1, 1), (1, 2), (5, 7)),
        ((1, 0), (2, 4), (4, 12)),
        ((1, 1), (3, 0), (5, 5)),
    ],
)
def test_a_box_whose_elements_are_not_contiguous_is_no_range(
    offsets: tuple[int, ...], sizes: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    assert range_of_box((4, 4), Box(offsets, sizes)) == expected


def part_of(name: str, count: int) -> Part:
    """Return `count` random bytes."""
    content = torch.from_numpy(np.random.default_rng(count).integers(0, 256, count, np.uint8))
    return Part(name, (count,), (0,), boxes_of_range([count], 0, count), content)


def content_of(part: Part) -> bytes:
    assert isinstance(part.data, torch.Tensor)
    return part.data.numpy().tobytes()


def write_file(path: Path, parts: list[Part]) -> RankEntry:
    file = RankFile(path.parent, path.name, parts)
    file.write(parts)
    return file.finish()


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, RankEntry, list[Part]]:
    parts = [
        part_of("a", 3),
        part_of("b", BLOCK_NBYTES + 77),
        part_of("empty", 0),
        part_of("c", 1000),
    ]
    return tmp_path, write_file(tmp_path / "rank.safetensors", parts), parts


def test_any_range_of_a_written_file_is_read_back(
    written: tuple[Path, RankEntry, list[Part]],
) -> None:
    folder, entry, parts = written
    with closing(VerifiedFile(folder, "rank.safetensors", entry.file)) as file:
        file.verify()
        assert entry.tensors["empty"].pieces == []
        for part in (part for part in parts if part.name != "empty"):
            content = content_of(part)
            (piece,) = entry.tensors[part.name].pieces
            for low, high in ((0, len(content)), (1, 2), (len(content) // 2, len(content))):
                target = bytearray(max(0, min(high, len(content)) - low))
                file.read_into(memoryview(target), piece.start + low)
                assert bytes(target) == content[low : low + len(target)]


def test_the_file_is_safetensors(
    written: tuple[Path, RankEntry, list[Part]],
) -> None:
    safetensors = pytest.importorskip("safetensors")
    folder, _, parts = written
    with safetensors.safe_open(folder / "rank.safetensors", "numpy") as file:
        assert set(file.keys()) == {"a@0", "b@0", "c@0"}
        for part in (part for part in parts if part.name != "empty"):
            assert file.get_tensor(f"{part.name}@0").tobytes() == content_of(part)


@pytest.mark.parametrize("length", range(1, 9))
def test_the_data_begins_at_a_multiple_of_eight_bytes(tmp_path: Path, length: int) -> None:
    write_file(tmp_path / "f", [part_of("x" * length, 10)])
    content = (tmp_path / "f").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert json.loads(content[8:-10]).keys() == {"x" * length + "@0"}


def test_a_channels_last_weight_has_its_channels_in_the_last_dimension(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    weight = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    in_memory = weight.permute(0, 2, 3, 1)
    assert in_memory.is_contiguous()
    # All but the first "row" of channels, so that there are several boxes.
    boxes = boxes_of_range(in_memory.shape, 3, weight.numel())
    part = Part("w", (2, 3, 4, 5), (0, 2, 3, 1), boxes, in_memory.flatten()[3:])
    write_file(tmp_path / "f", [part])
    found = torch.zeros(2, 4, 5, 3)
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            box = file.get_tensor(name)
            starts = map(int, name.partition("@")[2].split(","))
            place = [slice(at, at + size) for at, size in zip(starts, box.shape, strict=True)]
            found[tuple(place)] = box
    expected = in_memory.clone()
    expected[0, 0, 0] = 0.0
    assert torch.equal(found, expected)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"x")
    elif how == "flipped":
        content[BLOCK_NBYTES + 9] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        target = path.rename(path.with_name("elsewhere"))
        path.symlink_to(target)


@pytest.mark.parametrize("how", ["truncated", "longer", "flipped", "missing", "a link", "a pipe"])
def test_a_damaged_file_is_rejected(written: tuple[Path, RankEntry, list[Part]], how: str) -> None:
    folder, entry, _ = written
    damage(folder / "rank.safetensors", how)
    with (
        pytest.raises(CheckpointError, match=r"rank\.safetensors"),
        closing(VerifiedFile(folder, "rank.safetensors", entry.file)) as file,
    ):
        file.verify()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from offload_adam.checkpoint.rank_file import Part, RankFile
from offload_adam.state.boxes import Box

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    count = 3 * 2**19
    zeros = torch.zeros(count, dtype=torch.uint8)
    part = Part("a", (count,), (0,), [Box((0,), (count,))], zeros)
    RankFile(Path(sys.argv[1]), "f", [part]).write([part])
except OSError as error:
    sys.exit(error.errno)
"""


def test_a_disk_that_fills_up_is_an_error(tmp_path: Path) -> None:
    """Just before the disk is full, a write succeeds with only a part of its bytes."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    assert subprocess.run(command, timeout=100, check=False).returncode == errno.EFBIG


def test_a_file_that_loses_bytes_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    part = part_of("a", 1000)
    file = RankFile(tmp_path, "f", [part])
    file.write([part])
    os.truncate(tmp_path / "f", 900)
    with pytest.raises(OSError, match=r"the file has 900 bytes after 1,\d+ were written"):
        file.finish()
    file.close()


def test_nothing_is_read_past_the_end(tmp_path: Path) -> None:
    entry = write_file(tmp_path / "f", [Part("a", (0, 3), (0, 1), [], torch.zeros(0))]).file
    with closing(VerifiedFile(tmp_path, "f", entry)) as file:
        file.read_into(memoryview(bytearray(1)), entry.nbytes - 1)
        with pytest.raises(CheckpointError, match="has no bytes"):
            file.read_into(memoryview(bytearray(2)), entry.nbytes - 1)


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        RankFile(tmp_path, "f", [])
    assert (tmp_path / "f").read_bytes() == b"kept"


def manifest(**changes: Any) -> dict[str, Any]:
    pieces = [
        Piece(offsets=[0, 0], sizes=[1, 3], file="r0", start=100),
        Piece(offsets=[1, 0], sizes=[1, 2], file="r0", start=112),
        Piece(offsets=[1, 2], sizes=[1, 1], file="r1", start=0),
    ]
    tensor = TensorEntry(dtype="F32", shape=[2, 3], order=[0, 1], pieces=pieces)
    values = Manifest(
        format_version=FORMAT_VERSION,
        step=5,
        world_size=2,
        tensors={"w": tensor},
        files={
            "r0": FileEntry(nbytes=120, checksums=[1]),
            "r1": FileEntry(nbytes=4, checksums=[2]),
        },
        optimizer=OptimizerEntry(
            groups=[GroupEntry(parameters=["w"], options={"lr": 0.5})], steps={"w": 3.0}, further={}
        ),
        tied={"u": "w"},
        extra={"a": [1, None]},
    ).model_dump(mode="json")
    for path, value in changes.items():
        at: Any = values
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("__")]
        for key in keys:
            at = at[key]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return values


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    text = sealed(manifest())
    assert sealed(parse_manifest(text, "m").model_dump()) == text


@pytest.mark.parametrize(
    ("old", "new"), [('"start": 112', '"start": 113'), ('"step": 5', '"step": 7')]
)
def test_a_changed_digit_of_a_manifest_is_seen(old: str, new: str) -> None:
    text = sealed(manifest())
    assert old in text
    with pytest.raises(CheckpointError, match="m is damaged"):
        parse_manifest(text.replace(old, new), "m")
    with pytest.raises(CheckpointError, match="duplicate key"):
        parse_manifest(text.replace('"step": 5', '"step": 5, "step": 5'), "m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 4}, "format version 4.*or a newer one"),
        ({"format_version": 1}, "format version 1, .*Use the version that wrote it\\.$"),
        ({"format_version": ...}, "format_version"),
        ({"step": -1}, "step"),
        ({"surprise": 1}, "surprise"),
        ({"tied__u": "v"}, "another name of 'v', which is not a saved"),
        ({"tied__w": "w"}, "another name of 'w', but is itself"),
        ({"optimizer__steps__w": -1}, "steps"),
        ({"optimizer__groups__0__parameters": "w"}, "parameters"),
        ({"tensors__w__pieces__2": ...}, "element"),
        ({"tensors__w__pieces__1": ...}, "elements 3 to 4 are missing"),
        ({"tensors__w__pieces__1__offsets": [0, 0]}, "element 0 is in two pieces"),
        ({"tensors__w__pieces__1__sizes": [1, 3]}, "exceeds the end of r0"),
        (
            {"tensors__w__pieces__1__sizes": [2, 2]},
            r"tensor of \[2, 3\]\. Load another checkpoint\.$",
        ),
        ({"tensors__w__pieces__0__start": 10**12}, "exceeds"),
        ({"tensors__w__pieces__0__start": 10**30}, "less than 9223372036854775808"),
        ({"optimizer__steps__w": 1.5}, "steps.*multiple of 1"),
        ({"tensors__w__shape": [1] * 65}, "shape: List should have at most 64 items"),
        ({"tensors__w__shape": [2**70, 0]}, "less than 9223372036854775808"),
        (
            {"tensors__w__shape": [2**62, 2**62, 0], "tensors__w__order": [0, 1, 2]},
            "no memory can hold a tensor of",
        ),
        (
            {
                "tensors__x": {
                    "dtype": "U8",
                    "shape": [101],
                    "order": [0],
                    "pieces": [{"offsets": [0], "sizes": [101], "file": "r0", "start": 0}],
                }
            },
            "'x': it shares bytes of r0 with other tensors",
        ),
        (
            {"optimizer__further": {"$type": "tuple", "items": []}},
            r"options of the optimizer must be dicts, not \(\)",
        ),
        (
            {"optimizer__groups__0__options": {"$type": "bytes", "data": "AA=="}},
            r"options of the optimizer must be dicts, not b'\\x00'",
        ),
        ({"tensors__w__pieces__0__file": "r9"}, "is not a file of the checkpoint"),
        ({"tensors__w__pieces__0__file": "../r0"}, "is not a file of the checkpoint"),
        ({"tensors__w__dtype": "F128"}, "unknown dtype"),
        ({"tensors__w__order": [0, 0]}, r"\[0, 0\] is not a permutation of 2 dimensions"),
        ({"tensors__w__shape": [2, 10**12]}, "missing"),
        ({"files__r0__nbytes": 10**15}, "needs 238418580 checksum.*, but has 1"),
        ({"files__r0__checksums": []}, "needs 1 checksum.*, but has 0"),
        ({"files": {"../r0": {"nbytes": 0, "checksums": []}}}, "is not a plain file name"),
        ({"files": {"/etc/passwd": {"nbytes": 0, "checksums": []}}}, "is not a plain file name"),
        ({"files": {"..": {"nbytes": 0, "checksums": []}}}, "is not a plain file name"),
        ({"files": {"a/b": {"nbytes": 0, "checksums": []}}}, "is not a plain file name"),
        ({"files": {"manifest.json": {"nbytes": 0, "checksums": []}}}, "is not a plain file name"),
    ],
    ids=str,
)
def test_an_invalid_manifest_is_rejected(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse_manifest(sealed(manifest(**changes)), "m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += places(inner, (*path, key))
    return found


@settings(max_examples=300)
@given(st.data())
def test_any_manifest_is_read_or_rejected(data: st.DataObject) -> None:
    """Replaces any part of a manifest: the result is a manifest or a CheckpointError."""
    values: Any = manifest()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(values)))
        replacement = data.draw(JSON)
        if not path:
            values = replacement
            continue
        at = values
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = replacement
    try:
        text = sealed(values) if isinstance(values, dict) else json.dumps(values)
        found = parse_manifest(text, "m")
    except CheckpointError:
        return
    assert all(os.sep not in name and name not in ("", ".", "..") for name in found.files)


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_any_bytes_are_rejected(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(content, "m")


def test_a_manifest_of_many_dimensions_or_bytes_is_rejected_at_once(tmp_path: Path) -> None:
    values = manifest()
    values["tensors"]["w"] |= {"shape": [1] * 20_000, "order": list(range(20_000))}
    text = sealed(values)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="at most 64 items"):
        parse_manifest(text, "m")
    assert time.monotonic() - began < 5
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(CheckpointError, match="has more than 268,435,456 bytes"):
        read_manifest(tmp_path)


def test_a_link_in_place_of_a_manifest_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "m").write_text(sealed(manifest()))
    (tmp_path / "manifest.json").symlink_to(tmp_path / "real" / "m")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_manifest(tmp_path)


def test_a_name_that_no_file_can_have_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: File name too long"):
        read_manifest(tmp_path / ("x" * 300))


def test_a_message_about_a_manifest_is_printable_and_short() -> None:
    name = "\x1b[2J" * 200_000
    values = manifest()
    values["tensors"][name] = values["tensors"].pop("w") | {"dtype": name}
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(sealed(values), "m")
    assert len(str(caught.value)) <= MAX_MESSAGE_LENGTH
    assert str(caught.value).isprintable()


def test_of_many_invalid_items_only_the_first_is_reported() -> None:
    """Pydantic keeps a kilobyte for each error."""
    cases: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (FileEntry, {"nbytes": 1, "checksums": [-1] * 1000}),
        (GroupEntry, {"parameters": [1] * 1000, "options": {}}),
        (TensorEntry, {"dtype": "F32", "shape": [], "order": [], "pieces": [1] * 1000}),
    ]
    for kind, values in cases:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(values)
        assert caught.value.error_count() == 1
