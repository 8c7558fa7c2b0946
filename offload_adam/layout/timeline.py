"""Predict start and end of each task of one step from the durations of the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from offload_adam.layout.schedule import Lane, Operation, Schedule, Task

_MODEL = (Operation.GRADIENT, Operation.USE)
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Interval(NamedTuple):
    """One task on its lane, in seconds from the start of the backward."""

    task: Task
    lane: Lane
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step: the backward, the agreement, the updates and the next forward.

    intervals: in the order of the schedule, including tasks with zero duration.
    """

    intervals: tuple[Interval, ...]

    @property
    def end_s(self) -> float:
        """Seconds that the step takes, until the next forward has ended."""
        return max((interval.end_s for interval in self.intervals), default=0.0)

    @property
    def model_s(self) -> float:
        """Seconds that forward and backward take without the optimizer."""
        return sum(i.end_s - i.start_s for i in self.intervals if i.task.operation in _MODEL)

    @property
    def exposed_s(self) -> float:
        """Seconds by which a step is longer than forward and backward."""
        return max(0.0, self.end_s - self.model_s)

    def draw(self, width: int = 100) -> str:
        """Return a line of text for each lane, with `width` characters for the whole step.

        Each character is the bucket that takes most of its time slice, named 0-9, a-z, A-Z and then
        0 again; "." for none.
        """
        lines = []
        for lane in Lane:
            members = [interval for interval in self.intervals if interval.lane is lane]
            if any(interval.end_s > interval.start_s for interval in members):
                lines.append(f"{lane.value:>9} {_drawn(members, self.end_s, width)}")
        scale = f"0 s{f'{self.end_s:.4g} s':>{width - 3}}"
        return "\n".join([*lines, f"{'':>9} {scale}"]) + "\n"


def predict_timeline(
    schedule: Schedule,
    seconds_of: Callable[[Task], float],
    parts_of: Callable[[int], int] = lambda bucket: 1,
) -> Timeline:
    """Start every task as soon as its lane, its bucket and its waits allow.

    A task starts after the previous task on its lane, the previous task of its bucket and its
    waits. A task after the agreement also starts after all tasks before the agreement. If a bucket
    is updated in parts, its H2D copy begins after the first part, and its last part is copied after
    the last.

    Args:
        seconds_of: returns the duration of a task. GRADIENT and USE are the bucket's parts of the
            model's backward and forward.
        parts_of: returns the number of parts in which a bucket is updated.

    Source: list scheduling (Graham, "Bounds on multiprocessing timing anomalies").
    """
    ends: dict[Task, float] = {}
    free: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
    of_bucket: dict[int, float] = {}
    intervals: list[Interval] = []

    def run(tasks: Sequence[Task], earliest: float) -> None:
        for task in tasks:
            lane = schedule.lane_of(task)
            before = of_bucket.get(task.bucket, 0.0)
            waits = [ends[waited] for waited in schedule.waits[task]]
            duration, num_parts = seconds_of(task), parts_of(task.bucket)
            end = 0.0
            if task.operation is Operation.COPY_H2D and num_parts > 1:
                before -= seconds_of(Task(Operation.UPDATE, task.bucket)) * (1 - 1 / num_parts)
                end = of_bucket[task.bucket] + duration / num_parts
            start = max([earliest, free[lane], before, *waits])
            end = max(end, start + duration)
            ends[task] = free[lane] = of_bucket[task.bucket] = end
            intervals.append(Interval(task, lane, start, end))

    run(schedule.before_agreement, 0.0)
    run(schedule.after_agreement, max(free.values()))
    return Timeline(tuple(intervals))


def _drawn(members: Sequence[Interval], end_s: float, width: int) -> str:
    """Return the characters of one lane."""
    cells, most = ["."] * width, [0.0] * width
    for task, _, start_s, stop_s in members:
        start, stop = start_s / end_s * width, stop_s / end_s * width
        for cell in range(int(start), min(width, math.ceil(stop))):
            share = min(stop, cell + 1) - max(start, cell)
            if share > most[cell]:
                cells[cell], most[cell] = _MARKS[task.bucket % len(_MARKS)], share
    return "".join(cells)
