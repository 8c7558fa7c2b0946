"""The waits of a schedule, one by one."""

from __future__ import annotations

from collections.abc import Iterator

from offload_adam.layout.schedule import Operation, Schedule, Task

Kind = tuple[Operation, Operation]
"""The operation that waits, and the operation that it waits for."""


def waits_of(schedule: Schedule) -> Iterator[tuple[Task, Task]]:
    """Yield each task that waits with each task that it waits for."""
    for task, waits in schedule.waits.items():
        for waited in waits:
            yield task, waited


def kinds_of(schedule: Schedule) -> set[Kind]:
    """Return the kinds of all waits."""
    return {(task.operation, waited.operation) for task, waited in waits_of(schedule)}
