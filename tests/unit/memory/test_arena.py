"""The arena: where its parts lie, who commits them, what is pinned, and how that ends."""

from __future__ import annotations

import gc
from itertools import pairwise, permutations

import pytest
import torch

from offload_adam.kernels import threads
from offload_adam.kernels.first_touch import touch
from offload_adam.layout.budget import ALIGNMENT_NBYTES
from offload_adam.memory.arena import (
    HostArena,
    arena_nbytes,
    padded_nbytes,
)
from offload_adam.memory.pinning import PinError
from tests.support.cuda_runtime import StandInRuntime

PIECE = 3 * 4096


def test_what_is_taken_lies_in_one_piece_and_nothing_is_lost_below_one() -> None:
    parts = [4096 * 2, 128, 4096 * 2, 0, 100, 4096]
    assert arena_nbytes(parts) == 4096 * 5 + 128 + 128
    assert arena_nbytes(parts, PIECE) == 2 * PIECE + 4096
    arena = HostArena(arena_nbytes(parts, PIECE), piece_nbytes=PIECE)
    taken = [arena.allocate(nbytes, torch.uint8) for nbytes in parts if nbytes]
    base = taken[0].data_ptr()
    places = [(t.data_ptr() - base, t.data_ptr() - base + t.nbytes) for t in taken]
    for (_, end), (start, _) in pairwise(places):
        assert end <= start
    for start, end in places:
        assert start % ALIGNMENT_NBYTES == 0
        assert start // PIECE == (end - 1) // PIECE
    with pytest.raises(AssertionError, match="asked for"):
        arena.allocate(1, torch.uint8)


def test_pinned_are_exactly_the_bytes_of_the_arena_in_pieces() -> None:
    runtime = StandInRuntime()
    arena = HostArena(2 * PIECE + 100, piece_nbytes=PIECE)
    taken = arena.allocate(10, torch.float32)
    assert arena.pinned_nbytes == 0
    arena.pin(runtime)
    arena.pin(runtime)
    start = taken.data_ptr()
    assert runtime.registered == {start: PIECE, start + PIECE: PIECE, start + 2 * PIECE: 100}
    assert arena.pinned_nbytes == runtime.nbytes == arena.nbytes
    arena.close()
    arena.close()
    assert runtime.registered == {}
    assert arena.pinned_nbytes == 0
    assert not runtime.has_error
    assert runtime.calls[3:] == ["finish_copies", *["unregister"] * 3]
    taken.fill_(1.0)  # a tensor keeps its bytes
    assert float(taken.sum()) == 10.0


@pytest.mark.parametrize("granted", [0, 1, 2])
def test_a_refusal_at_any_piece_unpins_the_rest_and_leaves_no_error(granted: int) -> None:
    runtime = StandInRuntime(refuse_after=granted)
    arena = HostArena(2 * PIECE + 100, piece_nbytes=PIECE)
    with pytest.raises(PinError) as refusal:
        arena.pin(runtime)
    assert f"error 2; piece {granted + 1} of 3" in str(refusal.value)
    assert "ulimit -l" in str(refusal.value)
    assert runtime.registered == {}
    assert not runtime.has_error
    assert arena.pinned_nbytes == 0
    assert float(arena.allocate(4, torch.float32).sum()) == 0.0
    arena.close()
    assert runtime.calls.count("unregister") == granted


def test_a_refusal_is_told_with_what_happens_instead() -> None:
    runtime = StandInRuntime(refuse_after=0)
    with pytest.warns(
        RuntimeWarning, match=r"did not pin 100 B .*error 2.*\. It is slow"
    ) as caught:
        HostArena(100).pin_or_warn(runtime, "It is slow")
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("order", list(permutations(["arena", "tensor", "close"])), ids=str)
def test_it_ends_in_any_order_once(order: tuple[str, ...]) -> None:
    runtime = StandInRuntime()
    held: dict[str, object] = {"arena": HostArena(4096)}
    arena = held["arena"]
    assert isinstance(arena, HostArena)
    held["tensor"] = arena.allocate(8, torch.float32)
    arena.pin(runtime)
    held["close"] = arena.close
    del arena
    for name in order:
        last = held.pop(name)
        if name == "close":
            assert callable(last)
            last()
        del last
        gc.collect()
    assert runtime.registered == {}
    assert runtime.calls.count("unregister") == 1


def test_it_is_unpinned_before_it_is_unmapped_also_in_a_cycle() -> None:
    runtime = StandInRuntime()
    arena = HostArena(4096)
    tensor = arena.allocate(8, torch.float32)
    arena.pin(runtime)
    tensor.arena = arena  # type: ignore[attr-defined]
    arena.tensor = tensor  # type: ignore[attr-defined]
    del arena, tensor
    gc.collect()
    assert runtime.registered == {}


def test_each_part_is_committed_by_what_is_told_to() -> None:
    parts = [padded_nbytes(100, torch.float32), padded_nbytes(50, torch.bfloat16)]
    touched: list[tuple[int, int]] = []
    arena = HostArena(
        arena_nbytes(parts),
        parts=parts,
        touch=lambda memory: touched.append((memory.data_ptr(), memory.nbytes)),
    )
    first, second = arena.allocate(100, torch.float32), arena.allocate(50, torch.bfloat16)
    assert touched == [(first.data_ptr(), parts[0]), (second.data_ptr(), parts[1])]


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 10 * 4096 + 1])
@pytest.mark.parametrize("num_pieces", [1, 2, 3])
def test_a_touch_writes_every_page(nbytes: int, num_pieces: int) -> None:
    threads.plan_threads(2)
    memory = torch.full((nbytes,), 7, dtype=torch.uint8)
    touch(memory.numpy(), num_pieces)
    for start in range(0, nbytes, 4096):
        # Pieces begin within pages, so the zero may be anywhere in a page, but no page lacks one.
        assert (memory[max(0, start - 4095) : start + 4096] == 0).any()
    bounds = [nbytes * piece // num_pieces for piece in range(num_pieces + 1)]
    for low, high in pairwise(bounds):
        assert low == high or (memory[low] == 0 and memory[high - 1] == 0)
