"""Where each bucket's state is stored, by hand; and layouts that cannot be right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_adam.layout.budget import plane_nbytes
from offload_adam.layout.flat import ParameterSpec, Placement, plan_buckets
from offload_adam.layout.state_plan import (
    StateLocation,
    StatePlan,
    StatePolicy,
    plan_state,
    resolve_bucket_nbytes,
)
from offload_adam.options import StateFormat
from offload_adam.plan.advice import advise
from offload_adam.plan.inputs import Machine, Training
from offload_adam.plan.setup import Setup


def plan_of(itemsize: int = 2, *, on_device: bool = True, **policy: object) -> StatePlan:
    spec = ParameterSpec(0, 1000, itemsize, "f", on_device=on_device)
    (plan,) = plan_state([spec], StatePolicy(**{"bucket_nbytes": 1, **policy}))  # type: ignore[arg-type]
    return plan


def test_the_worked_example_of_the_plan() -> None:
    plan = plan_of(world_size=2)
    assert (plan.bucket.numel, plan.bucket.shard_numel) == (1024, 512)
    assert plan.location is StateLocation.OFFLOADED
    assert (plan.state.master_weight, plan.state.exp_avg, plan.state.exp_avg_sq) == (4, 4, 4)
    assert plan.state.max_exp_avg_sq == 0
    assert plan.gradient.itemsize == plan.gradient.shard_itemsize == 2
    assert sum(plane_nbytes(plan).values()) == 7168


def test_the_worked_example_of_the_layout() -> None:
    specs = [ParameterSpec(i, numel, 4, "f") for i, numel in enumerate((100, 300, 130))]
    (bucket,) = plan_buckets(specs, world_size=2, bucket_nbytes=10**6)
    assert bucket.placements == (
        Placement(2, 0, 130),
        Placement(1, 256, 556),
        Placement(0, 640, 740),
    )
    assert (bucket.numel, bucket.shard_bounds(1)) == (768, (384, 768))
    parts = [[(s.position, s.parameter_start, s.numel) for s in bucket.segments(r)] for r in (0, 1)]
    assert parts == [[(0, 0, 130), (1, 0, 128)], [(1, 128, 172), (2, 0, 100)]]


@pytest.mark.parametrize(
    ("state_format", "nbytes"), [("fp32", 12), ("bf16", 6), ("mixed", 5), ("int8", 5)]
)
def test_a_checkpoint_has_8_bit_codes_as_bfloat16(state_format: StateFormat, nbytes: int) -> None:
    spec = ParameterSpec(0, 1000, 2, "f", state_format=state_format, is_bfloat16=True)
    (plan,) = plan_state([spec], StatePolicy())
    assert plan.state.saved == nbytes


@pytest.mark.parametrize("state_format", ["bf16", "mixed", "int8"])
def test_low_precision_needs_state_in_host_memory(state_format: StateFormat) -> None:
    spec = ParameterSpec(0, 1000, 2, "f", on_device=True, state_format=state_format)
    with pytest.raises(ValueError, match=f"state_format='{state_format}' needs state in host"):
        plan_state([spec], StatePolicy(replicated=True))


@pytest.mark.parametrize(
    ("state_format", "packs"), [("fp32", True), ("bf16", True), ("int8", False)]
)
def test_parameters_with_codes_do_not_share_a_block(state_format: StateFormat, packs: bool) -> None:
    specs = [ParameterSpec(i, 5, 4, "f", state_format=state_format) for i in range(1001)]
    (bucket,) = plan_buckets(specs, world_size=1, bucket_nbytes=10**6)
    assert (bucket.placements[1].start < 128) == packs


def test_the_worked_example_of_parameters_that_share_a_block() -> None:
    numels = (*[5] * 1000, 20, 3, 300)
    specs = [ParameterSpec(i, numel, 4, "f") for i, numel in enumerate(numels)]
    (bucket,) = plan_buckets(specs, world_size=1, bucket_nbytes=10**6)
    expected = (Placement(1002, 0, 300), Placement(1001, 304, 307), Placement(1000, 320, 340))
    assert bucket.placements[:3] == expected
    (bucket,) = plan_buckets(specs[3:], world_size=1, bucket_nbytes=10**6)
    assert bucket.placements[1] == Placement(1001, 384, 387)  # 999 are not enough


@pytest.mark.parametrize(
    ("policy", "itemsize", "location", "master", "shard"),
    [
        ({"on_device": False}, 4, StateLocation.HOST, 0, 0),
        ({"on_device": False}, 2, StateLocation.HOST, 4, 0),
        ({"on_device": False, "world_size": 2}, 2, StateLocation.HOST, 4, 2),
        ({}, 4, StateLocation.OFFLOADED, 4, 4),
        ({"accumulates": True}, 2, StateLocation.OFFLOADED, 4, 4),
        ({"offload_fraction": 0.0}, 4, StateLocation.DEVICE, 0, 4),
        ({"offload_fraction": 0.0}, 2, StateLocation.DEVICE, 4, 2),
        ({"replicated": True}, 4, StateLocation.REPLICATED, 0, 0),
        ({"replicated": True, "world_size": 2}, 2, StateLocation.REPLICATED, 4, 2),
        ({"world_size": 2, "reduces_in_fp32": True}, 2, StateLocation.OFFLOADED, 4, 4),
        ({"world_size": 2, "reduces": False}, 2, StateLocation.OFFLOADED, 4, 2),
    ],
)
def test_where_state_is_and_which_planes_it_has(
    policy: dict[str, object], itemsize: int, location: StateLocation, master: int, shard: int
) -> None:
    plan = plan_of(itemsize, **policy)  # type: ignore[arg-type]
    assert plan.location is location
    assert (plan.state.master_weight, plan.gradient.shard_itemsize) == (master, shard)


@pytest.mark.parametrize(
    ("policy", "itemsize", "straight", "ring", "staged"),
    [
        ({"world_size": 2}, 2, True, True, True),
        ({"world_size": 2}, 4, True, True, False),
        ({}, 2, True, False, True),
        ({"streams": True}, 2, True, True, True),
        ({"streams": True, "accumulates": True}, 2, False, False, True),
        ({"streams": True, "pins_state": False}, 4, False, False, True),
        ({"streams": True, "offload_fraction": 0.0}, 2, False, False, False),
        ({"world_size": 2, "accumulates": True}, 2, False, False, True),
        ({"world_size": 2, "accumulates": True}, 4, False, False, False),
        ({"world_size": 2, "pins_state": False}, 4, False, False, True),
        ({"pins_state": False, "pins_staging": False}, 4, False, False, False),
        ({"world_size": 2, "offload_fraction": 0.0}, 2, False, False, False),
    ],
)
def test_how_gradients_and_parameters_move(
    policy: dict[str, object], itemsize: int, straight: bool, ring: bool, staged: bool
) -> None:
    plan = plan_of(itemsize, **policy)  # type: ignore[arg-type]
    assert (plan.copies_directly, plan.uses_ring, plan.stages_parameters) == (
        straight,
        ring,
        staged,
    )


MIB = 2**20


@pytest.mark.parametrize(
    ("world_size", "total_mib", "bucket_mib"),
    [
        (1, 1, 32),
        (1, 100_000, 32),  # at one rank the size does not depend on the model
        (2, 100, 32),
        (2, 1023, 63.9375),
        (2, 100_000, 64),
        (4, 100_000, 128),
        (8, 100, 32),  # as few as there are, rather than smaller ones
        (8, 2048, 128),  # 16 buckets
        (8, 100_000, 256),
        (64, 100_000, 256),
    ],
)
def test_buckets_grow_with_the_world_within_the_model_and_the_device(
    world_size: int, total_mib: int, bucket_mib: float
) -> None:
    specs = [ParameterSpec(i, MIB // 4, 4, "f") for i in range(total_mib)]
    policy = StatePolicy(world_size=world_size)
    assert resolve_bucket_nbytes(specs, policy) == bucket_mib * MIB
    # State that every rank has whole is not divided.
    assert resolve_bucket_nbytes(specs, replace(policy, replicated=True)) == 32 * MIB
    assert resolve_bucket_nbytes(specs, replace(policy, bucket_nbytes=5)) == 5


def test_buckets_have_the_size_that_was_resolved() -> None:
    specs = [ParameterSpec(i, MIB // 4, 4, "f", on_device=True) for i in range(4096)]
    plans = plan_state(specs, StatePolicy(world_size=8))
    assert {plan.bucket.numel * plan.bucket.itemsize for plan in plans} == {256 * MIB}
    assert {plan.bucket.shard_numel * plan.bucket.itemsize for plan in plans} == {32 * MIB}
    alone = plan_state(specs, StatePolicy())
    assert {plan.bucket.numel * plan.bucket.itemsize for plan in alone} == {32 * MIB}
    assert alone == plan_state(specs, StatePolicy(bucket_nbytes=32 * MIB))


@pytest.mark.parametrize(("world_size", "half"), [(1, 16 * MIB), (8, 32 * MIB)])
def test_a_plan_advises_half_of_the_size_that_was_resolved(world_size: int, half: int) -> None:
    specs = [ParameterSpec(i, MIB // 4, 4, "f") for i in range(1024)]
    setup = Setup(specs, Training(world_size=world_size))
    machine = Machine(device_nbytes=setup.predict().device_nbytes - MIB)
    changes = [advice.changes for advice in advise(setup, machine)]
    assert (f"bucket_nbytes={half}",) in changes


def test_a_layout_that_cannot_be_right_is_rejected() -> None:
    specs = [ParameterSpec(i, 100, 4, "f") for i in range(2)]
    (bucket,) = plan_buckets(specs, world_size=2, bucket_nbytes=10**6)
    first, second = bucket.placements
    for placements in (
        (first, second._replace(start=100)),  # not aligned, and over the first one's padding
        (second, first),  # out of order
        (first, second._replace(start=256, end=356)),  # a hole
        (first, second._replace(start=100, end=120)),  # not aligned to a vector
        (first._replace(end=-1), second),
    ):
        with pytest.raises(ValueError, match="must start at"):
            replace(bucket, placements=placements)
    with pytest.raises(ValueError, match=f"must have {bucket.numel} elements, not"):
        replace(bucket, numel=bucket.numel + 256)
