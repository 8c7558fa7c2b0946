"""The order in which the overlapped executor waits and issues all-gathers, also ahead of need."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.budget import NUM_SLOTS_IN_FLIGHT
from offload_adam.layout.schedule import Lane, Operation, Task, plan_schedule
from offload_adam.layout.state_plan import StateLocation
from offload_adam.spans import Stopwatch
from offload_adam.step.executor import Executor
from offload_adam.step.step import _release
from offload_adam.step.update_thread import UpdateThread
from offload_adam.transfer.stream_waits import StreamWaits
from offload_adam.transfer.streams import HostStreams
from tests.support.plans import equal_plans
from tests.unit.overlap.lazy_worker import LazyJob, LazyWorker

NUM_BUCKETS = 4


class EagerWorker(LazyWorker):
    """An update thread that runs each job at once."""

    def submit(self, what: str, job: Callable[[], object]) -> LazyJob:
        given = super().submit(what, job)
        self.run_next()
        return given


def eager() -> tuple[EagerWorker, EagerWorker]:
    return EagerWorker(), EagerWorker()


def lazy() -> tuple[LazyWorker, LazyWorker]:
    return LazyWorker(), LazyWorker()


class RecordedTasks:
    """Tasks that only record that they ran; a gather waits for its update, as scheduled."""

    def __init__(
        self,
        locations: Sequence[StateLocation] = (StateLocation.HOST,) * 4,
        *,
        num_slots: int = 2,
    ) -> None:
        plans = [
            replace(plan, location=location)
            for plan, location in zip(
                equal_plans(NUM_BUCKETS, numel=128, world_size=2), locations, strict=True
            )
        ]
        self.stream_waits = StreamWaits(RankGroup(), lambda device: HostStreams())
        schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=num_slots)
        devices = dict.fromkeys(range(NUM_BUCKETS), torch.device("cpu"))
        self.stream_waits.use_schedule(schedule, devices)
        self.states = [
            SimpleNamespace(indices=np.array([p.bucket.index]), layout=p.bucket, plan=p)
            for p in plans
        ]
        self.done: list[tuple[str, int]] = []
        self.steps: list[tuple[str, int]] = []

    def record_last_read(self) -> None:
        offloaded = [state.layout.index for state in self.states[::-1] if state.plan.is_offloaded]
        self.done += [("release", number) for number in offloaded]

    def update(self, number: int, *_: Any) -> None:
        self.launch(number)
        self.finish(number)

    def prepare(self, number: int, *_: Any) -> Any:
        self.steps.append(("prepare", number))
        return SimpleNamespace(launches=SimpleNamespace(parts=[None]), number=number)

    def launch(self, update: Any, *_: Any) -> None:
        self.done.append(("update", getattr(update, "number", update)))

    def finish(self, update: Any, *_: Any) -> None:
        number = getattr(update, "number", update)
        self.steps.append(("finish", number))
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
    workers: Any, tasks: RecordedTasks | None = None, *, skipped: Collection[int] = ()
) -> tuple[Executor, RecordedTasks]:
    """Return an executor after `apply` of one step. Forward order is 3, 2, 1, 0."""
    tasks = tasks or RecordedTasks()
    executor = Executor(
        cast(Any, None), cast(Any, tasks), workers, RankGroup(), Stopwatch(), lambda number: None
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
    executor, tasks = begin(lazy())
    assert tasks.done == []
    assert executor.is_pending
    executor.wait_for_buckets([3])
    assert tasks.done == [("update", 3), ("gather", 3), ("use", 3)]
    executor.wait_for_buckets([3])
    assert tasks.done == [("update", 3), ("gather", 3), ("use", 3)]


def test_earlier_gathers_are_issued_first_and_their_buckets_are_still_pending() -> None:
    executor, tasks = begin(lazy())
    executor.wait_for_buckets([1])
    assert names(tasks, "gather") == [3, 2, 1]
    assert names(tasks, "use") == [1]
    executor.finish_updates()
    assert names(tasks, "gather") == [3, 2, 1, 0]
    assert names(tasks, "use") == [1, 3, 2, 0]
    assert not executor.is_pending


def test_the_next_gathers_are_issued_ahead_if_their_updates_have_finished() -> None:
    update, copy = lazy()
    executor, tasks = begin((update, copy))
    copying = ("preparation", 2), ("update", 3), ("preparation", 1), ("update", 2)
    assert [(job.what.split()[1], int(job.what[-1])) for job in copy.waiting][:4] == [*copying]
    for _ in copying:
        copy.run_next()
    executor.wait_for_buckets([3])
    assert names(tasks, "gather") == [3, 2]
    executor.gather_ready()
    assert names(tasks, "gather") == [3, 2], "the update of 1 has not finished"
    while copy.waiting:
        copy.run_next()
    executor.gather_ready()
    assert names(tasks, "gather") == [3, 2, 1, 0]
    assert names(tasks, "use") == [3]


def test_no_gather_is_issued_by_a_forked_process_during_a_capture_or_beside_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor, tasks = begin(eager())
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        executor.gather_ready()
    with monkeypatch.context() as capturing:
        capturing.setattr(HostStreams, "is_capturing", lambda self: True)
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
    executor, _ = begin(eager(), tasks)
    for number in schedule.forward_order:
        executor.wait_for_buckets([number])
    for lane in Lane:
        planned = [task for task in schedule.after_agreement if schedule.lane_of(task) is lane]
        found = [Task(Operation(what), number) for what, number in tasks.done]
        assert [task for task in found if schedule.lane_of(task) is lane] == planned


@pytest.mark.parametrize("locations", LOCATIONS)
def test_the_sequential_step_finishes_the_buckets_one_by_one(
    locations: tuple[StateLocation, ...],
) -> None:
    _, tasks = begin(None, RecordedTasks(locations))
    found = [(what, number) for what, number in tasks.done if what in ("update", "gather")]
    assert found == [(what, n) for n in (3, 2, 1, 0) for what in ("update", "gather")]
    assert names(tasks, "use") == [3, 2, 1, 0]


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_bucket_is_prepared_before_the_one_before_it_is_finished_unless_it_needs_its_slot(
    num_slots: int,
) -> None:
    tasks = RecordedTasks((OFFLOADED,) * NUM_BUCKETS, num_slots=num_slots)
    begin(eager(), tasks)
    one_by_one = [(what, number) for number in (3, 2, 1, 0) for what in ("prepare", "finish")]
    ahead = [("prepare", 3)]
    for number in (2, 1, 0):
        ahead += [("prepare", number), ("finish", number + 1)]
    assert tasks.steps == (one_by_one if num_slots == 1 else [*ahead, ("finish", 0)])


@pytest.mark.parametrize("num_submitted", range(2 * NUM_BUCKETS - 1))
def test_updates_that_an_interrupted_step_has_started_are_waited_for(
    num_submitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = RecordedTasks((OFFLOADED,) * NUM_BUCKETS)
    update, copy = UpdateThread.pair()
    launch, submit = tasks.launch, copy.submit
    submitted = 0

    def slow(*arguments: Any) -> None:
        time.sleep(0.05)
        launch(*arguments)

    def interrupted(what: str, job: Callable[[], object]) -> Any:
        nonlocal submitted
        if submitted == num_submitted:
            raise KeyboardInterrupt
        submitted += 1
        return submit(what, job)

    monkeypatch.setattr(tasks, "launch", slow)
    monkeypatch.setattr(copy, "submit", interrupted)
    executor = Executor(
        cast(Any, None),
        cast(Any, tasks),
        (update, copy),
        RankGroup(),
        Stopwatch(),
        lambda number: None,
    )
    inputs = cast(Any, SimpleNamespace(active=np.ones(NUM_BUCKETS, dtype=np.bool_)))
    with pytest.raises(KeyboardInterrupt):
        executor.apply([cast(Any, None)] * NUM_BUCKETS, inputs, Stopwatch())
    executor.finish_updates()
    # Jobs: prepare 2, finish 3, prepare 1, finish 2, prepare 0, finish 1, finish 0.
    prepared = [number for what, number in tasks.steps if what == "prepare"]
    assert prepared == [3, 2, 1, 0][: 1 + (num_submitted + 1) // 2]
    assert names(tasks, "update") == prepared
    executor.close()


@pytest.mark.parametrize(
    ("skipped", "location", "prepared"),
    [((), OFFLOADED, [3]), ((3,), HOST, [2]), ((3,), OFFLOADED, [])],
)
def test_the_first_bucket_is_prepared_before_apply_returns_unless_an_event_must_come_first(
    skipped: tuple[int, ...], location: StateLocation, prepared: list[int]
) -> None:
    _, tasks = begin(lazy(), RecordedTasks((location,) * NUM_BUCKETS), skipped=skipped)
    assert tasks.steps == [("prepare", number) for number in prepared]


@pytest.mark.parametrize("workers", [None, eager()])
def test_a_skipped_bucket_keeps_its_turn_among_those_with_staging_slots(workers: Any) -> None:
    tasks = RecordedTasks((OFFLOADED, OFFLOADED, OFFLOADED, DEVICE))
    begin(workers, tasks, skipped={1})
    turns = [(what, number) for what, number in tasks.done if what in ("copy_h2d", "skip")]
    assert turns == [("copy_h2d", 2), ("skip", 1), ("copy_h2d", 0)]


def test_the_update_thread_runs_updates_in_forward_order_before_any_wait() -> None:
    update, copy = UpdateThread.pair()
    over = threading.Event()
    _, tasks = begin((update, copy))
    copy.submit("a last job", over.set)
    assert over.wait(60.0)
    assert names(tasks, "update") == [3, 2, 1, 0]
    copy.close()
    update.close()


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


@pytest.mark.parametrize("dropped_on", [0, 1])
def test_an_optimizer_that_one_of_its_threads_drops_is_released_after_its_updates(
    dropped_on: int,
) -> None:
    """The garbage collector may run on any thread."""
    threads = UpdateThread.pair()
    released = threading.Event()
    done_before: list[tuple[str, int]] = []

    class Arena:
        nbytes = pinned_nbytes = 0

        def close(self) -> None:
            done_before.extend(tasks.done)
            released.set()

    may_run = threading.Event()
    threads[0].submit("a job before", partial(may_run.wait, 60.0))
    tasks = RecordedTasks((OFFLOADED,) * NUM_BUCKETS)
    executor, _ = begin(threads, tasks)
    assert tasks.done[NUM_BUCKETS:] == []
    release = partial(_release, executor, cast(Any, [Arena()]), [])
    job = threads[dropped_on].submit("a job that collects garbage", release)
    may_run.set()
    assert job.wait(60.0)
    assert released.wait(60.0)
    updated = [number for what, number in done_before if what == "update"]
    assert updated == [3, 2, 1, 0], "no memory is freed before the last update"


def test_a_caller_may_wait_until_a_job_has_begun() -> None:
    thread = UpdateThread()
    may_begin, may_end = threading.Event(), threading.Event()

    def first() -> None:
        may_begin.wait(60.0)

    def second() -> None:
        may_end.wait(60.0)

    thread.submit("a job", first)
    job = thread.submit("the next", second)
    start_s = time.monotonic()
    job.wait_until_begun(0.05)
    assert time.monotonic() - start_s >= 0.04
    may_begin.set()
    job.wait_until_begun(60.0)
    assert time.monotonic() - start_s < 30.0
    assert not job.is_over()
    may_end.set()
    assert job.wait(60.0)
    thread.close()


def test_several_callers_may_wait_for_one_job() -> None:
    thread = UpdateThread()
    may_end = threading.Event()

    def hold() -> None:
        may_end.wait(60.0)

    job = thread.submit("a job", hold)
    over: list[bool] = []
    waiting = [
        threading.Thread(target=lambda: over.append(job.wait(60.0)), daemon=True) for _ in range(4)
    ]
    for one in waiting:
        one.start()
    assert not job.wait(0.0)
    assert not job.wait(0.01)
    assert not job.is_over()
    may_end.set()
    for one in waiting:
        one.join(60.0)
    assert over == [True] * 4
    assert job.is_over()
    assert job.wait(0.0)
    thread.close()


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


@pytest.mark.parametrize("workers", [None, lazy()])
def test_a_copy_through_a_buffer_begins_before_the_one_before_it_is_finished(
    workers: tuple[LazyWorker, LazyWorker] | None,
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
        workers,
        RankGroup(world_size=2),
        Stopwatch(),
        lambda number: None,
    )
    for state in tasks.states:
        executor.start_copy(
            cast(Any, SimpleNamespace(state=state, gradients=None, host_buffer=None))
        )
    if workers is None:  # during backward, as many as there are buffers
        assert done == [("begin", 0), ("begin", 1)]
    executor.finish_copies(wait=True)
    order = [("begin", 0)]
    for number in range(1, NUM_BUCKETS):
        order += [("begin", number), ("finish", number - 1)]
    assert done == [*order, ("finish", NUM_BUCKETS - 1)]
