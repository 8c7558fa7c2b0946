"""Bring one bucket's gradients to the host shard that the update reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.reader import in_memory_order
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Lane, Operation
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.params.bucket import BucketState
from offload_adam.spans import span
from offload_adam.transfer.collectives import PendingCollective
from offload_adam.transfer.slots import SlotPool
from offload_adam.transfer.stream_waits import Crossing
from offload_adam.transfer.streams import Streams


class Piece(NamedTuple):
    """One stretch of a shard and where its gradient comes from; `adds` to what landed before."""

    source: torch.Tensor
    start: int
    adds: bool

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the piece's part of a plane of the shard."""
        return shard[self.start : self.start + self.source.numel()]


@dataclass
class Flight:
    """A bucket's gradients on their way to the shard.

    complete: the pieces cover the whole shard, with zeros for what is missing.
    pending: the reduction that the pieces come out of; `pooled_slot` its memory, if a pool gave it.
    is_issued: the copies to the host are on their way.
    """

    state: BucketState
    gradients: BucketGradients
    pieces: list[Piece]
    complete: bool
    pending: PendingCollective | None = None
    pooled_slot: torch.Tensor | None = None
    is_issued: bool = False

    def is_ready(self) -> bool:
        """Tell, without waiting, whether the host could land it."""
        return self.pending is None or self.pending.is_completed()


def local_pieces(
    state: BucketState, gradients: Sequence[torch.Tensor | None], arrived: npt.NDArray[np.bool_]
) -> list[Piece]:
    """Return this rank's segments of gradients that need no reduction.

    Args:
        arrived: (num parameters,) bool, which add to what has landed.
    """
    segments = state.segments
    rows = zip(
        segments.positions.tolist(),
        segments.parameter_starts.tolist(),
        segments.shard_starts.tolist(),
        segments.numels.tolist(),
        strict=True,
    )
    pieces = []
    for position, parameter_start, shard_start, numel in rows:
        gradient = gradients[position]
        if gradient is not None:
            source = in_memory_order(gradient)[parameter_start : parameter_start + numel]
            pieces.append(Piece(source, shard_start, bool(arrived[position])))
    return pieces


class Landing:
    """Lands flights: straight in the landed gradient where that can be, else through a buffer.

    A copy from a device goes straight where the host need do nothing but wait: the dtypes are
    equal, nothing is added, and the landed gradient is page-locked. Such a copy is issued when the
    bucket departs, any other by whoever lands the flight.

    Owns: one buffer for each dtype that gradients arrive in and cannot go straight from.
    """

    def __init__(
        self,
        ranks: RankGroup,
        slots: SlotPool,
        *,
        make_arena: Callable[[int], HostArena],
    ) -> None:
        """Begin without buffers.

        Args:
            slots: where buckets in host memory are reduced.
            make_arena: gives host memory of so many bytes for a buffer.
        """
        self._ranks = ranks
        self._slots = slots
        self._make_arena = make_arena
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._arenas: dict[torch.dtype, HostArena] = {}

    @property
    def nbytes(self) -> int:
        """Host bytes of the buffers."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def reserve(self, state: BucketState, dtype: torch.dtype) -> None:
        """Make the buffer through which gradients of this dtype go large enough for a bucket's."""
        self._buffer(dtype, state.layout.shard_numel, self._make_arena)

    def depart(self, flight: Flight, streams: Streams, crossing: Crossing) -> None:
        """Issue the copy of a flight whose source is on its way, if the host has no part in it."""
        state = flight.state
        landed = state.planes.landed_gradient
        assert landed is not None
        # `copies_straight` is the plan; these gradients may be added, or of another dtype.
        if (
            state.plan.is_offloaded
            and state.plan.pinned
            and not any(piece.adds or piece.source.dtype != landed.dtype for piece in flight.pieces)
        ):
            self._issue(flight, landed, streams, crossing)

    def land(self, flight: Flight, streams: Streams, crossing: Crossing) -> None:
        """Block until the flight has landed. By one thread, flight by flight."""
        state = flight.state
        number = state.layout.index
        landed = state.planes.landed_gradient
        assert landed is not None
        if flight.pending is not None:
            with span("reduce", number):
                flight.pending.wait(self._ranks)
        with span("copy down", number):
            through = None
            if state.plan.is_offloaded and not flight.is_issued:
                dtypes = {piece.source.dtype for piece in flight.pieces}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                # Where none was reserved, as for gradients set by hand, it is not page-locked:
                # CUDA may deadlock with a collective that is under way.
                through = self._buffer(dtype, landed.numel(), HostArena)
                self._issue(flight, through, streams, crossing)
            crossing.begin(Operation.SUM_SQUARES, number)
            if not flight.is_issued or through is not None:
                fold = partial(_fold, tuple(flight.pieces), landed, through)
                if state.plan.location.is_host:
                    fold()
                else:
                    sources = [piece.source for piece in flight.pieces]
                    streams.launch(Lane.COMPUTE, fold, reads=sources, writes=[landed])
        flight.gradients.land(landed, complete=flight.complete)
        if flight.pooled_slot is not None:
            self._slots.release(flight.pooled_slot)
        flight.pieces.clear()

    def _issue(
        self, flight: Flight, target: torch.Tensor, streams: Streams, crossing: Crossing
    ) -> None:
        """Copy the pieces to their places in `target`, on the lane of copies to the host."""
        number = flight.state.layout.index
        pieces = list(flight.pieces)

        def copy() -> None:
            for piece in pieces:
                piece.of(target).copy_(piece.source, non_blocking=True)

        crossing.begin(Operation.COPY_DOWN, number)
        sources = [piece.source for piece in pieces]
        streams.launch(Operation.COPY_DOWN.lane, copy, reads=sources, writes=[target])
        crossing.end(Operation.COPY_DOWN, number)
        flight.is_issued = True

    def _buffer(
        self, dtype: torch.dtype, numel: int, make_arena: Callable[[int], HostArena]
    ) -> torch.Tensor:
        """Return a host buffer of at least so many elements, a new one where there is none."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < numel:
            if dtype in self._arenas:
                self._arenas[dtype].close()
            arena = self._arenas[dtype] = make_arena(padded_nbytes(numel, dtype))
            buffer = self._buffers[dtype] = arena.take(numel, dtype)
        return buffer


def _fold(pieces: Sequence[Piece], landed: torch.Tensor, through: torch.Tensor | None) -> None:
    """Copy or add pieces to what has landed, out of the buffer that they came through, if any."""
    for piece in pieces:
        source = piece.source if through is None else piece.of(through)
        if piece.adds:
            piece.of(landed).add_(source)
        else:
            piece.of(landed).copy_(source)
