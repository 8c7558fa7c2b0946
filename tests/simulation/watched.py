"""Report the host's memory accesses to the detector; no stream sees these accesses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.gradients.gradient_transfer import GradientTransfer
from offload_adam.gradients.packed_copies import Piece
from offload_adam.gradients.segments import BucketGradients
from offload_adam.layout.schedule import Lane, Operation, Task
from offload_adam.params.bucket import BucketState
from offload_adam.step.device_norm import DeviceNorms
from offload_adam.step.device_update import DeviceUpdate
from offload_adam.step.host_update import HostUpdate
from offload_adam.step.messages import Launches, UpdateInputs, UpdatePart
from offload_adam.step.step import ShardedAdam
from offload_adam.step.update_tasks import BucketUpdate, UpdateTasks
from offload_adam.transfer.stream_waits import StreamWaits
from tests.simulation.machine import Machine
from tests.simulation.memory import poison


class WatchedUpdate:
    """An update that reports its reads and writes of a bucket's planes."""

    def __init__(self, inner: BucketUpdate, machine: Machine) -> None:
        self._inner = inner
        self._machine = machine

    def fold(self, shard: torch.Tensor, source: torch.Tensor, *, adds: bool) -> None:
        assert isinstance(self._inner, HostUpdate)
        self._inner.fold(shard, source, adds=adds)

    def allocate_for(self, state: BucketState, gradients: BucketGradients, *, lazy: bool) -> None:
        self._inner.allocate_for(state, gradients, lazy=lazy)

    def sum_of_squares(self, state: BucketState, gradients: BucketGradients) -> float:
        self._look("sum of squares", state, gradients)
        return self._inner.sum_of_squares(state, gradients)

    def start_norms(self, state: BucketState, gradients: BucketGradients) -> DeviceNorms:
        self._look("sum of squares", state, gradients)
        assert isinstance(self._inner, DeviceUpdate)
        return self._inner.start_norms(state, gradients)

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
        """Report a read of gradients whose result the host needs at once.

        On a device the host waits for the read, unless there is nothing to read.
        """
        name = f"{what} of bucket {state.layout.index}"
        found = _gradients(state, gradients, gradients.readable)
        if state.plan.location.is_host:
            self._machine.touch(name, found)
        elif found:
            self._machine.launch(Lane.COMPUTE, lambda: None, name, reads=found)
            self._machine.record(Lane.COMPUTE).synchronize()

    def prepare(
        self,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        inputs: UpdateInputs,
        param_out: torch.Tensor | None,
    ) -> Launches:
        launches = self._inner.prepare(state, gradients, active, inputs, param_out)
        parts = [
            part._replace(run=partial(self._update, part, state, gradients, active, param_out))
            for part in launches.parts
        ]
        return launches._replace(parts=parts)

    def _update(
        self,
        part: UpdatePart,
        state: BucketState,
        gradients: BucketGradients,
        active: npt.NDArray[np.bool_],
        param_out: torch.Tensor | None,
    ) -> None:
        planes, run = state.planes, part.run
        written = _parts(
            state, active, part, planes.master_weight, planes.exp_avg, planes.exp_avg_sq
        )
        slot = [] if param_out is None else _parts(state, active, part, param_out)
        reads = _gradients(state, gradients, active)
        name = f"update of bucket {state.layout.index}"
        reads, writes = [*reads, *written], [*written, *slot]
        if not state.plan.location.is_host:
            self._machine.launch(Lane.COMPUTE, run, name, reads=reads, writes=writes)
            return
        self._machine.touch(name, reads, writes)
        for piece in slot:
            poison(piece)
        run()


def _parts(
    state: BucketState, active: npt.NDArray[np.bool_], part: UpdatePart, *planes: torch.Tensor
) -> list[torch.Tensor]:
    """Return what a part of the update of the active parameters touches of these planes."""
    bounds = [
        (max(s.shard_start, part.start), min(s.shard_start + s.numel, part.end))
        for s in state.segments.select(active)
    ]
    return [plane[low:high] for plane in planes for low, high in bounds if low < high]


def _gradients(
    state: BucketState, gradients: BucketGradients, chosen: npt.NDArray[np.bool_]
) -> list[torch.Tensor]:
    """Return the gradients of the chosen parameters' segments, as views."""
    return [gradients.segment_gradient(state, segment) for segment in state.segments.select(chosen)]


def watch_folds(transfer: GradientTransfer, machine: Machine) -> None:
    """Report the host's casts and sums of gradients, and fill a buffer with NaN after its use."""
    fold = transfer.fold
    if fold is None:
        return

    def watched(shard: torch.Tensor, source: torch.Tensor, *, adds: bool) -> None:
        machine.touch(f"fold at {machine.task}", reads=[source], writes=[shard])
        fold(shard, source, adds=adds)
        if any(source.data_ptr() == b.data_ptr() for bs in transfer._buffers.values() for b in bs):
            machine.touch("the end of a buffer", writes=[source])
            poison(source)

    transfer.fold = watched


def watch_packing(transfer: GradientTransfer) -> None:
    """Fill the slot of small gradients with NaN after each copy: no copy may read older values."""
    copy = transfer._packed.copy

    def watched(pieces: Iterable[Piece], target: torch.Tensor, slot: torch.Tensor) -> None:
        copy(pieces, target, slot)
        slot.fill_(255)  # NaN in every dtype

    transfer._packed.copy = watched  # type: ignore[method-assign]


def watch_staging(tasks: UpdateTasks, machine: Machine) -> None:
    """Report the host's copies of fp32 parameters to their staging slots."""
    stage = tasks.stage

    def watched(state: BucketState, start: int, end: int) -> None:
        stage(state, start, end)
        name, slot = f"staging of bucket {state.layout.index}", tasks._staging_slot(state)
        machine.touch(name, reads=[state.planes.master_weight[start:end]], writes=[slot[start:end]])

    tasks.stage = watched  # type: ignore[method-assign]


def watch_order(core: ShardedAdam, wrong: list[str]) -> None:
    """Compare the order in which a lane's tasks are issued with the schedule's order.

    The detector cannot find a wrong order of all-gathers: it is no race, and mirrored ranks all
    have the same order.

    Args:
        wrong: gets a line for each task that is issued too late.
    """
    stream_waits, executor = core.stream_waits, core.executor
    apply = executor.apply
    last: dict[Lane, Task] = {}

    def watched_apply(*arguments: Any) -> None:
        # The step has waited for all updates and gathers of the step before.
        last.clear()
        apply(*arguments)

    def watched(begin: Callable[[Operation, int], None], operation: Operation, bucket: int) -> None:
        task, schedule = Task(operation, bucket), stream_waits.schedule
        if operation in (Operation.UPDATE, Operation.COPY_H2D, Operation.GATHER):
            lane, order = schedule.lane_of(task), schedule.after_agreement
            before = last.get(lane, task)
            if order.index(task) < order.index(before):
                wrong.append(f"{name_of(task)} is issued after {name_of(before)}")
            last[lane] = task
        begin(operation, bucket)

    patched: Any = stream_waits
    # Both, because a skipped bucket only calls `record`, and an update on the host does not.
    patched.wait_before = partial(watched, stream_waits.wait_before)
    patched.record = partial(watched, stream_waits.record)
    patched = executor
    patched.apply = watched_apply


def name_tasks(stream_waits: StreamWaits, machine: Machine) -> None:
    """Name launched work after the task that began last on the launching thread."""
    begin = stream_waits.wait_before

    def named(operation: Operation, bucket: int) -> None:
        machine.task = name_of(Task(operation, bucket))
        begin(operation, bucket)

    stream_waits.wait_before = named  # type: ignore[method-assign]


def name_of(task: Task) -> str:
    """Return a task's name in reports."""
    return f"{task.operation.value} of bucket {task.bucket}"
