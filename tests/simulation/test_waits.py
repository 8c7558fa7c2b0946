"""Every wait of a schedule is needed: if any one is removed, the simulation finds a race."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.schedule import Operation, Schedule, Task, plan_schedule
from offload_adam.layout.state_plan import StatePolicy, plan_state
from tests.simulation.case import Case, simple_case
from tests.simulation.outcome import Outcome
from tests.simulation.simulation import Simulation, clean_reference_of
from tests.simulation.training import reference_of
from tests.simulation.waits import Kind, kinds_of, waits_of

ON_DEVICE = {
    "rings": simple_case(4, "bf16", world_size=2, rank=1, num_reduce_slots=2),
    "alone": simple_case(4, "fp32", num_reduce_slots=2),
    "through a buffer": simple_case(3, "bf16", world_size=2, pin="staging"),
    "alone through a buffer": simple_case(3, "bf16", pin="staging"),
    "fp32 staging": simple_case(4, "fp32", pin="staging"),
    "half of the state on the device": simple_case(4, "bf16", offload_fraction=0.5),
    "FSDP2": simple_case(4, "bf16", world_size=2, sharding="FSDP2", num_reduce_slots=2),
    "HSDP": simple_case(4, "bf16", world_size=2, sharding="HSDP", num_reduce_slots=2),
    "state on the device": simple_case(3, "bf16", world_size=2, offload_fraction=0.0),
}
ON_HOST = {
    "host": simple_case(3, "bf16", world_size=2, on_device=False),
    "host alone": simple_case(3, "fp32", on_device=False),
}
NUM_SEEDS = 4


def schedule_of(case: Case, reference: Outcome) -> Schedule:
    return Simulation(case, reference, 0).core.stream_waits.schedule


def without(schedule: Schedule, task: Task, waited: Task) -> Schedule:
    """Return a schedule without one of its waits."""
    rest = tuple(other for other in schedule.waits[task] if other != waited)
    return replace(schedule, waits={**schedule.waits, task: rest})


def is_caught(case: Case, reference: Outcome, task: Task, waited: Task) -> bool:
    """Return whether the vector clock reports a race, with any seed, if this wait is removed."""
    for seed in range(NUM_SEEDS):
        simulation = Simulation(case, reference, seed)
        simulation.with_schedule(without(simulation.core.stream_waits.schedule, task, waited))
        if simulation.has_race():
            return True
    return False


@pytest.mark.parametrize("name", ON_DEVICE)
def test_each_wait_that_is_removed_is_caught(name: str) -> None:
    case = ON_DEVICE[name]
    reference = clean_reference_of(case, NUM_SEEDS)
    waits = list(waits_of(schedule_of(case, reference)))
    assert [wait for wait in waits if not is_caught(case, reference, *wait)] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_norm_of_device_state_makes_waits_for_release_redundant(rank: int) -> None:
    # The state of two layers is on the device. Rank 1's shards of them contain only padding.
    case = replace(
        simple_case(4, "bf16", world_size=2, rank=rank, offload_fraction=0.5),
        layers=tuple(((numel, "bf16"),) for numel in (100, 100, 300, 300)),
    )
    reference = clean_reference_of(case, NUM_SEEDS)
    states = Simulation(case, reference, 0).core.states
    assert [state.segments.numels.size for state in states if not state.plan.location.is_host] == [
        1 - rank
    ] * 2
    waits = waits_of(schedule_of(case, reference))
    # With two ranks they are reduced in every step, and the host waits for their norm on COMPUTE.
    for_release = [wait for wait in waits if wait[1].operation is Operation.RELEASE]
    caught = [wait for wait in for_release if is_caught(case, reference, *wait)]
    assert len(for_release) == 2
    assert caught == ([] if rank == 0 else for_release)


@pytest.mark.parametrize("name", ON_HOST)
def test_on_the_host_each_wait_for_an_update_that_is_removed_is_caught(name: str) -> None:
    case = ON_HOST[name]
    reference = clean_reference_of(case, NUM_SEEDS)
    waits = list(waits_of(schedule_of(case, reference)))
    # Launched work is complete at once, and collectives are waited for by their own handles.
    real = [wait for wait in waits if wait[1].operation is Operation.UPDATE]
    assert real != []
    assert [wait for wait in real if not is_caught(case, reference, *wait)] == []


def test_these_cases_have_every_kind_of_wait() -> None:
    tried: set[Kind] = set()
    for case in ON_DEVICE.values():
        tried |= kinds_of(schedule_of(case, reference_of(case)))
    assert tried == all_kinds()


def all_kinds() -> set[Kind]:
    """Return the kinds of waits in every plan for parameters on a device with equal buckets."""
    specs = [ParameterSpec(index, 100, 2, "f", on_device=True) for index in range(6)]
    kinds = set()
    flag = [True, False]
    for world_size, fraction, pinned, accumulates, reduces, streams in product(
        [1, 2], [0.0, 1.0], flag, flag, flag, flag
    ):
        policy = StatePolicy(
            world_size=world_size,
            bucket_nbytes=1,
            reduces=reduces,
            streams=streams,
            accumulates=accumulates,
            offload_fraction=fraction,
            pins_state=pinned,
        )
        for itemsize in (2, 4):
            plans = plan_state([replace(spec, itemsize=itemsize) for spec in specs], policy)
            kinds |= kinds_of(plan_schedule(plans, num_reduce_slots=2, num_staging_slots=2))
    return kinds
