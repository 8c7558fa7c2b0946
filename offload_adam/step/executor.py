"""The sequential executor: one task after the other, as the schedule lists them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.membership import Membership
from offload_adam.layout.schedule import Operation, Schedule, Task
from offload_adam.observe.place import HERE
from offload_adam.observe.spans import Spans
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.gradients import BucketGradients
from offload_adam.step.masks import UpdateMasks
from offload_adam.step.updates import Updates
from offload_adam.transfer.collectives import PendingCollective, gather_shards
from offload_adam.transfer.staging import StagingRing, record_event, wait_for_device


class SequentialExecutor:
    """Runs the two halves of a schedule, waiting for each task before the next.

    Owns: the staging rings through which 16-bit parameters go to a device.
    """

    def __init__(
        self,
        schedule: Schedule,
        states: Sequence[BucketState],
        updates: Updates,
        membership: Membership,
        rings: Mapping[torch.dtype, StagingRing],
    ) -> None:
        self._schedule = schedule
        self._states = states
        self._updates = updates
        self._membership = membership
        self._rings = rings
        self._staged: dict[int, tuple[int, torch.Tensor]] = {}
        self._gathering: list[tuple[int, PendingCollective]] = []

    def sum_of_squares(self, gradients: Sequence[BucketGradients]) -> float:
        """Return this rank's sum of squares in float64, bucket by bucket as scheduled."""
        total = 0.0
        for task in self._schedule.before_agreement:
            if task.operation is Operation.SUM_SQUARES:
                state = self._states[task.bucket]
                total += self._updates.of(state).sum_of_squares(state, gradients[task.bucket])
        return total

    def non_finite_indices(self, gradients: Sequence[BucketGradients]) -> npt.NDArray[np.int64]:
        """Return the indices of parameters whose gradient, in this rank's shard, is not finite."""
        found = [np.zeros(0, dtype=np.int64)]
        for state, bucket_gradients in zip(self._states, gradients, strict=True):
            update = self._updates.of(state)
            if not math.isfinite(update.sum_of_squares(state, bucket_gradients)):
                positions = update.non_finite_positions(state, bucket_gradients)
                found.append(state.indices[positions])
            found.append(state.indices[bucket_gradients.non_finite_rows()])
        return np.concatenate(found)

    def apply(self, gradients: Sequence[BucketGradients], masks: UpdateMasks, spans: Spans) -> None:
        """Update, copy back and gather every bucket that has an active parameter."""
        for task in self._schedule.after_agreement:
            state = self._states[task.bucket]
            active = masks.active[state.indices]
            if not active.any() or state.layout.numel == 0:
                if task.operation is Operation.UPDATE:
                    masks.count(state, active)
                continue
            self._run(task, state, gradients[task.bucket], active, masks, spans)
        with spans.span("gather"):
            for bucket, pending in self._gathering:
                with HERE.at("gather", bucket):
                    pending.wait(self._membership)
            self._gathering.clear()
            wait_for_device({state.device for state in self._states if state.offloaded})

    def _run(
        self,
        task: Task,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
        spans: Spans,
    ) -> None:
        if task.operation is Operation.UPDATE:
            with spans.span("update", task.bucket):
                rounded = self._target(state)
                self._updates.of(state).update(state, gradients, active, masks, rounded)
        elif task.operation is Operation.COPY_BACK:
            with spans.span("copy up", task.bucket):
                self._copy_back(state, active)
        elif task.operation is Operation.GATHER:
            with spans.span("gather", task.bucket):
                pending = gather_shards(
                    state.flat,
                    self._membership.data_group(state.device),
                    self._membership.rank,
                    self._membership.world_size,
                )
                self._gathering.append((task.bucket, pending))

    def _target(self, state: BucketState) -> torch.Tensor | None:
        """Return where the kernel writes the rounded parameters, None for an fp32 bucket."""
        if state.dtype == torch.float32:
            return None
        if not state.offloaded:
            return state.shard
        slot = self._rings[state.dtype].acquire(state.layout.shard_numel)
        self._staged[state.layout.index] = slot
        return slot[1]

    def _copy_back(self, state: BucketState, active: npt.NDArray[np.bool_]) -> None:
        """Copy the updated parameters of this shard to the device."""
        staged = self._staged.pop(state.layout.index, None)
        source = state.planes.master_weight if staged is None else staged[1]
        for start, end in _runs(state, active):
            state.shard[start:end].copy_(source[start:end], non_blocking=True)
        if staged is not None:
            self._rings[state.dtype].copied(staged[0], record_event(state.device))


def _runs(state: BucketState, active: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the stretches of the shard that hold active parameters; one where all are."""
    if active.all():
        return [(0, state.layout.shard_numel)]
    segments = state.segments
    chosen = active[segments.positions]
    starts, numels = segments.shard_starts[chosen], segments.numels[chosen]
    return [(int(start), int(start + numel)) for start, numel in zip(starts, numels, strict=True)]
