"""The sentence names what takes longest and a setting that moves it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_adam.profiling.diagnosis import Resource, RunFacts, diagnose
from offload_adam.profiling.profile import RankProfile
from tests.unit.profiling.synthetic import PHASES, profile

FACTS = RunFacts(
    num_threads=2,
    num_cores=2,
    pinned=True,
    on_device=True,
    streams=True,
    reduce_dtype=None,
    dtype="bf16",
    world_size=2,
    gradient_accumulation_steps=1,
)


@pytest.mark.parametrize(
    ("slowed", "facts", "resource", "setting"),
    [
        ("forward", FACTS, Resource.COMPUTE, ""),
        ("update", replace(FACTS, num_threads=1), Resource.UPDATE, "optimizer.num_threads"),
        ("update", FACTS, Resource.UPDATE, "--nproc-per-node"),
        ("copy up", replace(FACTS, pinned=False), Resource.COPIES, "memory.pin"),
        ("copy down", replace(FACTS, dtype="fp32"), Resource.COPIES, "train.dtype"),
        ("copy down", FACTS, Resource.COPIES, "train.gradient_accumulation_steps"),
        (
            "gather",
            replace(FACTS, reduce_dtype="fp32"),
            Resource.COLLECTIVES,
            "optimizer.reduce_dtype",
        ),
        ("gather", FACTS, Resource.COLLECTIVES, "train.gradient_accumulation_steps"),
        ("data", FACTS, Resource.DATA, "data"),
    ],
)
def test_what_is_slowed_down_is_named(
    slowed: str, facts: RunFacts, resource: Resource, setting: str
) -> None:
    phases = {**PHASES, slowed: 60}
    found = diagnose([profile(0, phases), profile(1, phases)], facts)
    assert found is not None
    assert (found.resource, found.setting) == (resource, setting)
    assert resource.value in found.sentence
    assert found.step_ms == pytest.approx(sum(phases.values()))
    assert setting in found.sentence or setting in ("", "--nproc-per-node", "data")


def test_shares_are_of_the_whole_step() -> None:
    found = diagnose([profile()], FACTS)
    assert found is not None
    assert found.shares[Resource.COMPUTE] == pytest.approx(19 / 34)
    assert found.shares[Resource.COLLECTIVES] == pytest.approx(5 / 34)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert "34.0 ms" in found.sentence
    assert "56%" in found.sentence


def test_nothing_recorded_is_nothing_said() -> None:
    assert diagnose([RankProfile(0, "host", [])], FACTS) is None
