"""What one step does, in which order: fixed for a layout; each step adds only masks to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from offload_adam.layout.flat import Bucket


class Operation(Enum):
    """One kind of work on one bucket."""

    SUM_SQUARES = "sum_squares"
    UPDATE = "update"
    COPY_BACK = "copy_back"
    GATHER = "gather"


@dataclass(frozen=True, slots=True)
class Task:
    """One operation on one bucket."""

    operation: Operation
    bucket: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tasks of a step on both sides of its one agreement.

    Before it, reduced buckets are measured in the order in which backward completes them; after it,
    they are updated in forward order, so that the next forward can start on the first ones. The
    reduction itself is driven by backward, not by this list.
    """

    before_agreement: tuple[Task, ...]
    after_agreement: tuple[Task, ...]


def plan_schedule(buckets: Sequence[Bucket], *, copies_back: frozenset[int]) -> Schedule:
    """Return the schedule for these buckets.

    Args:
        buckets: in the order in which backward completes them.
        copies_back: indices of the buckets whose parameters live on a device.
    """
    before = [Task(Operation.SUM_SQUARES, bucket.index) for bucket in buckets]
    after = []
    for bucket in reversed(buckets):
        after.append(Task(Operation.UPDATE, bucket.index))
        if bucket.index in copies_back:
            after.append(Task(Operation.COPY_BACK, bucket.index))
        if bucket.world_size > 1:
            after.append(Task(Operation.GATHER, bucket.index))
    return Schedule(tuple(before), tuple(after))
