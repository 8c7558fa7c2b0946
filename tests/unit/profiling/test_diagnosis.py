"""The diagnosis names the resource that takes longest, and the setting to change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_adam.profiling.diagnosis import RunFacts, diagnose
from offload_adam.profiling.phases import Resource
from offload_adam.profiling.profile import RankProfile
from offload_adam.spans import Span
from tests.unit.profiling.synthetic import MS, PHASES, profile

FACTS = RunFacts(
    num_threads=2,
    num_cores=2,
    pinned=True,
    on_device=True,
    reduce_dtype=None,
    dtype="bf16",
)


@pytest.mark.parametrize(
    ("slowed", "facts", "resource", "setting"),
    [
        ("forward", FACTS, Resource.COMPUTE, ""),
        ("update", replace(FACTS, num_threads=1), Resource.UPDATE, "optimizer.num_threads"),
        ("update", FACTS, Resource.UPDATE, "--nproc-per-node"),
        ("H2D copy", replace(FACTS, pinned=False), Resource.COPIES, "memory.pin"),
        ("D2H copy", replace(FACTS, dtype="fp32"), Resource.COPIES, "train.dtype"),
        ("D2H copy", FACTS, Resource.COPIES, "train.gradient_accumulation_steps"),
        (
            "gather",
            replace(FACTS, reduce_dtype="fp32"),
            Resource.TRANSFERS,
            "optimizer.reduce_dtype",
        ),
        ("gather", FACTS, Resource.TRANSFERS, "train.gradient_accumulation_steps"),
        ("data", FACTS, Resource.DATA, "data"),
    ],
)
def test_the_slowed_phase_decides_the_resource(
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
    assert found.shares[Resource.TRANSFERS] == pytest.approx(5 / 34)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert "34.0 ms" in found.sentence
    assert "56%" in found.sentence


def test_without_steps_there_is_no_diagnosis() -> None:
    assert diagnose([RankProfile(0, "host", [])], FACTS) is None


@pytest.mark.parametrize(
    ("beside", "resource"),
    [
        ("update", Resource.UPDATE),
        ("H2D copy", Resource.COPIES),
        ("reduce", Resource.TRANSFERS),
        (None, Resource.UPDATE),
    ],
)
def test_a_wait_is_charged_to_the_work_of_other_threads(
    beside: str | None, resource: Resource
) -> None:
    found = profile(0, {**PHASES, "update wait": 60})
    spans = list(found.spans)
    for wait in (span for span in found.spans if span.name == "update wait"):
        if beside is not None:
            # `beside` takes the first 30 of its 60 ms, and a norm the next 10.
            middle_ns = (wait.start_ns + wait.end_ns) // 2
            spans.append(Span(beside, 0, "worker", wait.start_ns - 5 * MS, middle_ns))
            spans.append(Span("norm", 0, "worker", middle_ns, middle_ns + 10 * MS))
    spans.sort(key=lambda span: span.start_ns)
    diagnosis = diagnose([replace(found, spans=spans)], FACTS)
    assert diagnosis is not None
    assert diagnosis.resource is resource
    step = sum(PHASES.values()) + 60
    expected = {Resource.UPDATE: 9.0, Resource.COPIES: 0.0, Resource.TRANSFERS: 5.0}
    expected[resource] += 60.0 if beside is None else 45.0
    expected[Resource.UPDATE] += 0.0 if beside is None else 15.0
    for each, ms in expected.items():
        assert diagnosis.shares[each] == pytest.approx(ms / step)


def test_a_span_that_ends_in_the_next_step_hides_no_other() -> None:
    """If a span of another thread outlasts a step, the next spans of that step still count."""
    found = profile()
    long = [
        Span("update", 0, "worker", span.start_ns + 1, span.end_ns + 5 * MS)
        for span in found.spans
        if span.name == "train step"
    ]
    spans = sorted([*found.spans, *long], key=lambda span: span.start_ns)
    plain, disturbed = diagnose([found], FACTS), diagnose([replace(found, spans=spans)], FACTS)
    assert plain is not None
    assert disturbed is not None
    for resource in (Resource.COMPUTE, Resource.DATA):
        assert disturbed.shares[resource] == plain.shares[resource] > 0
