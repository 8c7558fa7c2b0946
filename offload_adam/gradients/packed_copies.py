"""Copy pieces of a gradient shard from a device to the host, neighbouring small ones together.

    .grad     | p3 |    | p2 |    | p1 ........................ |    separate tensors
                 |         |         |
    slot      | p3 pad | p2 pad |    |                               one foreach copy on the device
                 |                   |
    host      | p3 pad | p2 pad | p1 ........................ |      one D2H copy each

A model with 10,000 norm scales, biases or LoRA factors would take 10,000 copies otherwise, of about
10 us of host time each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from offload_adam.layout.budget import SMALL_NBYTES
from offload_adam.layout.flat import align
from offload_adam.torch_private import foreach_copy


class Piece(NamedTuple):
    """The range [start, end) of a shard, and the tensor with its gradient.

    adds: add to the values in the shard instead of overwriting them.
    follows: between the piece before and this one the shard has only padding.
    """

    source: torch.Tensor
    start: int
    end: int
    adds: bool
    follows: bool = False

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """Return this range of a plane of the shard."""
        return shard[self.start : self.end]


def runs(
    pieces: Iterable[Piece], joins: Callable[[Sequence[Piece], Piece], bool]
) -> Iterator[list[Piece]]:
    """Yield runs of neighbouring pieces, with only padding between them.

    Args:
        joins: return whether a piece that follows a run may become a part of it.
    """
    run: list[Piece] = []
    for piece in pieces:
        if run and not (piece.follows and joins(run, piece)):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def arrived_pieces(pieces: Iterable[Piece], buffer: torch.Tensor) -> list[Piece]:
    """Return pieces that were copied to their ranges of a buffer, one for each run.

    They include the padding in a run, whose values are undefined. Nothing reads the padding of a
    gradient shard or of an accumulator: norm and update read the segments of parameters alone.
    """
    alike = runs(pieces, lambda run, piece: run[0].adds == piece.adds)
    ranges = [(run[0].start, run[-1].end, run[0].adds) for run in alike]
    return [Piece(buffer[start:end], start, end, adds) for start, end, adds in ranges]


class PackedCopies:
    """D2H copies of pieces, of which neighbouring small ones are packed on the device first.

    Owns: one slot for each device. Every copy fills it and empties it on the D2H stream. So no copy
        overwrites gradients that an earlier one still reads, and one slot is enough.
    Lifecycle: `reserve` for every bucket, while no copy is running. `copy` allocates nothing.
    """

    def __init__(self) -> None:
        self._slots: dict[torch.device, torch.Tensor] = {}
        # Between the packing of one thread and its D2H copies, another thread must not issue work
        # that overwrites the slot.
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots, by device."""
        return {device: slot.nbytes for device, slot in self._slots.items()}

    def reserve(self, nbytes: int, device: torch.device) -> None:
        """Make the slot of a device large enough; with 0 bytes nothing is packed."""
        if device not in self._slots or nbytes > self._slots[device].nbytes:
            self._slots[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def slot(self, device: torch.device) -> torch.Tensor:
        """Return the slot of a device, (n,) uint8."""
        return self._slots[device]

    def copy(self, pieces: Iterable[Piece], target: torch.Tensor, slot: torch.Tensor) -> None:
        """Copy pieces to their ranges of a tensor in host memory. Runs on the D2H stream.

        Args:
            target: (shard_numel,) also receives undefined values in the padding between pieces.
            slot: from `slot`.
        """
        slot = slot.view(target.dtype)
        numel, small_numel = slot.numel(), SMALL_NBYTES // slot.itemsize

        def fits(run: Sequence[Piece], piece: Piece) -> bool:
            before = run[-1]
            return (
                piece.end - piece.start <= small_numel
                and before.end - before.start <= small_numel
                and piece.end - run[0].start <= numel
            )

        with self._lock:
            packed: list[tuple[torch.Tensor, list[Piece]]] = []
            used = 0
            for run in runs(pieces, fits):
                if len(run) == 1:
                    run[0].of(target).copy_(run[0].source, non_blocking=True)
                    continue
                end = used + run[-1].end - run[0].start
                if end > numel:
                    _copy_packed(packed, target)
                    packed, used, end = [], 0, end - used
                packed.append((slot[used:end], run))
                used = align(end)
            _copy_packed(packed, target)


def _copy_packed(packed: Sequence[tuple[torch.Tensor, list[Piece]]], target: torch.Tensor) -> None:
    """Pack runs into their parts of a slot, then copy each part to the target."""
    parts: list[torch.Tensor] = []
    for part, run in packed:
        # `split` takes a third of the time of a slice for each piece.
        cuts = [cut for piece in run for cut in (piece.start, piece.end)]
        parts += part.split([end - start for start, end in pairwise(cuts)])[::2]
    if parts:
        foreach_copy(parts, [piece.source for _, run in packed for piece in run])
    for part, run in packed:
        target[run[0].start : run[-1].end].copy_(part, non_blocking=True)
