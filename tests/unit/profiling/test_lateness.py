"""Waits for a late rank are separated from transfers, and the late rank is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest

from offload_adam.profiling.diagnosis import diagnose
from offload_adam.profiling.lateness import with_late_ranks
from offload_adam.profiling.phases import LATE, STEP, Resource
from offload_adam.profiling.profile import RankProfile
from offload_adam.spans import NO_BUCKET, Span
from tests.unit.profiling.synthetic import MS
from tests.unit.profiling.test_diagnosis import FACTS

MAIN = "MainThread"


def rank_profile(
    rank: int, compute_ms: list[int], slowest_ms: list[int], transfer_ms: int
) -> RankProfile:
    """Return steps of a forward, a mean that ends on all ranks at once, an update and a gather.

    Args:
        compute_ms: of this rank, a step; slowest_ms: of the slowest one.
    """
    spans, now = [], 0
    for number, (own_ms, last_ms) in enumerate(zip(compute_ms, slowest_ms, strict=True), start=1):
        begin = now
        over = begin + (last_ms + 1 + transfer_ms) * MS

        def add(name: str, bucket: int, start: int, end: int) -> None:
            spans.append(Span(name, bucket, MAIN, start, end))

        packed = begin + own_ms * MS
        add("forward", NO_BUCKET, begin, packed)
        add("pack", 0, packed, packed + MS)
        add("reduce", 0, packed + MS, over)
        add("update", 0, over, over + 2 * MS)
        add("gather", 0, over + 2 * MS, over + 2 * MS)
        add("gather", 0, over + 2 * MS, over + (2 + transfer_ms) * MS)
        now = over + (2 + transfer_ms) * MS
        add(STEP, number, begin, now)
    spans.sort(key=lambda span: span.start_ns)
    return RankProfile(rank, f"host-{rank}", spans)


def world(compute_ms: Mapping[int, list[int]], transfer_ms: int) -> list[RankProfile]:
    slowest = [max(step) for step in zip(*compute_ms.values(), strict=True)]
    return [rank_profile(r, own, slowest, transfer_ms) for r, own in compute_ms.items()]


def times_ms(profile: RankProfile) -> Counter[tuple[str, int]]:
    total: Counter[tuple[str, int]] = Counter()
    for span in profile.spans:
        total[span.name, span.bucket] += (span.end_ns - span.start_ns) // MS
    return total


def test_a_wait_is_divided_where_the_last_rank_enters() -> None:
    profiles = world({0: [10, 10], 1: [30, 20], 2: [20, 10]}, transfer_ms=4)
    found = [times_ms(profile) for profile in with_late_ranks(profiles)]
    assert [times[LATE, 1] for times in found] == [30, 0, 20]
    assert [times["reduce", 0] for times in found] == [8, 8, 8]
    assert [times["gather", 0] for times in found] == [8, 8, 8]
    for times, profile in zip(found, profiles, strict=True):
        assert times.total() == times_ms(profile).total()
        assert times["forward", NO_BUCKET] == times_ms(profile)["forward", NO_BUCKET]


def test_the_last_rank_need_not_wait_for_the_collective_that_it_enters() -> None:
    """The last rank enters it during its backward, and waits for it only when it is over."""
    first = [Span("pack", 0, MAIN, 0, 1), Span("reduce", 0, MAIN, 1, 60)]
    last = [Span("pack", 0, MAIN, 20, 30), Span("reduce", 0, MAIN, 90, 91)]
    found, other = with_late_ranks([RankProfile(0, "", first), RankProfile(3, "", last)])
    assert found.spans[1:] == [Span(LATE, 3, MAIN, 1, 30), Span("reduce", 0, MAIN, 30, 60)]
    assert other.spans == last


def test_the_latest_spans_are_matched_if_a_rank_lost_its_earliest() -> None:
    whole = world({0: [10, 10, 10], 1: [30, 20, 15]}, transfer_ms=4)
    cut = replace(whole[0], spans=whole[0].spans[9:])  # as the oldest are written over
    found = with_late_ranks([cut, whole[1]])[0]
    assert times_ms(found)[LATE, 1] == 10 + 5


def test_a_collective_that_one_rank_did_not_record_is_not_divided() -> None:
    whole = world({0: [10], 1: [30]}, transfer_ms=4)
    assert with_late_ranks(whole[:1]) == whole[:1]
    bare = replace(whole[1], spans=[])
    assert with_late_ranks([whole[0], bare]) == [whole[0], bare]


def test_a_rank_that_is_always_late_is_named_with_its_phase() -> None:
    profiles = world({0: [10] * 4, 1: [10] * 4, 2: [10] * 4, 3: [50] * 4}, transfer_ms=4)
    found = diagnose(profiles, FACTS)
    assert found is not None
    assert (found.resource, found.setting) == (Resource.LATENESS, "")
    # Three ranks wait 40 of 61 ms, while the fourth is still in its forward.
    assert found.step_ms == pytest.approx(61.0)
    assert found.shares[Resource.LATENESS] == pytest.approx(40 / 61)
    assert found.shares[Resource.TRANSFERS] == pytest.approx(
        (3 * 8 + 8 * 21 / 61) / (4 * 61), rel=1e-6
    )
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert "Rank 3 on host-3 is 40.0 ms later than other ranks: its forward takes" in (
        found.sentence
    )
    assert "takes 40.0 ms longer" in found.sentence
    assert found.sentence.endswith(
        "Look for other processes on host-3, and compare the output of `offload-adam doctor` there "
        "with that of another rank's machine."
    )


def test_with_a_slow_network_no_rank_is_named() -> None:
    profiles = world({0: [10] * 4, 1: [12] * 4}, transfer_ms=40)
    found = diagnose(profiles, FACTS)
    assert found is not None
    assert (found.resource, found.setting) == (
        Resource.TRANSFERS,
        "train.gradient_accumulation_steps",
    )
    assert found.shares[Resource.TRANSFERS] == pytest.approx(80 / 95, abs=0.02)
    assert "Rank" not in found.sentence


def test_ranks_that_take_turns_in_being_late_are_not_named() -> None:
    profiles = world({0: [10, 10, 70, 10, 70], 1: [10, 70, 10, 70, 10]}, transfer_ms=1)
    found = diagnose(profiles, FACTS)
    assert found is not None
    # Each waits in half of the steps, and both equally long.
    assert found.shares[Resource.LATENESS] == pytest.approx(30 / 75)
    assert found.late is None
    assert found.resource is Resource.COMPUTE


def test_lateness_and_transfers_count_together() -> None:
    """Each of them takes less than the model, and both together take more."""
    profiles = world({0: [20, 10, 30, 10, 30], 1: [20, 30, 10, 30, 10]}, transfer_ms=9)
    found = diagnose(profiles, FACTS)
    assert found is not None
    step = 30 + 1 + 9 + 2 + 9
    assert found.step_ms == pytest.approx(step)
    assert found.shares[Resource.COMPUTE] == pytest.approx(20 / step)
    assert found.shares[Resource.LATENESS] == pytest.approx(10 / step)
    assert found.shares[Resource.TRANSFERS] == pytest.approx(18 / step)
    assert found.resource is Resource.TRANSFERS
    assert found.setting == "train.gradient_accumulation_steps"
    assert (
        "55% of it is spent on other ranks: 35% on transfers between ranks, 20% on waiting for "
        "late ranks. Raise train.gradient_accumulation_steps" in found.sentence
    )


def test_a_late_rank_is_named_even_if_another_resource_takes_longer() -> None:
    profiles = world({0: [80] * 4, 1: [100] * 4}, transfer_ms=1)
    found = diagnose(profiles, FACTS)
    assert found is not None
    assert found.resource is Resource.COMPUTE
    assert "Rank 1 on host-1 is 20.0 ms later than other ranks" in found.sentence
    profiles = world({0: [95] * 4, 1: [100] * 4}, transfer_ms=1)
    found = diagnose(profiles, FACTS)
    assert found is not None
    assert found.late is None


def test_a_phase_that_does_not_explain_the_lateness_is_not_named() -> None:
    profiles = world({0: [10] * 4, 1: [40] * 4}, transfer_ms=1)
    # Rank 1 does something before its forward that nothing records.
    spans = [
        span._replace(start_ns=span.start_ns + 25 * MS) if span.name == "forward" else span
        for span in profiles[1].spans
    ]
    found = diagnose([profiles[0], replace(profiles[1], spans=spans)], FACTS)
    assert found is not None
    assert found.late is not None
    assert (found.late.rank, found.late.phase) == (1, "")
    assert "later than other ranks. Look for other processes" in found.sentence


def test_lateness_on_another_thread_is_charged_to_the_late_rank() -> None:
    """Rank 0's copy thread waits for rank 1 while the training thread waits for it."""
    spans = {
        rank: [
            Span(STEP, 1, MAIN, 0, 100 * MS),
            Span("forward", NO_BUCKET, MAIN, 0, begun * MS),
            Span("pack", 0, MAIN, begun * MS, begun * MS),
            Span("reduce", NO_BUCKET, MAIN, begun * MS, 100 * MS),
            Span("reduce", 0, "update", begun * MS, 100 * MS),
        ]
        for rank, begun in ((0, 10), (1, 90))
    }
    found = diagnose([RankProfile(rank, "h", own) for rank, own in spans.items()], FACTS)
    assert found is not None
    assert found.resource is Resource.LATENESS
    assert found.late is not None
    assert found.late.rank == 1
    assert found.late.late_ms == pytest.approx(80.0)
    # Both ranks are on this host.
    assert found.late.sentence.endswith(
        "Look for other processes on h, and start no more ranks than it has cores."
    )
