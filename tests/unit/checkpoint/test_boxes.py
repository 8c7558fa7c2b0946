"""Boxes of sharded tensors: where they are, whether they tile a tensor, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from offload_adam.checkpoint.format import (
    FORMAT_VERSION,
    Manifest,
    OptimizerEntry,
    Piece,
    RankEntry,
    TensorEntry,
    parse_manifest,
    sealed,
)
from offload_adam.checkpoint.rank_file import Part, RankFile
from offload_adam.checkpoint.reader import CheckpointReader, VerifiedFile
from offload_adam.checkpoint.save import manifest_of
from offload_adam.encoding import encode
from offload_adam.errors import CheckpointError
from offload_adam.state.boxes import (
    MAX_CUT_DIMS,
    Box,
    boxes_of_part,
    find_fault,
    memory_order,
)

EMPTY = OptimizerEntry(groups=[], steps={}, further={})


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one of several ranks that do not communicate."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


PLACEMENTS: list[tuple[tuple[int, ...], list[Any]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((4,), [_StridedShard(0, split_factor=3)]),  # rows that are not next to each other
    ((4,), [_StridedShard(1, split_factor=2)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), [_StridedShard(1, split_factor=2), Replicate()]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(2)]),
    ((2, 2), [Replicate(), Replicate()]),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), PLACEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(7, 10, 3), (2, 5, 4)])
def test_boxes_have_the_elements_of_torchs_parts(
    mesh_shape: tuple[int, ...], placements: list[Any], shape: tuple[int, ...]
) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    every: dict[tuple[int, ...], Box] = {}
    for rank in range(4):
        with fake_rank(rank, 4):
            mesh = init_device_mesh("cpu", mesh_shape)
            tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            local = tensor.to_local()
            order = memory_order(local)
            boxes = boxes_of_part(tensor, order, 0, local.numel())
            every |= {box.offsets: box for box in boxes}
            found = [whole[box.slices()].flatten() for box in boxes]
            assert torch.cat([whole.new_empty(0), *found]).equal(local.flatten())
            # A part of the part, as if replicas divided it.
            start, end = local.numel() // 3, local.numel() * 3 // 4
            found = [
                whole[box.slices()].flatten() for box in boxes_of_part(tensor, order, start, end)
            ]
            assert torch.cat([whole.new_empty(0), *found]).equal(local.flatten()[start:end])
    assert find_fault(shape, list(every.values())) is None


def split(draw: Any, box: Box, depth: int) -> list[Box]:
    """Cut a box at random, and its halves again."""
    dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
    if depth == 0 or not dims:
        return [box]
    dim = draw(st.sampled_from(dims))
    cut = draw(st.integers(1, box.sizes[dim] - 1))
    low, high = list(box.sizes), list(box.sizes)
    low[dim], high[dim] = cut, box.sizes[dim] - cut
    second = list(box.offsets)
    second[dim] += cut
    halves = (Box(box.offsets, tuple(low)), Box(tuple(second), tuple(high)))
    return [part for half in halves for part in split(draw, half, depth - 1)]


def random_tiling(draw: Any, shape: tuple[int, ...], depth: int = 4) -> list[Box]:
    boxes = split(draw, Box((0,) * len(shape), shape), depth)
    return list(draw(st.permutations(boxes)))


def random_box(draw: Any, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(
        draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)
    )
    return Box(offsets, sizes)


shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@settings(max_examples=300)
@given(shapes, st.data())
def test_a_fault_is_found_where_counting_finds_it(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    boxes = random_tiling(data.draw, shape)
    assert find_fault(shape, boxes) is None
    if data.draw(st.booleans()):
        boxes.pop()
    boxes += [random_box(data.draw, shape) for _ in range(data.draw(st.integers(0, 2)))]
    counts = np.zeros(shape, dtype=np.int64)
    for box in boxes:
        counts[box.slices()] += 1
    wrong = np.argwhere(counts != 1)
    expected = (tuple(wrong[0]), counts[tuple(wrong[0])]) if len(wrong) else None
    assert find_fault(shape, boxes) == expected


def columns(**changes: Any) -> dict[str, Any]:
    """Return a manifest of a tensor of two rows, whose pieces are its columns."""
    pieces = [
        Piece(offsets=[0, column], sizes=[2, 1], file="f", start=8 * column) for column in range(3)
    ]
    values = plain_manifest(1).model_dump(mode="json")
    tensor = TensorEntry(dtype="F32", shape=[2, 3], order=[0, 1], pieces=pieces)
    values["tensors"] = {"w": tensor.model_dump(mode="json")}
    values["files"] = {"f": {"nbytes": 24, "checksums": [1]}}
    values["tensors"]["w"] |= changes
    return values


def box(offsets: list[int], sizes: list[int]) -> dict[str, Any]:
    return {"offsets": offsets, "sizes": sizes, "file": "f", "start": 0}


FIRST, SECOND, THIRD = (box([0, column], [2, 1]) for column in range(3))
NUM_DIMS = MAX_CUT_DIMS + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pieces": [FIRST, THIRD]}, r"element \[0, 1\] in memory order is missing"),
        ({"pieces": [SECOND, THIRD]}, r"element \[0, 0\] in memory order is missing"),
        ({"pieces": [FIRST, SECOND, SECOND, THIRD]}, r"element \[0, 1\].* is in 2 pieces"),
        # As many elements as the tensor has.
        ({"pieces": [FIRST, FIRST, THIRD]}, r"element \[0, 0\].* is in 2 pieces"),
        ({"pieces": [FIRST, SECOND, box([1, 2], [2, 1])]}, r"exceeds a tensor of \[2, 3\]"),
        ({"pieces": [FIRST, SECOND, box([0, 2], [2, 2])]}, r"exceeds a tensor of \[2, 3\]"),
        ({"pieces": [FIRST, SECOND, {**THIRD, "start": 20}]}, "exceeds the end of f"),
        ({"pieces": [FIRST, SECOND, box([0], [2])]}, "number of dimensions"),
        (
            {
                "shape": [2] * NUM_DIMS,
                "order": list(range(NUM_DIMS)),
                "pieces": [
                    box([0] * NUM_DIMS, [1] * NUM_DIMS),
                    box([1] + [0] * (NUM_DIMS - 1), [1] * (NUM_DIMS - 1) + [2]),
                    box([0] * NUM_DIMS, [2] + [1] * (NUM_DIMS - 1)),
                ],
            },
            f"its pieces divide {NUM_DIMS} dimensions, more than {MAX_CUT_DIMS}",
        ),
    ],
    ids=str,
)
def test_pieces_that_do_not_tile_a_tensor_are_rejected(changes: dict[str, Any], words: str) -> None:
    parse_manifest(sealed(columns()), "m")
    with pytest.raises(CheckpointError, match=words):
        parse_manifest(sealed(columns(**changes)), "m")


def plain_manifest(world_size: int) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        step=0,
        world_size=world_size,
        tensors={},
        files={},
        optimizer=EMPTY,
        tied={},
        extra=encode({}, "extra"),
    )


def written(folder: Path, parts: list[Part]) -> list[RankEntry]:
    """Write each part into a file of its own."""
    entries = []
    for number, part in enumerate(parts):
        file = RankFile(folder, f"f{number}", [part])
        file.write([part])
        entries.append(file.finish())
    return entries


def open_files(folder: Path, entries: list[RankEntry]) -> CheckpointReader:
    manifest = manifest_of(entries, plain_manifest(len(entries)))
    parse_manifest(sealed(manifest.model_dump(mode="json")), "m")
    return CheckpointReader(folder, manifest)


def write(
    folder: Path, tensor: torch.Tensor, order: tuple[int, ...], files: list[list[Box]]
) -> CheckpointReader:
    """Write boxes of a tensor, whose dimensions are in memory order, into some files."""
    in_memory = tensor.permute(order)
    parts = []
    for boxes in files:
        values = [in_memory[box.slices()].flatten() for box in boxes]
        data = torch.cat([tensor.new_empty(0), *values])
        parts.append(Part("w", tuple(tensor.shape), order, boxes, data))
    return open_files(folder, written(folder, parts))


@settings(max_examples=150, deadline=None)
@given(shapes, st.data())
def test_any_box_is_read_from_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], data: st.DataObject
) -> None:
    tensor = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    boxes = random_tiling(data.draw, tuple(shape[dim] for dim in order))
    half = len(boxes) // 2
    folder = tmp_path_factory.mktemp("boxes")
    reader = write(folder, tensor, order, [boxes[:half], boxes[half:]])
    wanted = random_box(data.draw, shape)
    assert reader.box("w", wanted).equal(tensor[wanted.slices()])
    assert reader.whole("w").equal(tensor)
    content = b"".join(bytes(block) for block in reader.blocks("w"))
    assert content == tensor.permute(order).contiguous().numpy().tobytes()
    # Several boxes at once, as of a part whose indices are not next to each other.
    several = random_tiling(data.draw, tuple(shape[dim] for dim in order), depth=2)[:3]
    target = torch.empty(sum(box.numel for box in several))
    reader.read(reader.reads("w", several, target))
    in_memory = tensor.permute(order)
    assert target.equal(torch.cat([in_memory[box.slices()].flatten() for box in several]))
    reader.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the lengths of the reads of files."""
    found: list[int] = []
    read_into = VerifiedFile.read_into

    def counted(file: VerifiedFile, target: memoryview, start: int) -> None:
        found.append(len(target))
        read_into(file, target, start)

    monkeypatch.setattr(VerifiedFile, "read_into", counted)
    return found


def test_columns_are_read_in_few_large_reads(tmp_path: Path, reads: list[int]) -> None:
    tensor = torch.arange(2000 * 800, dtype=torch.int32).view(2000, 800)
    boxes = [Box((0, start), (2000, 200)) for start in range(0, 800, 200)]
    reader = write(tmp_path, tensor, (0, 1), [boxes[:2], boxes[2:]])
    assert reader.whole("w").equal(tensor)
    assert len(reads) == 4
    reads.clear()
    # The same columns need no copy, and others are in two pieces.
    assert reader.box("w", boxes[1]).equal(tensor[:, 200:400])
    assert reads == [2000 * 200 * 4]
    reads.clear()
    assert reader.box("w", Box((0, 300), (2000, 200))).equal(tensor[:, 300:500])
    assert len(reads) == 2
    reader.close()


def test_rows_longer_than_a_block_are_read_without_gaps(tmp_path: Path, reads: list[int]) -> None:
    tensor = torch.arange(3 * 2_300_000, dtype=torch.int32).view(3, 2_300_000)
    boxes = [Box((0, 0), (3, 1_500_000)), Box((0, 1_500_000), (3, 800_000))]
    reader = write(tmp_path, tensor, (0, 1), [boxes])
    for wanted in (Box((0, 7), (3, 2_000_000)), Box((1, 0), (2, 2_300_000))):
        reads.clear()
        assert reader.box("w", wanted).equal(tensor[wanted.slices()])
        assert sum(reads) == 4 * wanted.numel
    assert reader.whole("w").equal(tensor)
    blocks = b"".join(bytes(block) for block in reader.blocks("w"))
    assert blocks == tensor.numpy().tobytes()
    reader.close()


def test_ranks_may_see_a_dimension_of_one_index_in_another_place(tmp_path: Path) -> None:
    """A local part with one channel has the same memory as channels_last and as contiguous."""
    shape = (2, 3, 2, 2)
    tensor = torch.arange(24).view(shape)
    two_channels = tensor[:, :2].permute(0, 2, 3, 1).flatten()
    parts = [
        Part("w", shape, (0, 2, 3, 1), [Box((0, 0, 0, 0), (2, 2, 2, 2))], two_channels),
        Part("w", shape, (0, 1, 2, 3), [Box((0, 2, 0, 0), (2, 1, 2, 2))], tensor[:, 2:].flatten()),
    ]
    entries = written(tmp_path, parts)
    reader = open_files(tmp_path, entries)
    assert reader.whole("w").equal(tensor)
    reader.close()
    entries[1].tensors["w"].pieces[0].sizes[1] = 2
    with pytest.raises(CheckpointError, match="in another order in memory on some ranks"):
        manifest_of(entries, plain_manifest(2))
