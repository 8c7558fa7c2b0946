"""What one step does, on which lane, and what each task waits for: a value, fixed for a layout.

    lane      who works there              tasks of bucket b
    compute   the model's own stream       GRADIENT  PACK              RELEASE          USE
    reduce    the collective of gradients            REDUCE
    D2H       copies to the host                       COPY_D2H
    update    the update thread                           SUM_SQUARES   UPDATE
    H2D       copies to the device                                        COPY_H2D
    gather    the collective of parameters                                  GATHER

Tasks of one lane run in the order in which they are issued. Between lanes nothing is ordered but by
a wait of this schedule, or by the one agreement of the step: it comes after every SUM_SQUARES and
before every UPDATE. Where parameters are in host memory there are no copies and no streams: what is
launched is over at once, a collective is waited for by its own handle, and of these waits only
those for an UPDATE do anything.

No task waits for a task of the step before. A backward begins when every USE has been waited for,
so that on the compute lane all of them come before the first GRADIENT; and every UPDATE comes after
a COPY_D2H that has waited for a GRADIENT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import NamedTuple

from offload_adam.layout.state_plan import StatePlan


class Lane(Enum):
    """A place where tasks run one after the other."""

    COMPUTE = "compute"
    REDUCE = "reduce"
    D2H = "D2H copy"
    UPDATE = "update"
    H2D = "H2D copy"
    GATHER = "gather"


class Operation(Enum):
    """One kind of work on one bucket.

    GRADIENT: backward writes the gradients, as autograd left them.
    PACK: they are copied, end to end, into a slot on their device.
    REDUCE: the slot is averaged over the ranks.
    COPY_D2H: this rank's shard of them is copied to the host.
    SUM_SQUARES: its block sums are taken.
    RELEASE: `step()` is reached: the model has done its last reading of the parameters.
    UPDATE: the shard's state and parameters are updated, on the host or on the device.
    COPY_H2D: this rank's shard of the parameters is copied to the device.
    GATHER: the other ranks' shards come.
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

    @property
    def lane(self) -> Lane:
        """Where it runs, but see `Schedule.lane_of`."""
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
    """The tasks of one step on both sides of its one agreement, and what they wait for.

    before_agreement: every task until the agreement, in the order in which the tasks are issued:
        bucket by bucket as backward completes them, then the sums of squares of `on_device`.
    after_agreement: every other task, in the order in which the overlapped step issues the tasks of
        each lane: the host's updates, the device's updates, and what the next forward needs, each
        in forward order. The sequential step finishes one bucket after the other instead.
    waits: for each task the earlier tasks of other lanes that must be over. One for an UPDATE is
        made by the thread that issues the waiting task, all others by the task's own lane.
    on_device: buckets whose state is on the device of their parameters. What the update thread
        does for others, the compute lane does for them.
    reduce_slots, staging_slots: which slot of its kind's ring a bucket uses.
    """

    before_agreement: tuple[Task, ...]
    after_agreement: tuple[Task, ...]
    waits: Mapping[Task, tuple[Task, ...]]
    reduce_slots: Mapping[int, int]
    staging_slots: Mapping[int, int]
    on_device: frozenset[int]

    def lane_of(self, task: Task) -> Lane:
        """Return where a task runs."""
        lane = task.operation.lane
        return Lane.COMPUTE if lane is Lane.UPDATE and task.bucket in self.on_device else lane

    @property
    def forward_order(self) -> tuple[int, ...]:
        """The buckets as the next forward needs them."""
        return tuple(t.bucket for t in self.after_agreement if t.operation is Operation.USE)


def plan_schedule(
    plans: Sequence[StatePlan], *, num_reduce_slots: int, num_staging_slots: int
) -> Schedule:
    """Return the schedule for these buckets.

    Args:
        plans: in the order in which backward completes the buckets.
        num_reduce_slots, num_staging_slots: slots in the ring of each bucket key.
    """
    forward = plans[::-1]
    reduce_slots, earlier_packed = _deal([p for p in plans if p.uses_ring], num_reduce_slots)
    staging_slots, earlier_staged = _deal(
        [plan for plan in forward if plan.stages_parameters], num_staging_slots
    )
    before: dict[Task, tuple[Task, ...]] = {}
    after: dict[Task, tuple[Task, ...]] = {}
    for plan in plans:
        before |= _tasks_before_agreement(plan, earlier_packed.get(plan.bucket.index))
    for plan in forward:
        after |= _tasks_after_agreement(plan, earlier_staged.get(plan.bucket.index))
    on_device = frozenset(plan.bucket.index for plan in plans if not plan.location.is_host)
    turn = partial(_turn_of, on_device=on_device)
    schedule = Schedule(
        tuple(sorted(before, key=turn)),
        tuple(sorted(after, key=turn)),
        before | after,
        reduce_slots,
        staging_slots,
        on_device,
    )
    return replace(schedule, waits={task: _of_others(schedule, task) for task in schedule.waits})


_TURNS = {Operation.UPDATE: 1, Operation.COPY_H2D: 1, Operation.GATHER: 3, Operation.USE: 3}
_TURN_ON_DEVICE = 2


def _turn_of(task: Task, on_device: frozenset[int]) -> int:
    """Return the turn of a task on its side of the agreement: all buckets take each turn together.

    The device's updates come after the host's: these are submitted to the update thread, which
    works on them while the calling thread launches the device's.
    """
    if task.operation.lane is Lane.UPDATE and task.bucket in on_device:
        return _TURN_ON_DEVICE
    return _TURNS.get(task.operation, 0)


def _of_others(schedule: Schedule, task: Task) -> tuple[Task, ...]:
    """Return the waits of a task that its own lane does not make needless."""
    lane = schedule.lane_of(task)
    return tuple(w for w in schedule.waits[task] if schedule.lane_of(w) is not lane)


def ring_nbytes(
    plans: Sequence[StatePlan],
    nbytes_of: Callable[[StatePlan], int],
    *,
    num_slots: int,
) -> int:
    """Return the bytes of the slots of a ring, each as large as the largest bucket that uses it.

    Args:
        plans: those that use a slot, in the order in which they do.
        nbytes_of: what a bucket takes in its slot.
    """
    slots, _ = _deal(plans, num_slots)
    largest: dict[tuple[str, int], int] = {}
    for plan in plans:
        key = plan.bucket.bucket_key, slots[plan.bucket.index]
        largest[key] = max(largest.get(key, 0), nbytes_of(plan))
    return sum(largest.values())


def _deal(plans: Sequence[StatePlan], num_slots: int) -> tuple[dict[int, int], dict[int, int]]:
    """Deal slots out in turn; return each bucket's, and the bucket that had it before, if any."""
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
    """Return a bucket's tasks before the agreement, each with what it waits for.

    Args:
        earlier: the bucket whose gradients had this slot of the ring before, if any.
    """
    number = plan.bucket.index
    source = Task(Operation.GRADIENT, number)
    tasks: dict[Task, tuple[Task, ...]] = {source: ()}
    if plan.packs:
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
    """Return a bucket's tasks after the agreement, each with what it waits for.

    The H2D copy is issued by the thread that has made the update, and so needs no wait for it.

    Args:
        earlier: the bucket whose parameters had this staging slot before, if any.
    """
    number = plan.bucket.index
    emptied = () if earlier is None else (Task(Operation.COPY_H2D, earlier),)
    tasks: dict[Task, tuple[Task, ...]] = {Task(Operation.UPDATE, number): emptied}
    if plan.is_offloaded:
        tasks[Task(Operation.RELEASE, number)] = ()
        # Only the first H2D copy of a step needs this wait, but which copy is first depends on the
        # step's gradients. Where the host has waited for the sum of squares of a bucket that is
        # kept on the device, no copy needs it; but not every step, nor every rank, has such a sum.
        tasks[Task(Operation.COPY_H2D, number)] = (Task(Operation.RELEASE, number),)
    ready = tuple(task for task in tasks if task.operation is not Operation.RELEASE)
    if plan.gathers:
        tasks[Task(Operation.GATHER, number)] = ready
        ready = (Task(Operation.GATHER, number),)
    tasks[Task(Operation.USE, number)] = ready
    return tasks
