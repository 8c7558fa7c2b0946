"""The timeline of a schedule: nothing begins too early, and the exposed time is the formula's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.schedule import Lane, Operation, Schedule, Task, plan_schedule
from offload_adam.layout.state_plan import PART_NUMEL, StateLocation, StatePolicy, plan_state
from offload_adam.layout.timeline import Timeline, predict_timeline
from tests.support.plans import equal_plans, offloaded


def schedule_of(num_buckets: int, *, world_size: int, num_slots: int = 2) -> Schedule:
    plans = [offloaded(plan) for plan in equal_plans(num_buckets, world_size=world_size)]
    return plan_schedule(plans, num_reduce_slots=num_slots, num_staging_slots=num_slots)


def equal_buckets(num_buckets: int, seconds: dict[Operation, float]) -> Timeline:
    schedule = schedule_of(num_buckets, world_size=1)
    return predict_timeline(schedule, lambda task: seconds.get(task.operation, 0.0))


DOWN, NORM, UPDATE, UP, BACKWARD = 0.3, 0.1, 1.0, 0.4, 2.0


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_exposed_is_what_the_updates_are_longer_than_the_forward_and_one_bucket(
    ratio: float,
) -> None:
    num_buckets = 20
    seconds = {
        Operation.GRADIENT: BACKWARD,
        Operation.COPY_D2H: DOWN,
        Operation.SUM_SQUARES: NORM,
        Operation.UPDATE: UPDATE,
        Operation.COPY_H2D: UP,
        Operation.USE: ratio * UPDATE,
    }
    exposed = equal_buckets(num_buckets, seconds).exposed_s
    forward, updates = num_buckets * ratio * UPDATE, num_buckets * UPDATE
    one_bucket = DOWN + NORM + UPDATE + UP
    # Where updates are the longer ones the last bucket's own forward comes after them.
    own = min(ratio * UPDATE, UPDATE)
    exact = max(0.0, updates - forward) + one_bucket - UPDATE + own
    assert exposed == pytest.approx(exact, rel=1e-12)
    assert exposed <= max(0.0, updates - forward) + one_bucket + 1e-9


def test_a_step_on_nothing_but_the_model_exposes_nothing() -> None:
    seconds = {Operation.GRADIENT: 2.0, Operation.USE: 1.0}
    timeline = equal_buckets(3, seconds)
    assert (timeline.end_s, timeline.model_s, timeline.exposed_s) == (9.0, 9.0, 0.0)
    starts = [i.start_s for i in timeline.intervals if i.task.operation is Operation.RELEASE]
    assert starts == [6.0, 6.0, 6.0]  # the agreement comes after all of the backward


@settings(max_examples=60)
@given(
    num_buckets=st.integers(1, 8),
    world_size=st.sampled_from([1, 4]),
    num_slots=st.integers(1, 3),
    drawn=st.lists(st.integers(0, 9), min_size=80, max_size=80),
)
def test_nothing_begins_before_what_it_waits_for(
    num_buckets: int, world_size: int, num_slots: int, drawn: list[int]
) -> None:
    schedule = schedule_of(num_buckets, world_size=world_size, num_slots=num_slots)
    tasks = [*schedule.before_agreement, *schedule.after_agreement]
    seconds = {task: float(drawn[place % 80]) for place, task in enumerate(tasks)}
    timeline = predict_timeline(schedule, seconds.__getitem__)
    found = {interval.task: interval for interval in timeline.intervals}
    assert list(found) == tasks
    for task, interval in found.items():
        assert interval.end_s == interval.start_s + seconds[task]
        for waited in schedule.waits[task]:
            assert found[waited].end_s <= interval.start_s
    agreed_s = max(found[task].end_s for task in schedule.before_agreement)
    for task in schedule.after_agreement:
        assert agreed_s <= found[task].start_s
    for lane in Lane:
        members = [interval for interval in timeline.intervals if interval.lane is lane]
        for one, next_one in pairwise(members):
            assert one.end_s <= next_one.start_s
    assert timeline.end_s <= sum(seconds.values())


def half_kept_forward(kept: range) -> float:
    """Return the seconds from the agreement to the end of the forward, which alone takes 1 s.

    The host's updates of all 24 buckets would take 2 s.
    """
    num_buckets = 24
    plans = [offloaded(plan) for plan in equal_plans(num_buckets)]
    plans = [
        replace(plan, location=StateLocation.DEVICE) if plan.bucket.index in kept else plan
        for plan in plans
    ]
    schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2)

    def seconds_of(task: Task) -> float:
        if task.operation is Operation.USE:
            return 1 / num_buckets
        on_host = task.bucket not in kept
        return 2 / num_buckets if task.operation is Operation.UPDATE and on_host else 0.0

    return predict_timeline(schedule, seconds_of).end_s


def test_the_state_that_the_forward_needs_first_belongs_on_the_device() -> None:
    specs = [ParameterSpec(index, 100, 2, "f", on_device=True) for index in range(24)]
    plans = plan_state(specs, StatePolicy(bucket_nbytes=1, offload_fraction=0.5))
    kept = [plan.bucket.index for plan in plans if plan.location is StateLocation.DEVICE]
    assert kept == list(range(12, 24))  # in backward order, so the forward begins with bucket 23
    # The device updates 12 buckets and the forward runs over them for 0.5 s, while the host updates
    # the other 12 in 1 s. After the last update, the forward of the last bucket is left: 1/24 s.
    assert half_kept_forward(range(12, 24)) == pytest.approx(1 + 1 / 24, rel=1e-12)  # 1.04
    # The other half: the forward waits for each of the host's 12 updates, and has 13 buckets left
    # after the last of them.
    assert half_kept_forward(range(12)) == pytest.approx(1 + 13 / 24, rel=1e-12)  # 1.54


def test_updates_on_the_device_come_before_the_forward_and_do_not_hold_up_the_hosts() -> None:
    plans = [offloaded(plan) for plan in equal_plans(4)]
    plans[2:] = [replace(plan, location=StateLocation.DEVICE) for plan in plans[2:]]
    schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2)
    timeline = predict_timeline(
        schedule, lambda task: 1.0 if task.operation in (Operation.UPDATE, Operation.USE) else 0.0
    )
    starts = {interval.task: interval.start_s for interval in timeline.intervals}
    assert [starts[Task(Operation.UPDATE, number)] for number in (1, 0, 3, 2)] == [0, 1, 0, 1]
    assert [starts[Task(Operation.USE, number)] for number in (3, 2, 1, 0)] == [2, 3, 4, 5]


@pytest.mark.parametrize(("copy_s", "ends_s"), [(2.0, 4.5), (8.0, 9.0)])
def test_a_large_bucket_is_copied_part_by_part_while_it_is_updated(
    copy_s: float, ends_s: float
) -> None:
    """Four parts take 4 s. The copy is slower or faster than the update."""
    plans = [offloaded(plan) for plan in equal_plans(1)]
    schedule = plan_schedule(plans, num_reduce_slots=1, num_staging_slots=1)
    seconds = {Operation.UPDATE: 4.0, Operation.COPY_H2D: copy_s}
    timeline = predict_timeline(
        schedule, lambda task: seconds.get(task.operation, 0.0), lambda bucket: 4
    )
    copied = next(i for i in timeline.intervals if i.task.operation is Operation.COPY_H2D)
    assert (copied.start_s, copied.end_s) == (1.0, ends_s)
    assert timeline.end_s == ends_s


def test_a_shard_has_as_many_parts_as_it_holds_default_buckets() -> None:
    numels = {2 * PART_NUMEL - 128: 1, 2 * PART_NUMEL: 2, 7 * PART_NUMEL + 1: 7}
    for numel, num_parts in numels.items():
        spec = ParameterSpec(0, numel, 2, "f", on_device=True)
        (plan,) = plan_state([spec], StatePolicy())
        assert plan.num_parts == num_parts
        (on_host,) = plan_state([replace(spec, on_device=False)], StatePolicy())
        assert on_host.num_parts == 1, "nothing is copied"


def test_state_on_the_device_is_updated_on_the_models_own_lane() -> None:
    schedule = replace(schedule_of(2, world_size=1), on_device=frozenset({1}))
    timeline = predict_timeline(schedule, lambda task: 1.0)
    lanes = {interval.task: interval.lane for interval in timeline.intervals}
    assert lanes[Task(Operation.UPDATE, 1)] is Lane.COMPUTE
    assert lanes[Task(Operation.UPDATE, 0)] is Lane.UPDATE


def test_it_is_drawn_lane_by_lane() -> None:
    seconds = {
        Operation.GRADIENT: 2.0,
        Operation.COPY_D2H: 1.0,
        Operation.UPDATE: 2.0,
        Operation.COPY_H2D: 1.0,
        Operation.USE: 1.0,
    }
    drawn = equal_buckets(2, seconds).draw(width=11)
    # Backward to 4, the last gradient down to 5, updates to 7 and 9, H2D copies to 8 and 10.
    assert drawn.splitlines() == [
        "  compute 0011....1.0",
        " D2H copy ..0.1......",
        "   update .....1100..",
        " H2D copy .......1.0.",
        "          0 s    11 s",
    ]
