"""The tasks of a step on one bucket, each with the waits that the schedule gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.gradient_copy import GradientCopier, GradientCopy
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Operation, Schedule
from offload_adam.params.bucket import BucketState
from offload_adam.spans import Spans, span
from offload_adam.step.device_update import DeviceUpdate
from offload_adam.step.host_update import HostUpdate
from offload_adam.step.messages import UpdateMasks
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.torch_private import foreach_copy
from offload_adam.transfer.collectives import Collectives, PendingCollective
from offload_adam.transfer.slots import Rings
from offload_adam.transfer.stream_waits import HostWait, StreamWaits
from offload_adam.transfer.streams import Event, Streams

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2e-5, 1e-3


BucketUpdate = HostUpdate | DeviceUpdate
"""What a step does with one bucket's final gradients, by where the bucket's state is."""


class Tasks:
    """Runs single tasks; an executor decides when, and on which thread.

    Args:
        updates: one for each bucket; grows with the optimizer.
        snapshot_lock: makes an update wait for a checkpoint that still reads the bucket.
        streams: returns the streams of a device, the same at each call.

    Owns: the gathers that are under way.
    """

    def __init__(
        self,
        ranks: RankGroup,
        updates: Sequence[BucketUpdate],
        snapshot_lock: SnapshotLock,
        collectives: Collectives,
        streams: Callable[[torch.device], Streams],
        copier: GradientCopier,
        rings: Rings,
    ) -> None:
        self._ranks = ranks
        self.updates = updates
        self._snapshot_lock = snapshot_lock
        self.copier = copier
        self.rings = rings
        self.states: list[BucketState] = []
        self._collectives = collectives
        self._streams = streams
        self._stream_waits: StreamWaits | None = None
        self._schedule: Schedule | None = None
        self._gathering: dict[int, PendingCollective] = {}

    def extend(
        self,
        states: Sequence[BucketState],
        schedule: Schedule,
        wait_for_update: HostWait,
    ) -> None:
        """Take further buckets in; nothing is under way.

        Args:
            states: the new buckets.
            schedule: of all buckets.
        """
        self.states += states
        streams = {s.layout.index: self._streams(s.device) for s in self.states}
        stream_waits = StreamWaits(schedule, streams, wait_for_update, self._wait_for)
        if self._stream_waits is not None:
            stream_waits.keep_events_of(self._stream_waits)
        self._stream_waits = stream_waits
        self._schedule = schedule

    def _wait_for(self, event: Event) -> None:
        """Block until an event has happened, and raise an error if a peer fails meanwhile.

        The device may wait for a collective that a dead peer never joins, so the event is polled.
        In a world of one the thread sleeps until the device wakes it.
        """
        if self._ranks.world_size > 1:
            self._ranks.wait_until(
                event.query, pause_s=_FIRST_PAUSE_S, longest_pause_s=_LONGEST_PAUSE_S
            )
        event.synchronize()

    @property
    def stream_waits(self) -> StreamWaits:
        """The waits of the schedule in force."""
        assert self._stream_waits is not None
        return self._stream_waits

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        assert self._schedule is not None
        return self._schedule

    def gradient(self, number: int) -> None:
        """Note on the model's own lane that a bucket's gradients have been brought."""
        self.stream_waits.end(Operation.GRADIENT, number)

    def reduce(
        self,
        number: int,
        slot: torch.Tensor,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        holes: Sequence[torch.Tensor],
    ) -> PendingCollective:
        """Pack a bucket's gradients into a slot and start their mean over the ranks.

        Args:
            sources, targets: gradients, and their places in the slot.
            holes: the places of gradients that are missing, and count zeros.
        """
        state = self.states[number]
        streams = self._streams(state.device)

        def pack() -> None:
            for hole in holes:
                hole.zero_()
            if sources:
                foreach_copy(list(targets), list(sources))

        with span("pack", number):
            self.stream_waits.begin(Operation.PACK, number)
            streams.launch(Operation.PACK.lane, pack, reads=sources, writes=[slot])
            self.stream_waits.end(Operation.PACK, number)
        self.stream_waits.begin(Operation.REDUCE, number)
        pending = self._collectives.mean(streams, slot, state.layout.shard_bounds(state.rank))
        self.stream_waits.end(Operation.REDUCE, number)
        return pending

    def reduction_slot(self, number: int) -> torch.Tensor:
        """Return the slot on its device in which a bucket is reduced."""
        slot = self.schedule.reduce_slots[number]
        numel = self.states[number].layout.numel
        return self.rings.reduction_slot(self.states[number].layout.bucket_key, slot, numel)

    def skip_reduction(self, number: int) -> None:
        """Mark, in its turn, the copy down of a bucket that is not reduced; see `skip_copy_up`."""
        if self.states[number].plan.uses_ring:
            self.stream_waits.end(Operation.COPY_DOWN, number)

    def start_copy(self, gradient_copy: GradientCopy) -> None:
        """Start the copy of a bucket's gradients to the host where that needs no host."""
        self.copier.start(
            gradient_copy, self._streams(gradient_copy.state.device), self.stream_waits
        )

    def has_arrived(self, gradient_copy: GradientCopy) -> bool:
        """Tell, without waiting, whether finishing the copy would not wait."""
        state = gradient_copy.state
        if not gradient_copy.is_ready():
            return False
        if not state.plan.is_offloaded:
            return True
        return gradient_copy.is_issued and self.stream_waits.is_over(
            Operation.COPY_DOWN, state.layout.index
        )

    def finish_copy(self, gradient_copy: GradientCopy) -> None:
        """Block until a bucket's gradients are where the update reads them."""
        self.copier.finish(
            gradient_copy, self._streams(gradient_copy.state.device), self.stream_waits
        )

    def sum_of_squares(self, number: int, gradients: BucketGradients) -> float:
        """Return the sum of squares of this rank's gradient shard, computed once."""
        if gradients.squares is None:
            state = self.states[number]
            gradients.squares = self.updates[number].sum_of_squares(state, gradients)
        return gradients.squares

    def non_finite(self, number: int, gradients: BucketGradients) -> npt.NDArray[np.int64]:
        """Return the indices of a bucket's parameters whose gradient, here, is not finite."""
        state = self.states[number]
        rows = state.indices[gradients.non_finite_rows()]
        if np.isfinite(self.sum_of_squares(number, gradients)):
            return rows
        positions = self.updates[number].non_finite_positions(state, gradients)
        return np.concatenate([state.indices[positions], rows])

    def release(self) -> None:
        """Note on the model's own lane that it has done its last reading of the parameters."""
        offloaded = [s.layout.index for s in self.states if s.plan.is_offloaded]
        self.stream_waits.end_all(Operation.RELEASE, offloaded)

    def update(
        self,
        number: int,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
        spans: Spans,
    ) -> None:
        """Update this rank's shard of a bucket, and start it on its way up to its device."""
        state = self.states[number]
        self._await_turn(state, spans)
        is_host = state.plan.location.is_host
        with spans.span("update" if is_host else "device update", number):
            param_out = self._param_out(state)
            self.updates[number].update(state, gradients, active, masks, param_out)
            if not is_host:
                self.stream_waits.end(Operation.UPDATE, number)
        if state.plan.is_offloaded:
            with spans.span("copy up", number):
                self._copy_up(state, active, param_out)

    def _await_turn(self, state: BucketState, spans: Spans) -> None:
        """Wait for the slot that the update writes, and for a checkpoint that reads the bucket."""
        number = state.layout.index
        with spans.span("copy up", number) if state.plan.is_offloaded else nullcontext():
            self.stream_waits.begin(Operation.UPDATE, number)
        if self._snapshot_lock.holds(number):
            with spans.span("checkpoint wait", number):
                self._snapshot_lock.wait_until_free(number)

    def _param_out(self, state: BucketState) -> torch.Tensor | None:
        """Return where the kernel writes 16-bit parameters, None for an fp32 bucket."""
        if state.dtype == torch.float32:
            return None
        return self._staging_slot(state) if state.plan.is_offloaded else state.shard

    def _staging_slot(self, state: BucketState) -> torch.Tensor:
        """Return the host slot from which a bucket's parameters go up."""
        slot = self.schedule.staging_slots[state.layout.index]
        return self.rings.staging_slot(state.layout.bucket_key, slot, state.layout.shard_numel)

    def stage(self, state: BucketState) -> torch.Tensor:
        """Let this thread copy a shard's fp32 parameters to the slot from which they go up."""
        return self._staging_slot(state).copy_(state.planes.master_weight)

    def _copy_up(
        self, state: BucketState, active: npt.NDArray[np.bool_], param_out: torch.Tensor | None
    ) -> None:
        """Copy the updated parameters of this shard to the device."""
        number = state.layout.index
        source = state.planes.master_weight if param_out is None else param_out
        if param_out is None and state.plan.stages_parameters:
            # A copy to a device out of memory that is not page-locked would wait for it.
            source = self.stage(state)

        def copy() -> None:
            for start, end in _runs(state, active):
                state.shard[start:end].copy_(source[start:end], non_blocking=True)

        self.stream_waits.begin(Operation.COPY_UP, number)
        streams = self._streams(state.device)
        streams.launch(Operation.COPY_UP.lane, copy, reads=[source], writes=[state.shard])
        self.stream_waits.end(Operation.COPY_UP, number)

    def skip_copy_up(self, number: int) -> None:
        """Record an H2D event for a skipped bucket too.

        Whoever waits for it, to use its slot, waits for all copies before it instead: the slot may
        still be read for the bucket that had it last.
        """
        if self.states[number].plan.stages_parameters:
            self.stream_waits.end(Operation.COPY_UP, number)

    def gather(self, number: int, spans: Spans) -> None:
        """Start bringing the other ranks' shards of a bucket, once."""
        state = self.states[number]
        # Outside of the span: this may wait for an update, which is no gather.
        self.stream_waits.begin(Operation.GATHER, number)
        with spans.span("gather", number):
            if number not in self._gathering:  # else an interrupt came before its end was marked
                streams = self._streams(state.device)
                self._gathering[number] = self._collectives.gather(streams, state.flat)
            self.stream_waits.end(Operation.GATHER, number)

    def use(self, number: int, spans: Spans) -> None:
        """Let the model's own lane read a bucket's parameters from now on."""
        pending = self._gathering.get(number)
        if pending is not None:
            with PROGRESS.at("gather", number), spans.span("gather", number):
                pending.wait(self._ranks)
            del self._gathering[number]
        self.stream_waits.begin(Operation.USE, number)


def _runs(state: BucketState, active: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the stretches of the shard that hold active parameters; one where all are."""
    if active.all():
        return [(0, state.layout.shard_numel)]
    segments = state.segments.select(active)
    return [(segment.shard_start, segment.shard_start + segment.numel) for segment in segments]
