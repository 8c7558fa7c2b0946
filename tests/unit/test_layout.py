"""The layout tiles every parameter exactly once, for any world size, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam.layout import flat
from offload_adam.layout.flat import BLOCK_NUMEL, Bucket, ParameterSpec, plan_buckets
from offload_adam.layout.schedule import Operation, Task, plan_schedule
from offload_adam.layout.state_plan import StateLocation, StatePlan, StatePolicy, plan_state
from offload_adam.params.bucket import ShardSegments
from tests.support.plans import equal_plans, offloaded

SPECS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 5000), st.integers(0, 130)),
        st.sampled_from([("bfloat16@cpu", 2), ("float32@cpu", 4)]),
    ),
    max_size=30,
).map(
    lambda drawn: [
        ParameterSpec(index, numel, itemsize, family)
        for index, (numel, (family, itemsize)) in enumerate(drawn)
    ]
)
"""Half of the parameters are smaller than a block."""


@pytest.fixture(scope="module", params=[0, 1000], ids=["packed", "aligned"], autouse=True)
def pack_from(request: pytest.FixtureRequest) -> Iterator[int]:
    """Let small parameters share blocks, or not."""
    with patch.object(flat, "PACK_FROM", request.param):
        yield request.param


@settings(max_examples=150)
@given(specs=SPECS, world_size=st.integers(1, 1024), bucket_nbytes=st.integers(1, 60_000))
def test_every_element_is_owned_exactly_once(
    specs: list[ParameterSpec], world_size: int, bucket_nbytes: int
) -> None:
    buckets = plan_buckets(specs, world_size=world_size, bucket_nbytes=bucket_nbytes)
    covered: dict[int, list[tuple[int, int]]] = {spec.index: [] for spec in specs}
    for bucket in buckets:
        for rank in range(world_size):
            _check_shard(bucket, rank, covered)
    for spec in specs:
        end = 0
        for start, stop in sorted(covered[spec.index]):
            assert start == end
            end = stop
        assert end == spec.numel


def _check_shard(bucket: Bucket, rank: int, covered: dict[int, list[tuple[int, int]]]) -> None:
    low, high = bucket.shard_bounds(rank)
    assert (high - low) % BLOCK_NUMEL == 0
    end = 0
    for segment in bucket.segments(rank):
        placed = bucket.placements[segment.position]
        assert segment.numel > 0
        assert segment.shard_start >= end
        end = segment.shard_start + segment.numel
        assert end <= bucket.shard_numel
        # The element at the segment's start is the same one seen from both sides.
        assert low + segment.shard_start == placed.start + segment.parameter_start
        # Whole blocks: a block of the norm never lies on two ranks.
        assert segment.parameter_start % BLOCK_NUMEL == 0
        covered[placed.parameter].append(
            (segment.parameter_start, segment.parameter_start + segment.numel)
        )


@settings(max_examples=100)
@given(specs=SPECS, bucket_nbytes=st.integers(1, 60_000))
def test_buckets_hold_one_family_in_backward_order_within_their_size(
    pack_from: int, specs: list[ParameterSpec], bucket_nbytes: int
) -> None:
    buckets = plan_buckets(specs, world_size=3, bucket_nbytes=bucket_nbytes)
    families = {spec.index: spec.bucket_key for spec in specs}
    completed = []
    for bucket in buckets:
        members = [placed.parameter for placed in bucket.placements]
        assert {families[member] for member in members} == {bucket.bucket_key}
        assert members == sorted(members, reverse=True)
        completed.append(members[-1])
        assert len(members) == 1 or bucket.placements[-1].end * bucket.itemsize <= bucket_nbytes
        end = 0
        for placed in bucket.placements:
            small = placed.numel < BLOCK_NUMEL and pack_from == 0
            assert placed.start % (16 if small else BLOCK_NUMEL) == 0
            last = max(placed.end - 1, placed.start)
            assert not small or placed.start // BLOCK_NUMEL == last // BLOCK_NUMEL
            # No earlier place was free.
            assert placed.start - end < (16 if placed.start % BLOCK_NUMEL else BLOCK_NUMEL)
            end = placed.end
    assert completed == sorted(completed, reverse=True)


@settings(max_examples=60)
@given(specs=SPECS, world_size=st.integers(1, 64))
def test_padding_is_bounded(specs: list[ParameterSpec], world_size: int) -> None:
    buckets = plan_buckets(specs, world_size=world_size, bucket_nbytes=8192)
    for bucket in buckets:
        numel = sum(placed.numel for placed in bucket.placements)
        bound = (BLOCK_NUMEL - 1) * len(bucket.placements) + BLOCK_NUMEL * world_size
        assert numel <= bucket.numel < numel + bound


@settings(max_examples=60)
@given(specs=SPECS, world_size=st.integers(1, 8))
def test_there_are_enough_block_sums_for_every_shard(
    specs: list[ParameterSpec], world_size: int
) -> None:
    for bucket in plan_buckets(specs, world_size=world_size, bucket_nbytes=20_000):
        largest = 0
        for rank in range(world_size):
            segments = ShardSegments.of_shard(bucket, rank)
            blocks = [-(-segment.numel // BLOCK_NUMEL) for segment in segments.each]
            assert segments.sum_starts.tolist() == [sum(blocks[:i]) for i in range(len(blocks))]
            largest = max(largest, sum(blocks))
        assert largest <= bucket.num_sums
        if all(placed.numel >= BLOCK_NUMEL for placed in bucket.placements):
            assert bucket.num_sums == bucket.shard_numel // BLOCK_NUMEL


def test_tiny_parameters_take_16_elements_each() -> None:
    tiny = [ParameterSpec(index, 3, 4, "f") for index in range(10_000)]
    (bucket,) = plan_buckets(tiny, world_size=1, bucket_nbytes=2**20)
    assert (bucket.numel, bucket.num_sums) == (16 * 10_000, 10_000)


def test_a_parameter_larger_than_a_bucket_has_its_own() -> None:
    specs = [ParameterSpec(i, numel, 4, "f") for i, numel in enumerate([10, 100_000, 20])]
    buckets = plan_buckets(specs, world_size=2, bucket_nbytes=4096)
    assert [[p.parameter for p in bucket.placements] for bucket in buckets] == [[2], [1], [0]]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="world_size=0"):
        plan_buckets([], world_size=0, bucket_nbytes=1)


def plans_of(
    num_buckets: int,
    *,
    world_size: int = 2,
    on_device: frozenset[int] = frozenset(),
    kept: frozenset[int] = frozenset(),
) -> list[StatePlan]:
    plans = equal_plans(num_buckets, numel=1000, world_size=world_size)
    plans = [offloaded(plan) if plan.bucket.index in on_device else plan for plan in plans]
    return [
        replace(plan, location=StateLocation.DEVICE) if plan.bucket.index in kept else plan
        for plan in plans
    ]


def test_the_schedule_measures_in_backward_order_and_updates_in_forward_order() -> None:
    plans = plans_of(4, on_device=frozenset({1}), kept=frozenset({3}))
    schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2)
    before = [tuple(task) for task in schedule.before_agreement]
    arriving = [Operation.GRADIENT, Operation.PACK, Operation.REDUCE, Operation.SUM_SQUARES]
    copied = [*arriving[:3], Operation.COPY_D2H, arriving[3]]
    assert before == [
        *((operation, 0) for operation in arriving),
        *((operation, 1) for operation in copied),
        *((operation, 2) for operation in arriving),
        *((operation, 3) for operation in arriving[:3]),
        (Operation.SUM_SQUARES, 3),
    ]
    after = [tuple(task) for task in schedule.after_agreement]
    assert after == [
        (Operation.RELEASE, 1),
        # The host's updates are submitted before those on the device are launched.
        (Operation.UPDATE, 2),
        (Operation.UPDATE, 1),
        (Operation.COPY_H2D, 1),
        (Operation.UPDATE, 0),
        (Operation.UPDATE, 3),
        (Operation.GATHER, 3),
        (Operation.USE, 3),
        (Operation.GATHER, 2),
        (Operation.USE, 2),
        (Operation.GATHER, 1),
        (Operation.USE, 1),
        (Operation.GATHER, 0),
        (Operation.USE, 0),
    ]
    assert schedule.forward_order == (3, 2, 1, 0)


def test_the_sum_on_a_device_does_not_hold_up_the_backward_of_later_buckets() -> None:
    plans = plans_of(2, kept=frozenset({0}))
    schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2)
    # The sum is taken by `step()`, on the stream of the model, once the bucket is reduced.
    assert schedule.before_agreement[-1] == Task(Operation.SUM_SQUARES, 0)
    assert schedule.waits[Task(Operation.SUM_SQUARES, 0)] == (Task(Operation.REDUCE, 0),)


def test_slots_are_assigned_in_turn_and_wait_for_the_previous_bucket() -> None:
    plans = plans_of(5, on_device=frozenset(range(5)))
    schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=3)
    assert schedule.reduce_slots == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    packs = {b: schedule.waits[Task(Operation.PACK, b)] for b in range(5)}
    earlier = {2: 0, 3: 1, 4: 2}
    assert packs == {b: _waits(Operation.COPY_D2H, earlier.get(b)) for b in range(5)}
    assert schedule.staging_slots == {4: 0, 3: 1, 2: 2, 1: 0, 0: 1}
    updates = {b: schedule.waits[Task(Operation.UPDATE, b)] for b in range(5)}
    earlier = {1: 4, 0: 3}
    assert updates == {b: _waits(Operation.COPY_H2D, earlier.get(b)) for b in range(5)}


def _waits(operation: Operation, earlier: int | None) -> tuple[Task, ...]:
    return () if earlier is None else (Task(operation, earlier),)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("on_device", [frozenset[int](), frozenset({0, 1, 2})])
def test_every_wait_is_for_a_task_of_another_lane_that_comes_before(
    world_size: int, on_device: frozenset[int]
) -> None:
    plans = plans_of(3, world_size=world_size, on_device=on_device)
    schedule = plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2)
    order = [*schedule.before_agreement, *schedule.after_agreement]
    assert len(order) == len(set(order))
    for task, waits in schedule.waits.items():
        assert task in order
        for waited in waits:
            assert order.index(waited) < order.index(task)
            assert waited.operation.lane is not task.operation.lane


def test_padding_of_a_parameter_leaves_room_for_all_block_sums() -> None:
    """Two parameters of 100 elements, each with 900 reserved; two ranks share the bucket."""
    specs = [ParameterSpec(i, 100, 4, "key", padded_numel=900, num_shards=2) for i in range(2)]
    (bucket,) = plan_buckets(specs, world_size=1, bucket_nbytes=10**6)
    assert [(placed.start, placed.end) for placed in bucket.placements] == [(0, 100), (1024, 1124)]
    assert (bucket.numel, bucket.world_size) == (2048, 2)  # 1924, in two shards of whole blocks
    for rank in range(2):
        assert sum(-(-part.numel // 128) for part in bucket.segments(rank)) <= bucket.num_sums
    full = [ParameterSpec(0, 1000, 4, "key", padded_numel=9000, num_shards=2)]
    (bucket,) = plan_buckets(full, world_size=1, bucket_nbytes=10**6)
    assert sum(-(-part.numel // 128) for part in bucket.segments(0)) == 8 <= bucket.num_sums


def test_units_have_buckets_of_their_own_and_share_slots() -> None:
    specs = [ParameterSpec(i, 1000, 2, "key", on_device=True, unit=str(i // 2)) for i in range(8)]
    plans = plan_state(specs, StatePolicy(sharded=True, streams=True, reduces=False))
    assert [len(plan.bucket.placements) for plan in plans] == [2, 2, 2, 2]
    schedule = plan_schedule(plans, num_reduce_slots=3, num_staging_slots=2)
    assert schedule.reduce_slots == {0: 0, 1: 1, 2: 2, 3: 0}
    assert schedule.staging_slots == {3: 0, 2: 1, 1: 0, 0: 1}
