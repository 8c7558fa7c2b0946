"""The tasks of one step, the lane of each task, and its waits. They depend only on the layout.

    lane      runs on                      tasks of bucket b
    compute   the model's own stream       GRADIENT  PACK              RELEASE          USE
    reduce    the collective of gradients            REDUCE
    D2H       copies to the host                       COPY_D2H
    update    the update thread                           SUM_SQUARES   UPDATE
    H2D       copies to the device                                        COPY_H2D
    gather    the collective of parameters                                  GATHER

Tasks of one lane run in the order in which they are issued. Tasks of different lanes are ordered
only by the waits of this schedule and by the one agreement of the step, which comes after every
SUM_SQUARES and before every UPDATE.

If parameters are in host memory, there are no copies and no streams. A launched task has then
finished when the launch returns, and the host waits for collectives by their handles. So only the
waits for an UPDATE have an effect.

No task needs to wait for a task of the previous step. A backward starts after every USE, so on the
compute lane all USE tasks come before the first GRADIENT. Every UPDATE comes after a COPY_D2H that
has waited for a GRADIENT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import NamedTuple

from offload_adam.layout.state_plan import StatePlan


class Lane(Enum):
    """A stream or thread on which tasks run one after another."""

    COMPUTE = "compute"
    REDUCE = "reduce"
    D2H = "D2H copy"
    UPDATE = "update"
    H2D = "H2D copy"
    GATHER = "gather"


class Operation(Enum):
    """One kind of work on one bucket.

    GRADIENT: backward writes the gradients.
    PACK: copy the gradients, concatenated, into a slot on their device.
    REDUCE: average the slot over the ranks.
    COPY_D2H: copy this rank's shard of the gradients to the host.
    SUM_SQUARES: compute the sums of squares of the shard's blocks.
    RELEASE: marks the call of `step()`, after the model's last read of the parameters.
    UPDATE: update the shard's state and parameters, on the host or on the device.
    COPY_H2D: copy this rank's shard of the parameters to the device.
    GATHER: all-gather the parameters.
    USE: the next forward reads the parameters.
    """

    GRADIENT = "gradient"
    PACK = "pack"
    REDUCE = "reduce"
    COPY_D2H = "copy_d2h"
    SUM_SQUARES = "sum_squares"
    RELEASE = "release"
    UPDATE = "update"
    COPY_H2D = "copy_h2d"
    GATHER = "gather"
    USE = "use"

    # That of `Enum` is Python, and the update thread reads dictionaries of tasks between kernels.
    __hash__ = object.__hash__

    @property
    def lane(self) -> Lane:
        """The lane if the state is in host memory. See `Schedule.lane_of` for all cases."""
        return _LANES[self]


_LANES = {
    Operation.GRADIENT: Lane.COMPUTE,
    Operation.PACK: Lane.COMPUTE,
    Operation.REDUCE: Lane.REDUCE,
    Operation.COPY_D2H: Lane.D2H,
    Operation.SUM_SQUARES: Lane.UPDATE,
    Operation.RELEASE: Lane.COMPUTE,
    Operation.UPDATE: Lane.UPDATE,
    Operation.COPY_H2D: Lane.H2D,
    Operation.GATHER: Lane.GATHER,
    Operation.USE: Lane.COMPUTE,
}


class Task(NamedTuple):
    """One operation on one bucket."""

    operation: Operation
    bucket: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tasks of one step before and after its one agreement, and their waits.

    before_agreement: the tasks until the agreement, in the order in which they are issued: bucket
        by bucket as backward completes them, then SUM_SQUARES of the buckets in `on_device`.
    after_agreement: the other tasks, in the order in which the overlapped step issues them on each
        lane: updates on the host, updates on the device, then GATHER and USE, each in forward
        order. The sequential step finishes one bucket after another instead.
    waits: for each task, the earlier tasks of other lanes that must have finished. The thread that
        issues a task waits for an UPDATE; the task's lane waits for all other tasks.
    on_device: buckets whose state is on the device of their parameters. Their SUM_SQUARES and
        UPDATE run on the compute lane instead of the update lane.
    reduce_slots, staging_slots: slot of each bucket in its ring, by bucket index.
    """

    before_agreement: tuple[Task, ...]
    after_agreement: tuple[Task, ...]
    waits: Mapping[Task, tuple[Task, ...]]
    reduce_slots: Mapping[int, int]
    staging_slots: Mapping[int, int]
    on_device: frozenset[int]

    def lane_of(self, task: Task) -> Lane:
        """Return the lane of a task."""
        lane = task.operation.lane
        return Lane.COMPUTE if lane is Lane.UPDATE and task.bucket in self.on_device else lane

    @property
    def forward_order(self) -> tuple[int, ...]:
        """Bucket indices in the order in which the next forward reads the buckets."""
        return tuple(t.bucket for t in self.after_agreement if t.operation is Operation.USE)


def plan_schedule(
    plans: Sequence[StatePlan], *, num_reduce_slots: int, num_staging_slots: int
) -> Schedule:
    """Return the schedule for these buckets.

    Args:
        plans: in the order in which backward completes the buckets.
        num_reduce_slots, num_staging_slots: number of slots in the ring of each bucket key.
    """
    forward = plans[::-1]
    reduce_slots, earlier_packed = _assign_slots(
        [p for p in plans if p.uses_ring], num_reduce_slots
    )
    staging_slots, earlier_staged = _assign_slots(
        [plan for plan in forward if plan.stages_parameters], num_staging_slots
    )
    before: dict[Task, tuple[Task, ...]] = {}
    after: dict[Task, tuple[Task, ...]] = {}
    for plan in plans:
        before |= _tasks_before_agreement(plan, earlier_packed.get(plan.bucket.index))
    for plan in forward:
        after |= _tasks_after_agreement(plan, earlier_staged.get(plan.bucket.index))
    on_device = frozenset(plan.bucket.index for plan in plans if not plan.location.is_host)
    order = partial(_order_of, on_device=on_device)
    schedule = Schedule(
        tuple(sorted(before, key=order)),
        tuple(sorted(after, key=order)),
        before | after,
        reduce_slots,
        staging_slots,
        on_device,
    )
    return replace(
        schedule, waits={task: _waits_on_other_lanes(schedule, task) for task in schedule.waits}
    )


_ORDER = {Operation.UPDATE: 1, Operation.COPY_H2D: 1, Operation.GATHER: 3, Operation.USE: 3}
_ORDER_ON_DEVICE = 2


def _order_of(task: Task, on_device: frozenset[int]) -> int:
    """Return the sort key of a task among those before, or after, the agreement.

    It is equal for all buckets, so that sorting keeps their order.
    """
    # Updates on the device come after those on the host: the update thread already runs updates on
    # the host while the calling thread launches those on the device.
    if task.operation.lane is Lane.UPDATE and task.bucket in on_device:
        return _ORDER_ON_DEVICE
    return _ORDER.get(task.operation, 0)


def _waits_on_other_lanes(schedule: Schedule, task: Task) -> tuple[Task, ...]:
    """Return the waits of a task for other lanes. Tasks of one lane run in order anyway."""
    lane = schedule.lane_of(task)
    return tuple(w for w in schedule.waits[task] if schedule.lane_of(w) is not lane)


def ring_nbytes(
    plans: Sequence[StatePlan],
    nbytes_of: Callable[[StatePlan], int],
    *,
    num_slots: int,
) -> int:
    """Return the bytes of all slots of a ring. Each is as large as the largest bucket that uses it.

    Args:
        plans: buckets that use a slot, in the order of their use.
        nbytes_of: returns the bytes of a bucket in its slot.
    """
    slots, _ = _assign_slots(plans, num_slots)
    largest: dict[tuple[str, int], int] = {}
    for plan in plans:
        key = plan.bucket.bucket_key, slots[plan.bucket.index]
        largest[key] = max(largest.get(key, 0), nbytes_of(plan))
    return sum(largest.values())


def _assign_slots(
    plans: Sequence[StatePlan], num_slots: int
) -> tuple[dict[int, int], dict[int, int]]:
    """Assign slots to buckets in turn, separately for each bucket key.

    Returns:
        Two maps from bucket index: to its slot, and to the previous bucket in this slot, if any.
    """
    slots: dict[int, int] = {}
    earlier: dict[int, int] = {}
    for bucket_key in dict.fromkeys(plan.bucket.bucket_key for plan in plans):
        members = [plan.bucket.index for plan in plans if plan.bucket.bucket_key == bucket_key]
        for position, number in enumerate(members):
            slots[number] = position % num_slots
            if position >= num_slots:
                earlier[number] = members[position - num_slots]
    return slots, earlier


def _tasks_before_agreement(plan: StatePlan, earlier: int | None) -> dict[Task, tuple[Task, ...]]:
    """Return a bucket's tasks before the agreement, each with its waits.

    Args:
        earlier: the previous bucket in this slot of the ring, if any.
    """
    number = plan.bucket.index
    source = Task(Operation.GRADIENT, number)
    tasks: dict[Task, tuple[Task, ...]] = {source: ()}
    if plan.packs:
        # The slot must not be overwritten before its previous content is on the host.
        emptied = () if earlier is None else (Task(Operation.COPY_D2H, earlier),)
        source = Task(Operation.PACK, number)
        tasks[source] = emptied
    if plan.gradient.averaged:
        tasks[Task(Operation.REDUCE, number)] = (source,)
        source = Task(Operation.REDUCE, number)
    if plan.is_offloaded:
        tasks[Task(Operation.COPY_D2H, number)] = (source,)
        source = Task(Operation.COPY_D2H, number)
    tasks[Task(Operation.SUM_SQUARES, number)] = (source,)
    return tasks


def _tasks_after_agreement(plan: StatePlan, earlier: int | None) -> dict[Task, tuple[Task, ...]]:
    """Return a bucket's tasks after the agreement, each with its waits.

    Args:
        earlier: the previous bucket in this staging slot, if any.
    """
    number = plan.bucket.index
    # The kernel writes new parameters into the slot, which the previous H2D copy still reads.
    emptied = () if earlier is None else (Task(Operation.COPY_H2D, earlier),)
    tasks: dict[Task, tuple[Task, ...]] = {Task(Operation.UPDATE, number): emptied}
    if plan.is_offloaded:
        tasks[Task(Operation.RELEASE, number)] = ()
        # The copy overwrites parameters, so it must come after RELEASE: the model has then read
        # them for the last time. Only the first H2D copy of a step needs this wait, and none if the
        # host has waited for SUM_SQUARES of a bucket on the device. Both depend on the step's
        # gradients and on the rank, so every copy waits. No wait for UPDATE is needed: the thread
        # that has run the update issues the copy.
        tasks[Task(Operation.COPY_H2D, number)] = (Task(Operation.RELEASE, number),)
    ready = tuple(task for task in tasks if task.operation is not Operation.RELEASE)
    if plan.gathers:
        tasks[Task(Operation.GATHER, number)] = ready
        ready = (Task(Operation.GATHER, number),)
    tasks[Task(Operation.USE, number)] = ready
    return tasks
