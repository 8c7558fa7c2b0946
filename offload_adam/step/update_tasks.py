"""The tasks that update one bucket, each with the waits that `layout.schedule` gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Operation, Schedule
from offload_adam.params.bucket import BucketState
from offload_adam.spans import Stopwatch
from offload_adam.step.device_norm import wait_for_squares
from offload_adam.step.device_update import DeviceUpdate
from offload_adam.step.host_update import HostUpdate
from offload_adam.step.messages import UpdateInputs
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.transfer.collectives import Collectives, PendingCollective
from offload_adam.transfer.slots import Rings
from offload_adam.transfer.stream_waits import StreamWaits

BucketUpdate = HostUpdate | DeviceUpdate
"""Norm and update of a bucket: `HostUpdate` for state in host memory, else `DeviceUpdate`."""


class UpdateTasks:
    """Runs the tasks of one bucket; the executor decides when, and on which thread.

    Args:
        states, updates: one for each bucket; these lists grow with `add_param_group`.
        snapshot_lock: makes an update wait for a checkpoint that still reads the bucket.

    Owns: the all-gathers that were issued and not waited for.
    """

    def __init__(
        self,
        ranks: RankGroup,
        states: Sequence[BucketState],
        updates: Sequence[BucketUpdate],
        snapshot_lock: SnapshotLock,
        collectives: Collectives,
        stream_waits: StreamWaits,
        rings: Rings,
    ) -> None:
        self._ranks = ranks
        self.states = states
        self.updates = updates
        self._snapshot_lock = snapshot_lock
        self._collectives = collectives
        self.stream_waits = stream_waits
        self._rings = rings
        self._gathering: dict[int, PendingCollective] = {}

    def reserve(self, states: Sequence[BucketState], schedule: Schedule) -> None:
        """Reserve the staging slots for the H2D copies of these buckets' parameters."""
        for state in states:
            if state.plan.stages_parameters:
                bucket = state.layout
                slot = schedule.staging_slots[bucket.index]
                self._rings.reserve_staging(
                    bucket.bucket_key, slot, state.dtype, bucket.shard_numel
                )

    def sum_of_squares(self, number: int, gradients: BucketGradients) -> float:
        """Return the sum of squares of this rank's gradient shard, computed once."""
        if gradients.squares is None:
            state = self.states[number]
            gradients.squares = self.updates[number].sum_of_squares(state, gradients)
        return gradients.squares

    def sum_on_devices(self, numbers: Iterable[int], gradients: Sequence[BucketGradients]) -> None:
        """Compute `sum_of_squares` of buckets with state on devices; wait once for each device."""
        missing = [number for number in numbers if gradients[number].squares is None]
        started = [
            cast(DeviceUpdate, self.updates[n]).start_norms(self.states[n], gradients[n])
            for n in missing
        ]
        for number, squares in zip(missing, wait_for_squares(started), strict=True):
            gradients[number].squares = float(squares.sum())

    def non_finite(self, number: int, gradients: BucketGradients) -> npt.NDArray[np.int64]:
        """Return the indices of a bucket's parameters with a non-finite gradient on this rank."""
        state = self.states[number]
        rows = state.indices[gradients.non_finite_rows()]
        if np.isfinite(self.sum_of_squares(number, gradients)):
            return rows
        positions = self.updates[number].non_finite_positions(state, gradients)
        return np.concatenate([state.indices[positions], rows])

    def record_last_read(self) -> None:
        """Record on the compute stream that the model has read this step's parameters.

        H2D copies wait for this event before they overwrite the parameters.
        """
        offloaded = [s.layout.index for s in self.states if s.plan.is_offloaded]
        self.stream_waits.record_all(Operation.RELEASE, offloaded)

    def update(
        self,
        number: int,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        inputs: UpdateInputs,
        stopwatch: Stopwatch,
    ) -> None:
        """Update this rank's shard of a bucket, and issue the H2D copy of its parameters."""
        state = self.states[number]
        self._await_turn(state, stopwatch)
        is_host = state.plan.location.is_host
        with stopwatch.span("update" if is_host else "device update", number):
            param_out = self._param_out(state)
            self.updates[number].update(state, gradients, active, inputs, param_out)
            if not is_host:
                self.stream_waits.record(Operation.UPDATE, number)
        if state.plan.is_offloaded:
            with stopwatch.span("H2D copy", number):
                self._copy_h2d(state, active, param_out)

    def _await_turn(self, state: BucketState, stopwatch: Stopwatch) -> None:
        """Wait for the staging slot that the update writes, and for a checkpoint of the bucket."""
        number = state.layout.index
        with stopwatch.span("H2D copy", number) if state.plan.is_offloaded else nullcontext():
            # The kernel writes the staging slot from this thread. So this thread, not a stream,
            # waits until the H2D copy of the bucket that used the slot before has read it.
            self.stream_waits.wait_before(Operation.UPDATE, number)
        if self._snapshot_lock.holds(number):
            with stopwatch.span("checkpoint wait", number):
                self._snapshot_lock.wait_until_free(number)

    def _param_out(self, state: BucketState) -> torch.Tensor | None:
        """Return the tensor for updated 16-bit parameters, None if the kernel writes none."""
        if not state.plan.writes_parameters:
            return None
        return self._staging_slot(state) if state.plan.is_offloaded else state.shard

    def _staging_slot(self, state: BucketState) -> torch.Tensor:
        """Return the host slot from which a bucket's parameters are copied to the device."""
        slot = self.stream_waits.schedule.staging_slots[state.layout.index]
        return self._rings.staging_slot(state.layout.bucket_key, slot, state.layout.shard_numel)

    def stage(self, state: BucketState) -> torch.Tensor:
        """Copy a shard's master weights, or high halves, to its staging slot; return the slot."""
        slot, update = self._staging_slot(state), self.updates[state.layout.index]
        assert not isinstance(update, DeviceUpdate)
        update.fold(slot, state.planes.master_weight, adds=False)
        return slot

    def _copy_h2d(
        self, state: BucketState, active: npt.NDArray[np.bool_], param_out: torch.Tensor | None
    ) -> None:
        """Copy the updated parameters of this shard to the device."""
        number = state.layout.index
        source = state.planes.master_weight if param_out is None else param_out
        runs = _runs(state, active)
        # Without runs, this step may have had no D2H copy for which the host waited: an H2D copy of
        # the previous step may still read the slot.
        if runs and param_out is None and state.plan.stages_parameters:
            # The master is not page-locked: CUDA would block this thread for the whole H2D copy.
            source = self.stage(state)

        def copy() -> None:
            for start, end in runs:
                state.shard[start:end].copy_(source[start:end], non_blocking=True)

        # The H2D stream first waits for RELEASE: the model may still read the old parameters.
        self.stream_waits.run(
            Operation.COPY_H2D, number, copy, reads=[source], writes=[state.shard]
        )

    def skip_copy_h2d(self, number: int) -> None:
        """Record an H2D event for a skipped bucket that has a staging slot."""
        # The next user of the slot waits on this bucket's event. Recorded now, the event comes
        # after all earlier H2D copies, one of which may still read the slot.
        self.stream_waits.record(Operation.COPY_H2D, number)

    def gather(self, number: int, stopwatch: Stopwatch) -> None:
        """Issue the all-gather of a bucket's parameters."""
        state = self.states[number]
        # Outside the span: this may block until the worker has updated this rank's shard.
        self.stream_waits.wait_before(Operation.GATHER, number)
        with stopwatch.span("gather", number):
            # An earlier call may have issued it and then been interrupted. A second one would not
            # match the other ranks' collectives.
            if number not in self._gathering:
                streams = self.stream_waits.streams_of(number)
                members = None if state.local_shard is None else state.local_shard.replicas
                self._gathering[number] = self._collectives.gather(streams, state.flat, members)
            self.stream_waits.record(Operation.GATHER, number)

    def wait_for_parameters(self, number: int, stopwatch: Stopwatch) -> None:
        """Wait for a bucket's new parameters: the compute stream on a device, else the host."""
        pending = self._gathering.get(number)
        if pending is not None:
            with stopwatch.span("gather", number):
                pending.wait(self._ranks)
            del self._gathering[number]
        self.stream_waits.wait_before(Operation.USE, number)


def _runs(state: BucketState, active: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the (start, end) of each run of active parameters that are neighbours in the shard.

    A run includes the padding between its parameters. A shard that is only padding has no runs.
    """
    segments = state.segments
    rows = np.flatnonzero(active[segments.positions])
    first = np.diff(rows, prepend=-2) > 1
    last = np.append(first[1:], True)[: rows.size]
    starts = segments.shard_starts[rows[first]]
    ends = (segments.shard_starts + segments.numels)[rows[last]]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
