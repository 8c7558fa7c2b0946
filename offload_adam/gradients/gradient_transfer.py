"""Move one bucket's gradients to its gradient shard: pack, reduce, D2H copy, cast or add.

.grad --pack--> slot --reduce--> pieces --D2H copy--> shard                 copied straight
                                                `---> host buffer --fold--> shard

Without packing, the D2H copy packs small pieces itself, see `packed_copies`.

If an accumulator sums several backwards of a step, the fold adds to it instead of to the shard. A
shard that receives direct copies is then the host buffer of its bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.packed_copies import PackedCopies, Piece, arrived_pieces
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.budget import NUM_FOLD_BUFFERS, packed_nbytes
from offload_adam.layout.schedule import Lane, Operation, Schedule
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order
from offload_adam.spans import span
from offload_adam.torch_private import foreach_copy
from offload_adam.transfer.collectives import Collectives, PendingCollective
from offload_adam.transfer.slots import Rings, SlotPool
from offload_adam.transfer.stream_waits import StreamWaits


class Fold(Protocol):
    """Function that casts gradients into a part of a shard in host memory, or adds them to it."""

    def __call__(self, shard: torch.Tensor, source: torch.Tensor, *, adds: bool) -> None: ...


@dataclass
class GradientCopy:
    """The copy of one bucket's gradients to this rank's shard.

    complete: the pieces cover the whole shard, with zeros for missing gradients.
    pending: the reduction that writes the pieces, if any.
    pooled_slot: memory of the reduction, to be released to the pool; None for a slot of a ring.
    is_direct: the D2H copy writes into the shard itself.
    is_issued: the D2H copy was issued.
    host_buffer: the buffer that the D2H copy writes into if it is not direct.
    accumulator: (shard_numel,) float32 that replaces the shard as the target, for a further
        backward of the step; None to write to the shard.
    """

    state: BucketState
    gradients: BucketGradients
    pieces: list[Piece]
    complete: bool
    pending: PendingCollective | None = None
    pooled_slot: torch.Tensor | None = None
    is_direct: bool = False
    is_issued: bool = False
    host_buffer: torch.Tensor | None = None
    accumulator: torch.Tensor | None = None


class GradientTransfer:
    """Moves gradients from the tensors of autograd to gradient shards, one bucket at a time.

    Lifecycle of one bucket's gradients in a step:

    1. `pack` copies them into a slot and starts their mean over the ranks. Or `take_segments` takes
       this rank's segments from the tensors themselves. Both return a `GradientCopy`.
    2. `start_direct_copy` issues the D2H copy into the shard, if the dtypes match, nothing is added
       and the shard is page-locked.
    3. `start_buffered_copy` otherwise issues the D2H copy into a host buffer.
    4. `finish_copy` waits for the copy, and casts or adds from the buffer to the shard.

    Attributes:
        fold: set with the first bucket whose state is in host memory.

    Owns: the pool of slots for averaged buckets that use no ring, the slots of `PackedCopies`, and
        two host buffers for each dtype of gradients that are not copied directly. The buffers are
        used in turn: one copy may start while the previous one is finished.
    """

    def __init__(
        self,
        ranks: RankGroup,
        collectives: Collectives,
        stream_waits: StreamWaits,
        rings: Rings,
        make_arena: Callable[[int], HostArena],
    ) -> None:
        """Start without slots and buffers.

        Args:
            rings: owns the slots into which buckets are packed whose D2H copies are direct.
            make_arena: allocates this many bytes of host memory for the buffers.
        """
        self._ranks = ranks
        self._collectives = collectives
        self._stream_waits = stream_waits
        self._rings = rings
        self.slots = SlotPool()
        self._packed = PackedCopies()
        self.fold: Fold | None = None
        self._make_arena = make_arena
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = {}
        self._arenas: dict[torch.dtype, HostArena] = {}
        self._num_begun = 0
        # Buckets whose gradient shard a D2H copy writes, until this copy is finished.
        self._filling: set[int] = set()

    @property
    def host_nbytes(self) -> int:
        """Host bytes of the buffers for gradients that are cast or added."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @property
    def slot_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots into which gradients are packed, by device."""
        pooled, rings = Counter(self.slots.nbytes), Counter(self._rings.reduction_nbytes)
        return pooled + rings + Counter(self._packed.nbytes)

    def allocate(self, states: Sequence[BucketState], schedule: Schedule) -> None:
        """Allocate the buffers that these buckets need, and reserve their slots.

        No gradient copy may be running: a buffer that is too small is freed.
        """
        # Largest first: a buffer too small for the next bucket would be allocated and pinned again.
        for state in sorted(states, key=lambda state: -state.layout.numel):
            plan, bucket = state.plan, state.layout
            if plan.uses_ring:
                slot = schedule.reduce_slots[bucket.index]
                self._rings.reserve_reduction(
                    bucket.bucket_key, slot, state.gradient_dtype, state.device, bucket.numel
                )
            if plan.gradient.averaged:  # with a ring, only gradients that are added use the pool
                self.slots.reserve(bucket.numel, state.gradient_dtype, state.device)
            self._packed.reserve(packed_nbytes(plan), state.device)
            if plan.is_offloaded and not plan.copies_directly:
                self._fit_buffers(state.gradient_dtype, bucket.shard_numel, self._make_arena)

    def pack(
        self,
        state: BucketState,
        tensors: Sequence[torch.Tensor | None],
        gradients: BucketGradients,
        *,
        adds: bool,
        accumulator: torch.Tensor | None = None,
    ) -> GradientCopy:
        """Pack a bucket's gradients into a slot, and start their mean if ranks average them.

        Args:
            tensors: the gradient of each parameter. None for a missing one, packed as zeros.
            gradients: receives the shard in `finish_copy`.
            adds: add to the shard instead of overwriting it.
            accumulator: see `GradientCopy`.
        """
        number = state.layout.index
        # The host empties a slot whose gradients it adds. A ring would reuse the slot too early.
        slot, pooled = self._acquire_slot(state, from_ring=accumulator is None)
        sources, targets, holes = [], [], []
        for placed, tensor in zip(state.layout.placements, tensors, strict=True):
            part = slot[placed.start : placed.end]
            if tensor is None:
                holes.append(part)
            elif placed.numel > 0:
                sources.append(in_memory_order(tensor))
                targets.append(part)

        def pack() -> None:
            for hole in holes:
                hole.zero_()
            if sources:
                foreach_copy(targets, sources)

        with span("pack", number):
            # The compute stream first waits for the D2H copy of the previous bucket in this slot of
            # the ring, which still reads it. A slot of the pool is free, and a wait could block
            # backward until other ranks run as many backwards.
            self._stream_waits.run(
                Operation.PACK, number, pack, reads=sources, writes=[slot], waits=pooled is None
            )
        if not state.plan.gradient.averaged:
            # Only this rank's part: FSDP2 has averaged the gradients on all replicas of HSDP, which
            # divide the state.
            low, high = state.layout.shard_bounds(state.rank)
            pieces = [Piece(slot[low:high], 0, high - low, adds)]
            return GradientCopy(state, gradients, pieces, complete=True, accumulator=accumulator)
        # The collective reads the slot, so its stream waits until the compute stream has packed it.
        self._stream_waits.wait_before(Operation.REDUCE, number)
        streams = self._stream_waits.streams_of(number)
        pending = self._collectives.mean(streams, slot, state.layout.shard_bounds(state.rank))
        self._stream_waits.record(Operation.REDUCE, number)
        pieces = [Piece(pending.shard, 0, state.layout.shard_numel, adds)]
        return GradientCopy(
            state, gradients, pieces, True, pending, pooled, accumulator=accumulator
        )

    def _acquire_slot(
        self, state: BucketState, *, from_ring: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return memory to pack a bucket into, and the same memory again if the pool owns it."""
        bucket = state.layout
        if state.plan.uses_ring and from_ring:
            slot_number = self._stream_waits.schedule.reduce_slots[bucket.index]
            return self._rings.reduction_slot(bucket.bucket_key, slot_number, bucket.numel), None
        slot = self.slots.acquire(bucket.numel, state.gradient_dtype, state.device)
        return slot, slot

    def skip_pack(self, state: BucketState) -> None:
        """Record a D2H event for a bucket that is not packed: its slot's next user waits for it."""
        if state.plan.uses_ring:
            self._stream_waits.record(Operation.COPY_D2H, state.layout.index)

    def take_segments(
        self,
        state: BucketState,
        tensors: Sequence[torch.Tensor | None],
        gradients: BucketGradients,
        *,
        accumulator: torch.Tensor | None = None,
    ) -> GradientCopy | None:
        """Return the copy of this rank's segments of gradients that are not packed, if any.

        Args:
            tensors: the gradient of each parameter, None for a missing one.
            gradients: parameters that are already `dense` there are added to the shard.
            accumulator: see `GradientCopy`.
        """
        pieces = []
        adds = gradients.dense.tolist()
        follows = False
        for position, parameter_start, shard_start, numel in state.segments.each:
            tensor = tensors[position]
            if tensor is not None:
                source = in_memory_order(tensor)
                if numel < source.numel():
                    source = source[parameter_start : parameter_start + numel]
                shard_end = shard_start + numel
                pieces.append(Piece(source, shard_start, shard_end, adds[position], follows))
            follows = tensor is not None  # else the shard has a segment between the two pieces
        if not pieces:
            return None
        # The D2H copy waits for PACK if the plan packs. Nothing is packed here, so record that
        # event now, after backward has written the gradients.
        written = Operation.PACK if state.plan.packs else Operation.GRADIENT
        self._stream_waits.record(written, state.layout.index)
        return GradientCopy(state, gradients, pieces, complete=False, accumulator=accumulator)

    def start_direct_copy(self, copy: GradientCopy) -> None:
        """Issue the D2H copy if it can write into the shard itself. Never blocks the host."""
        if copy.accumulator is not None:
            return  # the shard may still hold the gradients of an earlier backward
        state = copy.state
        shard = state.planes.gradient_shard
        assert shard is not None
        # The plan allows a direct copy, but this step's gradients may need a cast or an addition.
        if (
            state.plan.is_offloaded
            and state.plan.pinned
            and not any(piece.adds or piece.source.dtype != shard.dtype for piece in copy.pieces)
        ):
            copy.is_direct = True
            self._issue(copy, shard)

    def goes_through_buffer(self, copy: GradientCopy) -> bool:
        """Return whether the host casts or adds a started copy to the shard, from a buffer."""
        return copy.state.plan.is_offloaded and not copy.is_direct

    def has_arrived(self, copy: GradientCopy) -> bool:
        """Return whether `finish_copy` would return at once. Does not wait.

        If the shard is on a device, True also means that the compute stream would not wait. If the
        host memory is not page-locked, True only means that no wait depends on another rank.
        """
        number = copy.state.layout.index
        if copy.is_issued:
            return self._stream_waits.is_over(Operation.COPY_D2H, number)
        if copy.pending is None:
            # If offloaded, the D2H copy has not even been issued.
            return not copy.state.plan.is_offloaded
        return copy.pending.is_completed() and self._stream_waits.is_over(Operation.REDUCE, number)

    def waits_on_stream_alone(self, copy: GradientCopy) -> bool:
        """Return whether `finish_copy` makes only the compute stream wait, never the host."""
        on_stream = copy.pending is None or copy.pending.work is None
        return on_stream and not copy.state.plan.location.is_host

    def start_buffered_copy(self, copy: GradientCopy) -> None:
        """Issue the D2H copy into a host buffer, unless it was issued or is direct.

        Does nothing if the buffer is the bucket's shard and an earlier copy to it is not finished:
        `finish_copy` then issues the copy. Does not wait, unless the buffer is not page-locked:
        CUDA then blocks the calling thread.

        Threads: one thread starts and finishes all copies, in order. It starts at most one copy
        ahead of the one that it finishes, because there are two buffers.
        """
        if not self.goes_through_buffer(copy) or copy.is_issued:
            return
        dtypes = {piece.source.dtype for piece in copy.pieces}
        # Gradients of several dtypes go through one buffer: fp32 holds each 16-bit value exactly.
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        shard = copy.state.planes.gradient_shard
        if copy.accumulator is not None and copy.state.plan.copies_directly:
            # Of all host memory for this bucket only the shard is page-locked.
            assert shard is not None
            if shard.dtype == dtype:
                if copy.state.layout.index not in self._filling:
                    self._move_to_accumulator(copy)
                    copy.host_buffer = shard
                    self._issue(copy, shard)
                return
        # `allocate` made no buffer for gradients of another dtype, such as those set by hand. The
        # new one is not page-locked: pinning memory while a collective runs may deadlock in CUDA.
        self._fit_buffers(dtype, copy.state.layout.shard_numel, HostArena)
        copy.host_buffer = self._buffers[dtype][self._num_begun % NUM_FOLD_BUFFERS]
        self._num_begun += 1
        self._issue(copy, copy.host_buffer)

    def finish_copy(self, copy: GradientCopy) -> None:
        """Wait until the gradients are in the shard or added, and hand it to `copy.gradients`."""
        state = copy.state
        number = state.layout.index
        target = copy.accumulator if copy.accumulator is not None else state.planes.gradient_shard
        assert target is not None
        try:
            if copy.pending is not None:
                with span("reduce", number):
                    copy.pending.wait(self._ranks)
            with span("D2H copy", number):
                self.start_buffered_copy(copy)
                # Wait for the D2H copy, or for the reduction if there is no such copy. For a shard
                # on the host this thread waits, for one on a device only the compute stream.
                self._stream_waits.wait_before(Operation.SUM_SQUARES, number)
                if not copy.is_direct:
                    self._move_to_accumulator(copy)
                    buffer = copy.host_buffer
                    pieces = copy.pieces
                    if buffer is not None:
                        pieces = arrived_pieces(pieces, buffer)
                    self._fold(state, pieces, target)
        finally:
            self._filling.discard(number)
        copy.gradients.set_shard(target, complete=copy.complete)
        # Only now is the slot free: the fold above reads it. On a device the fold may still be
        # running, but the next pack into the slot comes after it on the compute stream.
        if copy.pooled_slot is not None:
            self.slots.release(copy.pooled_slot)
        copy.pieces.clear()  # frees gradients that were not packed

    def _issue(self, copy: GradientCopy, target: torch.Tensor) -> None:
        """Copy the pieces to their ranges of `target` on the D2H stream, small ones together."""
        number = copy.state.layout.index
        if target is copy.state.planes.gradient_shard:
            self._filling.add(number)
        pieces = list(copy.pieces)
        sources = [piece.source for piece in pieces]
        slot = self._packed.slot(copy.state.device)

        def issue() -> None:
            self._packed.copy(pieces, target, slot)

        # The D2H stream first waits for the reduction, or for backward if nothing is reduced.
        self._stream_waits.run(
            Operation.COPY_D2H, number, issue, reads=sources, writes=[slot, target]
        )
        copy.is_issued = True

    def _move_to_accumulator(self, copy: GradientCopy) -> None:
        """Copy the gradients of earlier backwards to the accumulator, unless they are there."""
        gradients, accumulator = copy.gradients, copy.accumulator
        if accumulator is not None and gradients.shard is not accumulator:
            parts = gradients.held_parts(copy.state)
            pieces = [
                Piece(source, start, start + source.numel(), adds=False) for source, start in parts
            ]
            self._fold(copy.state, pieces, accumulator)
            gradients.move_to(accumulator)

    def _fold(self, state: BucketState, pieces: Iterable[Piece], shard: torch.Tensor) -> None:
        """Cast the pieces into their ranges of a shard or an accumulator, or add them."""
        pieces = list(pieces)  # the caller clears its list before the compute stream runs `fold`
        if state.plan.location.is_host:
            assert self.fold is not None
            for piece in pieces:
                self.fold(piece.of(shard), piece.source, adds=piece.adds)
            return

        def fold() -> None:
            copied = [piece for piece in pieces if not piece.adds]
            if copied:
                foreach_copy([p.of(shard) for p in copied], [p.source for p in copied])
            for piece in pieces:
                if piece.adds:
                    piece.of(shard).add_(piece.source)

        streams = self._stream_waits.streams_of(state.layout.index)
        sources = [piece.source for piece in pieces]
        streams.launch(Lane.COMPUTE, fold, reads=sources, writes=[shard])

    def _fit_buffers(
        self, dtype: torch.dtype, numel: int, make_arena: Callable[[int], HostArena]
    ) -> None:
        """Allocate the host buffers of a dtype again if they are smaller than a shard."""
        buffers = self._buffers.get(dtype)
        if buffers is not None and buffers[0].numel() >= numel:
            return
        if dtype in self._arenas:
            self._arenas[dtype].close()
        arena = make_arena(NUM_FOLD_BUFFERS * padded_nbytes(numel, dtype))
        self._arenas[dtype] = arena
        self._buffers[dtype] = [arena.allocate(numel, dtype) for _ in range(NUM_FOLD_BUFFERS)]
