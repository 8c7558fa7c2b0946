"""On a machine whose work ends late and out of order, the bits are those of a sequential run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import seed as drawn_from
from hypothesis import strategies as st

from offload_adam.layout import state_plan
from offload_adam.layout.schedule import Operation
from offload_adam.options import Pin
from tests.simulation.case import Case, Step, cases, simple_case
from tests.simulation.simulation import Simulation
from tests.simulation.training import reference_of
from tests.simulation.waits import Kind, kinds_of

NUM_EXAMPLES = 4
NUM_REUSING = 2
"""At least this many of the examples must have a ring in which buckets share a slot."""

PLACES = list(product(("fp32", "bf16", "mixed"), ("all", "staging", "none"), (1, 2)))


STAGING: Kind = (Operation.UPDATE, Operation.COPY_H2D)
REDUCTION: Kind = (Operation.PACK, Operation.COPY_D2H)
LOW_PRECISION: dict[str, Any] = {"state_format": "bf16", "offload_fraction": 1.0}
CODES: dict[str, Any] = LOW_PRECISION | {"state_format": "int8"}
# Several parameters of each bucket are packed before their D2H copy.
PACKED: dict[str, Any] = {"bucket_nbytes": 6000, "world_size": 1}
OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "packed, accumulated": PACKED | {"accumulates": True},
    "packed, accumulated later": PACKED | {"accumulates_later": True, "accumulates": False},
    "packed, staging": PACKED | {"pin": "staging", "dtype": "all"},
    "packed, sequential": PACKED | {"pin": "none", "overlaps": False},
    "packed, FSDP2": PACKED | {"pin": "staging", "world_size": 2, "sharding": "FSDP2"},
    "fp16": {"dtype": "fp16"},
    "host": {"on_device": False},
    "sequential": {"overlaps": False},
    "device state": {"offload_fraction": 0.0},
    "FSDP2": {"sharding": "FSDP2", "world_size": 2},
    "FSDP2 alone": {"sharding": "FSDP2", "world_size": 1},
    "FSDP2 of device state": {"sharding": "FSDP2", "offload_fraction": 0.0},
    "FSDP2 from host memory": {"sharding": "FSDP2", "on_device": False},
    "HSDP": {"sharding": "HSDP", "world_size": 2},
    "low precision, accumulated": LOW_PRECISION | {"accumulates": True},
    "low precision, host": LOW_PRECISION | {"on_device": False},
    "low precision, sequential": LOW_PRECISION | {"overlaps": False},
    "low precision, HSDP": LOW_PRECISION | {"sharding": "HSDP", "world_size": 2},
    "codes": CODES | {"world_size": 2},
    "codes, staging": CODES | {"pin": "staging", "state_format": "mixed"},
    "codes, HSDP": CODES | {"sharding": "HSDP", "world_size": 2},
}


def run_and_compare(case: Case, seed: int) -> set[Kind]:
    """Run a case and check it; return the rings in which buckets shared slots, by their waits."""
    # Memory for sums that is taken later changes no bit, so the reference has it from the start.
    accumulates = case.accumulates or case.accumulates_later
    simulation = Simulation(case, reference_of(replace(case, accumulates=accumulates)), seed)
    assert simulation.run() == []
    # The comparison is worthless unless every parameter was read after the last step.
    read = {(step, index) for step, index, _ in simulation.outcome.reads}
    assert {(len(case.steps), index) for index in range(len(case.parameters))} <= read
    if not any(step.uses_all_of(case) and step.non_finite is None for step in case.steps):
        return set()
    return kinds_of(simulation.core.stream_waits.schedule) & {STAGING, REDUCTION}


def run_some(number: int, **fixed: Any) -> Counter[Kind]:
    """Run cases drawn with seed `number`; count those in which buckets shared slots, by ring."""
    rings: Counter[Kind] = Counter()

    # No shrinking, which takes minutes; the slow test below shrinks failing cases.
    @drawn_from(number)
    @settings(max_examples=NUM_EXAMPLES, database=None, phases=[Phase.generate])
    @given(case=cases(**fixed), seed=st.integers(0, 1 << 30))
    def run(case: Case, seed: int) -> None:
        rings.update(run_and_compare(case, seed))

    run()
    return rings


@pytest.mark.parametrize(("dtype", "pin", "world_size"), PLACES)
def test_the_bits_are_those_of_the_sequential_host(dtype: str, pin: Pin, world_size: int) -> None:
    number = PLACES.index((dtype, pin, world_size))
    fixed = {"dtype": dtype, "pin": pin, "world_size": world_size}
    rings = run_some(number, **fixed, on_device=True, overlaps=True)
    assert rings[STAGING] >= (NUM_REUSING if dtype != "fp32" or pin == "staging" else 0)
    assert rings[REDUCTION] >= (NUM_REUSING if world_size > 1 and pin == "all" else 0)


@pytest.mark.parametrize(
    ("pin", "world_size"), [("all", 1), ("all", 2), ("staging", 1), ("none", 2)]
)
def test_the_bits_of_state_in_low_precision(pin: Pin, world_size: int) -> None:
    fixed = {"dtype": "all", "pin": pin, "world_size": world_size}
    rings = run_some(world_size, **fixed, **LOW_PRECISION, on_device=True, overlaps=True)
    # The H2D copy of a bf16 parameter reads the high half of its master weight, which is pinned.
    assert rings[STAGING] >= (NUM_REUSING if pin != "all" else 0)
    assert rings[REDUCTION] >= (NUM_REUSING if world_size > 1 and pin == "all" else 0)


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_the_bits_of_other_options_are_those_of_the_sequential_host(name: str) -> None:
    run_some(0, **({"dtype": "mixed", "on_device": True, "overlaps": True} | OTHER_OPTIONS[name]))


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=500)
@given(
    case=st.one_of(cases(), cases(sharding="FSDP2"), cases(sharding="HSDP")),
    seed=st.integers(0, 1 << 30),
)
def test_the_bits_are_those_of_the_sequential_host_in_many_runs(case: Case, seed: int) -> None:
    run_and_compare(case, seed)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_slot_is_reused_across_steps_that_skip_buckets(
    overlaps: bool,
) -> None:
    every = (0, 1, 2, 3, 4, 5)
    # Layers 0, 2 and 4 share a slot. The second step skips layer 2, so layer 4 follows layer 0.
    rounds = [every, (0, 4, 5), (0, 5), every]
    case = Case(
        layers=tuple(((300, "bf16"),) for _ in every),
        steps=tuple(Step((used,), False, None, False) for used in rounds),
        bucket_nbytes=100,
        world_size=2,
        overlaps=overlaps,
    )
    reference = reference_of(case)
    for seed in range(4):
        assert Simulation(case, reference, seed).run() == []


def test_without_overlap_slots_are_reused_during_backward() -> None:
    every = tuple(range(12))
    case = Case(
        layers=tuple(((300, "bf16"),) for _ in every),
        steps=tuple(Step((every,) * 3, False, None, False) for _ in range(2)),
        bucket_nbytes=100,
        world_size=2,
        accumulates=True,
        overlaps=False,
    )
    simulation = Simulation(case, reference_of(case), 0)
    assert simulation.run() == []
    bucket_nbytes = 512 * 2
    (nbytes,) = simulation.core.transfer.slots.nbytes.values()
    assert nbytes <= 3 * bucket_nbytes


@pytest.mark.parametrize("overlaps", [True, False])
def test_bucket_keys_with_one_reduce_dtype_share_no_slot(overlaps: bool) -> None:
    layers = tuple(((300, name),) for name in ("bf16", "fp32", "fp16") * 3)
    every = tuple(range(len(layers)))
    case = Case(
        layers=layers,
        steps=tuple(Step((every,), False, None, False) for _ in range(3)),
        bucket_nbytes=100,
        world_size=2,
        num_reduce_slots=1,
        reduces_in_fp32=True,
        overlaps=overlaps,
    )
    reference = reference_of(case)
    for seed in range(4):
        assert Simulation(case, reference, seed).run() == []


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_are_gathered_after_their_update_on_the_device(
    world_size: int, overlaps: bool
) -> None:
    case = simple_case(4, "bf16", world_size=world_size, offload_fraction=0.5, overlaps=overlaps)
    reference = reference_of(case)
    for seed in range(4):
        simulation = Simulation(case, reference, seed)
        assert {state.plan.location.is_host for state in simulation.core.states} == {True, False}
        assert simulation.run() == []


@pytest.mark.parametrize("overlaps", [True, False])
def test_fp32_parameters_without_pinned_state_use_staging_slots(overlaps: bool) -> None:
    every = tuple(range(5))
    case = Case(
        layers=tuple(((300, "fp32"),) for _ in every),
        steps=tuple(Step((every,), False, None, False) for _ in range(3)),
        bucket_nbytes=100,
        pin="staging",
        overlaps=overlaps,
    )
    reference = reference_of(case)
    for seed in range(4):
        assert Simulation(case, reference, seed).run() == []


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("part_numel", [128, 150])  # equal parts; parts of one block or two
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp32"},
        {"dtype": "fp32", "pin": "staging"},
        {"dtype": "bf16", "world_size": 2, "rank": 1},
        {"dtype": "bf16", "state_format": "bf16"},
        {"dtype": "bf16", "state_format": "int8", "world_size": 2},
    ],
)
def test_each_part_of_a_large_update_is_copied_to_the_device(
    options: dict[str, Any], part_numel: int, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buckets have two layers, cut into two to six parts, most of them within a parameter."""
    case = simple_case(6, bucket_nbytes=4 * 700, overlaps=overlaps, **options)
    reference = reference_of(case)
    monkeypatch.setattr(state_plan, "PART_NUMEL", part_numel)
    for seed in range(4):
        simulation = Simulation(case, reference, seed)
        assert simulation.run() == []


def test_a_shard_of_padding_is_not_staged() -> None:
    # Rank 3 has none of the 300 elements, so no D2H copy of a step lets its host wait.
    case = simple_case(4, "fp32", world_size=4, rank=3, pin="staging", sharding="HSDP")
    reference = reference_of(case)
    for seed in range(4):
        assert Simulation(case, reference, seed).run() == []
