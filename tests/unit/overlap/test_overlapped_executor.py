"""The order in which the overlapped executor waits and issues all-gathers, also ahead of need."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.budget import NUM_SLOTS_IN_FLIGHT
from offload_adam.layout.schedule import Operation, Task, plan_schedule
from offload_adam.layout.state_plan import StateLocation
from offload_adam.spans import Stopwatch
from offload_adam.step.executor import Executor
from offload_adam.step.update_thread import UpdateThread
from offload_adam.transfer.stream_waits import StreamWaits
from offload_adam.transfer.streams import HostStreams
from tests.support.plans import equal_plans
from tests.unit.overlap.lazy_worker import LazyJob, LazyWorker

NUM_BUCKETS = 4


class EagerWorker(LazyWorker):
    """An update thread that runs each job at once."""

    def submit(self, what: str, job: Callable[[], None]) -> LazyJob:
        given = super().submit(what, job)
        self.run_next()
        return given


class RecordedTasks:
    """Tasks that only record that they ran; a gather waits for its update, as scheduled."""

    def __init__(self, locations: Sequence[StateLocation] = (StateLocation.HOST,) * 4) -> None:
        plans = [
            replace(plan, location=location)
            for plan, location in zip(
                equal_plans(NUM_BUCKETS, numel=128, world_size=2), locations, strict=True
            )
        ]
        self.stream_waits = StreamWaits(RankGroup(), lambda device: HostStreams())
        schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2)
        devices = dict.fromkeys(range(NUM_BUCKETS), torch.device("cpu"))
        self.stream_waits.use_schedule(schedule, devices)
        self.states = [
            SimpleNamespace(indices=np.array([p.bucket.index]), layout=p.bucket, plan=p)
            for p in plans
        ]
        self.done: list[tuple[str, int]] = []

    def record_last_read(self) -> None:
        offloaded = [state.layout.index for state in self.states[::-1] if state.plan.is_offloaded]
        self.done += [("release", number) for number in offloaded]

    def update(self, number: int, *_: Any) -> None:
        self.done.append(("update", number))
        if self.states[number].plan.is_offloaded:
            self.done.append(("copy_h2d", number))

    def skip_copy_h2d(self, number: int) -> None:
        self.done.append(("skip", number))

    def gather(self, number: int, *_: Any) -> None:
        self.stream_waits.wait_for_update(Task(Operation.UPDATE, number))
        self.done.append(("gather", number))

    def wait_for_parameters(self, number: int, *_: Any) -> None:
        self.done.append(("use", number))


def begin(
    worker: Any, tasks: RecordedTasks | None = None, *, skipped: Collection[int] = ()
) -> tuple[Executor, RecordedTasks]:
    """Return an executor after `apply` of one step. Forward order is 3, 2, 1, 0."""
    tasks = tasks or RecordedTasks()
    executor = Executor(
        cast(Any, None), cast(Any, tasks), worker, RankGroup(), Stopwatch(), lambda number: None
    )
    tasks.stream_waits.wait_for_update = executor.wait_for_update
    active = np.array([number not in skipped for number in range(NUM_BUCKETS)])
    # These states have no step counts, which the executor would increase for a skipped bucket.
    inputs = cast(Any, SimpleNamespace(active=active, count_step=lambda state, active_here: None))
    gradients: list[Any] = [None] * NUM_BUCKETS
    executor.apply(gradients, inputs, Stopwatch())
    return executor, tasks


def names(tasks: RecordedTasks, name: str) -> list[int]:
    return [number for what, number in tasks.done if what == name]


def test_apply_returns_before_any_update_and_a_wait_runs_only_the_needed_ones() -> None:
    executor, tasks = begin(LazyWorker())
    assert tasks.done == []
    assert executor.is_pending
    executor.wait_for_buckets([3])
    assert tasks.done == [("update", 3), ("gather", 3), ("use", 3)]
    executor.wait_for_buckets([3])
    assert tasks.done == [("update", 3), ("gather", 3), ("use", 3)]


def test_earlier_gathers_are_issued_first_and_their_buckets_are_still_pending() -> None:
    executor, tasks = begin(LazyWorker())
    executor.wait_for_buckets([1])
    assert names(tasks, "gather") == [3, 2, 1]
    assert names(tasks, "use") == [1]
    executor.finish_updates()
    assert names(tasks, "gather") == [3, 2, 1, 0]
    assert names(tasks, "use") == [1, 3, 2, 0]
    assert not executor.is_pending


def test_the_next_gathers_are_issued_ahead_if_their_updates_have_finished() -> None:
    worker = LazyWorker()
    executor, tasks = begin(worker)
    worker.run_next()
    worker.run_next()
    executor.wait_for_buckets([3])
    assert names(tasks, "gather") == [3, 2]
    executor.gather_ready()
    assert names(tasks, "gather") == [3, 2], "the update of 1 has not finished"
    worker.run_next()
    worker.run_next()
    executor.gather_ready()
    assert names(tasks, "gather") == [3, 2, 1, 0]
    assert names(tasks, "use") == [3]


def test_no_gather_is_issued_by_a_forked_process_or_beside_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor, tasks = begin(EagerWorker())
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        executor.gather_ready()
    with executor._lock:
        other = threading.Thread(target=executor.gather_ready)
        other.start()
        other.join(60.0)
        assert not other.is_alive(), "it does not wait for the lock"
    assert names(tasks, "gather") == []
    executor.gather_ready()
    assert names(tasks, "gather") == [3, 2, 1, 0]


HOST, OFFLOADED, DEVICE = StateLocation.HOST, StateLocation.OFFLOADED, StateLocation.DEVICE
LOCATIONS = [
    (HOST, HOST, HOST, HOST),
    (OFFLOADED, OFFLOADED, OFFLOADED, OFFLOADED),
    (OFFLOADED, OFFLOADED, DEVICE, DEVICE),
    (DEVICE, OFFLOADED, DEVICE, HOST),
    (DEVICE, DEVICE, DEVICE, DEVICE),
]


@pytest.mark.parametrize("locations", LOCATIONS)
def test_the_overlapped_step_issues_its_tasks_in_the_order_of_the_schedule(
    locations: tuple[StateLocation, ...],
) -> None:
    tasks = RecordedTasks(locations)
    schedule = tasks.stream_waits.schedule
    executor, _ = begin(EagerWorker(), tasks)
    for number in schedule.forward_order:
        executor.wait_for_buckets([number])
    issued = [(task.operation.value, task.bucket) for task in schedule.after_agreement]
    gathers, others = [one for one in issued if one[0] == "gather"], set(issued)
    assert [one for one in tasks.done if one[0] == "gather"] == gathers
    # These are issued as soon as their updates have finished, here before every use.
    others -= set(gathers)
    assert [one for one in tasks.done if one in others] == [one for one in issued if one in others]


@pytest.mark.parametrize("locations", LOCATIONS)
def test_the_sequential_step_finishes_the_buckets_one_by_one(
    locations: tuple[StateLocation, ...],
) -> None:
    _, tasks = begin(None, RecordedTasks(locations))
    found = [(what, number) for what, number in tasks.done if what in ("update", "gather")]
    assert found == [(what, n) for n in (3, 2, 1, 0) for what in ("update", "gather")]
    assert names(tasks, "use") == [3, 2, 1, 0]


@pytest.mark.parametrize("worker", [None, EagerWorker()])
def test_a_skipped_bucket_keeps_its_turn_among_those_with_staging_slots(worker: Any) -> None:
    tasks = RecordedTasks((OFFLOADED, OFFLOADED, OFFLOADED, DEVICE))
    begin(worker, tasks, skipped={1})
    turns = [(what, number) for what, number in tasks.done if what in ("copy_h2d", "skip")]
    assert turns == [("copy_h2d", 2), ("skip", 1), ("copy_h2d", 0)]


def test_the_update_thread_runs_updates_in_forward_order_before_any_wait() -> None:
    thread = UpdateThread()
    over = threading.Event()
    _, tasks = begin(thread)
    thread.submit("a last job", over.set)
    assert over.wait(60.0)
    assert names(tasks, "update") == [3, 2, 1, 0]
    thread.close()


def test_later_jobs_are_skipped_after_an_error_and_raise_the_same_error() -> None:
    thread = UpdateThread()
    ran: list[int] = []

    def fail() -> None:
        raise KeyError("first")

    tickets = [thread.submit("a job", job) for job in (fail, lambda: ran.append(1))]
    for ticket in tickets:
        with pytest.raises(KeyError, match="first"):
            ticket.wait(60.0)
    with pytest.raises(KeyError, match="first"):
        thread.submit("a later one", lambda: ran.append(2)).wait(60.0)
    assert ran == []
    thread.close()
    thread.close()


def test_the_thread_ends_with_its_owner() -> None:
    thread = UpdateThread()
    thread.submit("a job", lambda: None).wait(60.0)
    running = thread._thread
    assert running is not None
    assert running.name == "offload_adam update"
    del thread
    running.join(60.0)
    assert not running.is_alive()


def test_a_job_that_drops_the_owner_does_not_wait_for_itself() -> None:
    thread = UpdateThread()
    ended: list[bool] = []
    thread.submit("a job", lambda: ended.append(thread.close())).wait(60.0)
    assert ended == [True]
    assert thread.close()


class FakeCopy(str):
    """The gradient copy of a bucket, identified by a name."""

    state = SimpleNamespace(
        plan=SimpleNamespace(pins_staging=False, location=StateLocation.OFFLOADED)
    )


class Reducing(FakeCopy):
    """A gradient copy after a reduction for which a stream waits, not the host."""


class Arriving:
    """A transfer whose copies arrive when a test adds them to `arrived`; records finished ones."""

    def __init__(self) -> None:
        self.arrived: set[str] = set()
        self.finished: list[str] = []

    def start_direct_copy(self, gradient_copy: Any) -> None:
        pass

    def goes_through_buffer(self, gradient_copy: Any) -> bool:
        return False

    def start_buffered_copy(self, gradient_copy: Any) -> None:
        pass

    def has_arrived(self, gradient_copy: Any) -> bool:
        return any(gradient_copy == arrived for arrived in self.arrived)

    def finish_copy(self, gradient_copy: Any) -> None:
        self.finished.append(gradient_copy)

    def waits_on_stream_alone(self, gradient_copy: Any) -> bool:
        return isinstance(gradient_copy, Reducing)


def test_a_sequential_backward_finishes_copies_in_order_and_waits_for_nothing() -> None:
    transfer = Arriving()
    tasks: Any = RecordedTasks()
    executor = Executor(
        cast(Any, transfer), tasks, None, RankGroup(), Stopwatch(), lambda number: None
    )
    executor.start_copy(cast(Any, FakeCopy("first")))
    transfer.arrived.add("second")
    executor.start_copy(cast(Any, FakeCopy("second")))
    assert transfer.finished == []
    transfer.arrived.add("first")
    executor.start_copy(cast(Any, FakeCopy("third")))
    assert transfer.finished == ["first", "second"]
    executor.finish_copies(wait=True)
    assert transfer.finished == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("kind", "num_finished"), [(Reducing, 6 - NUM_SLOTS_IN_FLIGHT), (FakeCopy, 0)]
)
def test_reductions_on_a_device_hold_no_more_slots_than_planned(
    kind: type[FakeCopy], num_finished: int
) -> None:
    """A copy for which the host would wait is never finished early: a hook must not wait."""
    transfer, tasks = Arriving(), RecordedTasks()
    executor = Executor(
        cast(Any, transfer), cast(Any, tasks), None, RankGroup(), Stopwatch(), lambda number: None
    )
    for number in range(5):
        executor.start_copy(cast(Any, kind(number)))
    assert transfer.finished == [str(number) for number in range(num_finished)]


@pytest.mark.parametrize("worker", [None, LazyWorker])
def test_a_copy_through_a_buffer_begins_before_the_one_before_it_is_finished(
    worker: type[LazyWorker] | None,
) -> None:
    done: list[tuple[str, int]] = []

    class Copies(Arriving):
        def start_buffered_copy(self, gradient_copy: Any) -> None:
            if gradient_copy.host_buffer is None:
                done.append(("begin", gradient_copy.state.layout.index))
            gradient_copy.host_buffer = object()

        def finish_copy(self, gradient_copy: Any) -> None:
            self.start_buffered_copy(gradient_copy)
            done.append(("finish", gradient_copy.state.layout.index))

        def goes_through_buffer(self, gradient_copy: Any) -> bool:
            return True

    tasks: Any = RecordedTasks()
    tasks.sum_of_squares = lambda number, gradients: None
    executor = Executor(
        cast(Any, Copies()),
        tasks,
        None if worker is None else worker(),
        RankGroup(world_size=2),
        Stopwatch(),
        lambda number: None,
    )
    for state in tasks.states:
        executor.start_copy(
            cast(Any, SimpleNamespace(state=state, gradients=None, host_buffer=None))
        )
    if worker is None:  # during backward, as many as there are buffers
        assert done == [("begin", 0), ("begin", 1)]
    executor.finish_copies(wait=True)
    order = [("begin", 0)]
    for number in range(1, NUM_BUCKETS):
        order += [("begin", number), ("finish", number - 1)]
    assert done == [*order, ("finish", NUM_BUCKETS - 1)]
