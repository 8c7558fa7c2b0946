"""Let the detector see what the host does with memory, which no stream is told of."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.gradient_copy import GradientCopier, GradientCopy
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Lane, Operation, Task
from offload_adam.memory.arena import HostArena
from offload_adam.params.bucket import BucketState
from offload_adam.step.messages import UpdateMasks
from offload_adam.step.tasks import BucketUpdate, Tasks
from offload_adam.transfer.stream_waits import StreamWaits
from offload_adam.transfer.streams import Streams
from tests.simulation.backend import SimulatedStreams
from tests.simulation.machine import Machine
from tests.simulation.memory import poison


class WatchedUpdate:
    """An update whose reading and writing of a bucket's planes is noted."""

    def __init__(self, inner: BucketUpdate, machine: Machine) -> None:
        self._inner = inner
        self._machine = machine

    def reserve(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        self._inner.reserve(state, gradients, lazy=lazy)

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        self._look("sum of squares", state, gradients)
        return self._inner.sum_of_squares(state, gradients)

    def squares_by_position(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.float64]:
        self._look("sum of squares", state, gradients)
        return self._inner.squares_by_position(state, gradients)

    def non_finite_positions(
        self, state: BucketState, gradients: BucketGradients
    ) -> npt.NDArray[np.int64]:
        self._look("search", state, gradients)
        return self._inner.non_finite_positions(state, gradients)

    def _look(self, what: str, state: BucketState, gradients: BucketGradients) -> None:
        """Note a reading whose result the host has when it returns.

        Where there is nothing to read on a device, the host does not wait for it.
        """
        name = f"{what} of bucket {state.layout.index}"
        found = _gradients(state, gradients, gradients.readable)
        if state.plan.location.is_host:
            self._machine.touch(name, found)
        elif found:
            self._machine.launch(Lane.COMPUTE, lambda: None, name, reads=found)
            self._machine.mark(Lane.COMPUTE).synchronize()

    def update(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        masks: UpdateMasks,
        param_out: torch.Tensor | None,
    ) -> None:
        planes = state.planes
        written = _parts(state, active, planes.master_weight, planes.exp_avg, planes.exp_avg_sq)
        slot = [] if param_out is None else _parts(state, active, param_out)
        reads = _gradients(state, gradients, active)
        name = f"update of bucket {state.layout.index}"
        reads, writes = [*reads, *written], [*written, *slot]
        if not state.plan.location.is_host:
            update = partial(self._inner.update, state, gradients, active, masks, param_out)
            self._machine.launch(Lane.COMPUTE, update, name, reads=reads, writes=writes)
            return
        self._machine.touch(name, reads, writes)
        for part in slot:
            poison(part)
        self._inner.update(state, gradients, active, masks, param_out)


def _parts(
    state: BucketState, active: npt.NDArray[np.bool_], *planes: torch.Tensor
) -> list[torch.Tensor]:
    """Return the parts of planes that an update of the active parameters touches."""
    segments = state.segments
    chosen = active[segments.positions]
    starts, numels = segments.shard_starts[chosen].tolist(), segments.numels[chosen].tolist()
    places = list(zip(starts, numels, strict=True))
    return [plane[start : start + numel] for plane in planes for start, numel in places]


def _gradients(
    state: BucketState, gradients: BucketGradients, chosen: npt.NDArray[np.bool_]
) -> list[torch.Tensor]:
    """Return the gradients of the chosen parameters' segments, where they lie."""
    rows = np.flatnonzero(chosen[state.segments.positions]).tolist()
    return [gradients.segment_of(state, row) for row in rows]


class WatchedCopier(GradientCopier):
    """A gradient copy whose folding, by the host, is noted.

    Owns nothing of its own: everything is the inner copy's.
    """

    def __init__(self, inner: GradientCopier, machine: Machine) -> None:
        self.__dict__.update(inner.__dict__)
        self._machine = machine

    def finish(
        self, gradient_copy: GradientCopy, streams: Streams, stream_waits: StreamWaits
    ) -> None:
        """Finish the copy; what the host reads and writes is ordered as when this returns."""
        if not gradient_copy.state.plan.location.is_host:
            super().finish(gradient_copy, streams, stream_waits)
            return
        folds, pieces, in_pool = (
            not gradient_copy.is_issued,
            list(gradient_copy.pieces),
            gradient_copy.pooled_slot,
        )
        through = None
        if isinstance(streams, SimulatedStreams):
            through = self._buffer(pieces[0].source.dtype, 0, HostArena)
        super().finish(gradient_copy, streams, stream_waits)
        shard = gradient_copy.state.planes.gradient_shard
        assert shard is not None
        if folds:
            # A slot of the pool has gone back meanwhile, and was noted then.
            direct = [] if in_pool is not None else [piece.source for piece in pieces]
            read = direct if through is None else [through]
            name = f"fold of bucket {gradient_copy.state.layout.index}"
            self._machine.touch(name, reads=read, writes=[shard])
        if folds and through is not None:
            poison(through)


def watch_staging(tasks: Tasks, machine: Machine) -> None:
    """Let copies of fp32 parameters to their slots, which the host makes, be noted."""
    stage = tasks.stage

    def watched(state: BucketState) -> torch.Tensor:
        slot = stage(state)
        name = f"staging of bucket {state.layout.index}"
        machine.touch(name, reads=[state.planes.master_weight], writes=[slot])
        return slot

    tasks.stage = watched  # type: ignore[method-assign]


def name_tasks(stream_waits: StreamWaits, machine: Machine) -> None:
    """Let what is launched bear the name of the task that has begun last on its thread."""
    begin = stream_waits.begin

    def named(operation: Operation, bucket: int) -> None:
        machine.task = name_of(Task(operation, bucket))
        begin(operation, bucket)

    stream_waits.begin = named  # type: ignore[method-assign]


def name_of(task: Task) -> str:
    """Return a task's name in reports."""
    return f"{task.operation.value} of bucket {task.bucket}"
