"""Copy one bucket's gradients to the gradient shard that the update reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Lane, Operation
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order
from offload_adam.spans import span
from offload_adam.transfer.collectives import PendingCollective
from offload_adam.transfer.slots import SlotPool
from offload_adam.transfer.stream_waits import StreamWaits
from offload_adam.transfer.streams import Streams


class Piece(NamedTuple):
    """One range of a shard and where its gradient comes from; `adds` to what the shard holds."""

    source: torch.Tensor
    start: int
    adds: bool

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the piece's part of a plane of the shard."""
        return shard[self.start : self.start + self.source.numel()]


@dataclass
class GradientCopy:
    """The copy of one bucket's gradients to this rank's shard.

    complete: the pieces cover the whole shard, with zeros for missing gradients.
    pending: the reduction whose result the pieces are; `pooled_slot` is its memory, if a pool gave
        it.
    is_issued: the D2H copies have been issued.
    """

    state: BucketState
    gradients: BucketGradients
    pieces: list[Piece]
    complete: bool
    pending: PendingCollective | None = None
    pooled_slot: torch.Tensor | None = None
    is_issued: bool = False

    def is_ready(self) -> bool:
        """Tell, without waiting, whether the reduction is over."""
        return self.pending is None or self.pending.is_completed()


def local_pieces(
    state: BucketState, gradients: Sequence[torch.Tensor | None], arrived: npt.NDArray[np.bool_]
) -> list[Piece]:
    """Return this rank's segments of gradients that need no reduction.

    Args:
        arrived: (num parameters,) bool, whose gradients are added to what the shard holds.
    """
    pieces = []
    for position, parameter_start, shard_start, numel in state.segments.each:
        gradient = gradients[position]
        if gradient is not None:
            source = in_memory_order(gradient)[parameter_start : parameter_start + numel]
            pieces.append(Piece(source, shard_start, bool(arrived[position])))
    return pieces


class GradientCopier:
    """Copies gradients into gradient shards: straight where possible, else through a buffer.

    A D2H copy goes straight into the shard where the host has nothing to do but wait: the dtypes
    are equal, nothing is added, and the shard is page-locked. `start` issues such a copy; `finish`
    issues any other, and then casts or adds.

    Owns: one buffer for each dtype of gradients that cannot be copied straight.
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
        """Make the buffer for gradients of this dtype large enough for a bucket's shard."""
        self._buffer(dtype, state.layout.shard_numel, self._make_arena)

    def start(self, copy: GradientCopy, streams: Streams, stream_waits: StreamWaits) -> None:
        """Issue the D2H copy if it can go straight into the shard. Never waits."""
        state = copy.state
        shard = state.planes.gradient_shard
        assert shard is not None
        # `copies_straight` is the plan; these gradients may be added, or of another dtype.
        if (
            state.plan.is_offloaded
            and state.plan.pinned
            and not any(piece.adds or piece.source.dtype != shard.dtype for piece in copy.pieces)
        ):
            self._issue(copy, shard, streams, stream_waits)

    def finish(self, copy: GradientCopy, streams: Streams, stream_waits: StreamWaits) -> None:
        """Block until the gradients are in the shard. One thread finishes all copies, in order."""
        state = copy.state
        number = state.layout.index
        shard = state.planes.gradient_shard
        assert shard is not None
        if copy.pending is not None:
            with span("reduce", number):
                copy.pending.wait(self._ranks)
        with span("copy down", number):
            through = None
            if state.plan.is_offloaded and not copy.is_issued:
                dtypes = {piece.source.dtype for piece in copy.pieces}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                # Where none was reserved, as for gradients set by hand, it is not page-locked:
                # CUDA may deadlock with a collective that is under way.
                through = self._buffer(dtype, shard.numel(), HostArena)
                self._issue(copy, through, streams, stream_waits)
            stream_waits.begin(Operation.SUM_SQUARES, number)
            if not copy.is_issued or through is not None:
                fold = partial(_fold, tuple(copy.pieces), shard, through)
                if state.plan.location.is_host:
                    fold()
                else:
                    sources = [piece.source for piece in copy.pieces]
                    streams.launch(Lane.COMPUTE, fold, reads=sources, writes=[shard])
        copy.gradients.set_shard(shard, complete=copy.complete)
        if copy.pooled_slot is not None:
            self._slots.release(copy.pooled_slot)
        copy.pieces.clear()

    def _issue(
        self,
        copy: GradientCopy,
        target: torch.Tensor,
        streams: Streams,
        stream_waits: StreamWaits,
    ) -> None:
        """Copy the pieces to their places in `target`, on the lane of copies to the host."""
        number = copy.state.layout.index
        pieces = list(copy.pieces)

        def issue() -> None:
            for piece in pieces:
                piece.of(target).copy_(piece.source, non_blocking=True)

        stream_waits.begin(Operation.COPY_DOWN, number)
        sources = [piece.source for piece in pieces]
        streams.launch(Operation.COPY_DOWN.lane, issue, reads=sources, writes=[target])
        stream_waits.end(Operation.COPY_DOWN, number)
        copy.is_issued = True

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


def _fold(pieces: Sequence[Piece], shard: torch.Tensor, through: torch.Tensor | None) -> None:
    """Copy or add pieces to the shard, out of the buffer that they came through, if any."""
    for piece in pieces:
        source = piece.source if through is None else piece.of(through)
        if piece.adds:
            piece.of(shard).add_(source)
        else:
            piece.of(shard).copy_(source)
