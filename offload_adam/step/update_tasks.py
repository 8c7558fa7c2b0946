"""The tasks that update one bucket, each with the waits that `layout.schedule` gives it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from offload_adam.step.messages import Launches, UpdateInputs, UpdatePart
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.transfer.collectives import Collectives, PendingCollective
from offload_adam.transfer.slots import Rings
from offload_adam.transfer.stream_waits import StreamWaits


@dataclass(frozen=True, slots=True)
class PreparedUpdate:
    """The update of one bucket in one step, before it runs.

    gradients: kept, because launches have only addresses of them.
    param_out: (shard_numel,) receives the 16-bit parameters; None if the kernel writes none.
    launches: its parts, in the order in which they run.
    runs: (start, end) of the shard's elements that are copied to the device.
    stages_master: H2D copies read master weights from a staging slot.
    """

    state: BucketState
    gradients: BucketGradients
    param_out: torch.Tensor | None
    launches: Launches
    runs: Sequence[tuple[int, int]]
    stages_master: bool


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
        """Update this rank's shard of a bucket, and issue the H2D copies of its parameters."""
        start_s = time.perf_counter()
        update = self.prepare(number, gradients, active, inputs)
        is_host = update.state.plan.location.is_host
        phase = "update" if is_host else "device update"
        stopwatch.add(phase, time.perf_counter() - start_s)
        for part in update.launches.parts:
            self.launch(update, part, stopwatch)
            self.finish(update, part, stopwatch)

    def prepare(
        self,
        number: int,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        inputs: UpdateInputs,
    ) -> PreparedUpdate:
        """Compute all arguments of a bucket's update. Never waits, and modifies nothing."""
        state = self.states[number]
        param_out = None
        if state.plan.writes_parameters:
            param_out = self._staging_slot(state) if state.plan.is_offloaded else state.shard
        launches = self.updates[number].prepare(state, gradients, active, inputs, param_out)
        runs = _runs(state, active) if state.plan.is_offloaded else []
        # Without runs, this step may have had no D2H copy for which the host waited: an H2D copy of
        # the previous step may still read the slot.
        stages_master = param_out is None and bool(runs) and state.plan.stages_parameters
        return PreparedUpdate(state, gradients, param_out, launches, runs, stages_master)

    def launch(self, update: PreparedUpdate, part: UpdatePart, stopwatch: Stopwatch) -> None:
        """Update a part of this rank's shard of a bucket, once nothing else uses its memory."""
        state = update.state
        number, is_host = state.layout.index, state.plan.location.is_host
        if part.start == 0:
            self._await_turn(state, stopwatch)
        with stopwatch.span("update" if is_host else "device update", number):
            part.run()
            if not is_host:
                self.stream_waits.record(Operation.UPDATE, number)
        if update.stages_master:
            # The master is not page-locked: CUDA would block the thread that issues the copy for
            # the whole copy.
            with stopwatch.span("H2D copy", number):
                self.stage(state, part.start, part.end)

    def _await_turn(self, state: BucketState, stopwatch: Stopwatch) -> None:
        """Wait for the staging slot that the update writes, and for a checkpoint of the bucket."""
        number = state.layout.index
        with stopwatch.span("H2D copy", number) if state.plan.is_offloaded else nullcontext():
            # The kernel writes the staging slot from this thread. So this thread, not a stream,
            # waits until the H2D copy of the bucket that used the slot before has read it. That
            # copy has been issued: see `UpdatePipeline`.
            self.stream_waits.wait_before(Operation.UPDATE, number)
        if self._snapshot_lock.holds(number):
            with stopwatch.span("checkpoint wait", number):
                self._snapshot_lock.wait_until_free(number)

    def _staging_slot(self, state: BucketState) -> torch.Tensor:
        """Return the host slot from which a bucket's parameters are copied to the device."""
        slot = self.stream_waits.schedule.staging_slots[state.layout.index]
        return self._rings.staging_slot(state.layout.bucket_key, slot, state.layout.shard_numel)

    def stage(self, state: BucketState, start: int, end: int) -> None:
        """Copy elements [start, end) of a shard's master weights, or high halves, to its slot."""
        slot, update = self._staging_slot(state), self.updates[state.layout.index]
        assert not isinstance(update, DeviceUpdate)
        update.fold(slot[start:end], state.planes.master_weight[start:end], adds=False)

    def finish(self, update: PreparedUpdate, part: UpdatePart, stopwatch: Stopwatch) -> None:
        """Issue the H2D copy of what a part has updated. After the last part, count the step."""
        if update.state.plan.is_offloaded:
            with stopwatch.span("H2D copy", update.state.layout.index):
                self._copy_h2d(update, part)
        if part is update.launches.parts[-1]:
            update.launches.count_step()

    def _copy_h2d(self, update: PreparedUpdate, part: UpdatePart) -> None:
        state = update.state
        number = state.layout.index
        if update.param_out is not None:
            source = update.param_out
        elif update.stages_master:
            source = self._staging_slot(state)
        else:
            source = state.planes.master_weight

        bounds = [(max(low, part.start), min(high, part.end)) for low, high in update.runs]
        sources = [source[start:end] for start, end in bounds if start < end]
        targets = [state.shard[start:end] for start, end in bounds if start < end]

        def copy() -> None:
            for target, one in zip(targets, sources, strict=True):
                target.copy_(one, non_blocking=True)

        # The H2D stream first waits for RELEASE: the model may still read the old parameters. Each
        # part records the event of the bucket again, so that it comes after all of them.
        self.stream_waits.run(Operation.COPY_H2D, number, copy, reads=sources, writes=targets)

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
