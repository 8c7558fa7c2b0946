"""The peak of the memory: its time, the phase of the training thread, and its largest parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_adam.profiling.peak import REST, peaks_of
from offload_adam.profiling.profile import RankProfile
from tests.unit.profiling.synthetic import MS, PHASES, profile

GIB = 2**30
STEP_MS = sum(PHASES.values())


def sampled(rank: int, *rss: int, **more: int) -> RankProfile:
    """Return a profile with a sample every 10 ms: host memory of `rss`, and 50 bytes on cuda:0."""
    ledger = {"exp_avg": 100, "parameters": 300, "parameters on cuda:0": 50, "slots": 0}
    samples = [
        {"time_ns": 10 * i * MS, "rss": size, "available": 1, "ledger": ledger, **more}
        for i, size in enumerate(rss)
    ]
    return replace(profile(rank), samples=samples)


def test_the_peak_is_the_fullest_sample_of_the_fullest_rank() -> None:
    # The peak is at 40 ms, which is 6 ms into the second step; its first ms is data.
    (peak,) = peaks_of([sampled(0, 500, 700), sampled(1, 1000, 500, 600, 700, 2000, 800)])
    assert (peak.rank, peak.where, peak.nbytes) == (1, "host", 2000)
    assert list(peak.parts.items()) == [(REST, 1600), ("parameters", 300), ("exp_avg", 100)]
    assert peak.seconds == pytest.approx(0.04)
    assert (peak.step, peak.phase) == (2, "forward")
    assert peak.sentence == (
        "Memory peaked in forward of step 2, 0.0 s after the first sample, with 1.95 KiB resident "
        "on rank 1. Its largest parts: the rest of the process (1.56 KiB, 80%), parameters (300 B, "
        "15%), exp_avg (100 B, 5%)."
    )


def test_a_device_has_a_peak_of_its_own() -> None:
    host, device = peaks_of([sampled(0, 500, device_allocated=80)])
    assert host.parts == {"parameters": 300, "exp_avg": 100, REST: 100}
    assert (device.where, device.nbytes) == ("cuda:0", 80)
    assert device.parts == {"parameters on cuda:0": 50, REST: 30}
    assert "allocated on cuda:0" in device.sentence


def test_outside_of_all_spans_no_phase_is_named() -> None:
    (peak,) = peaks_of([sampled(0, *range(400, 430))])
    assert (peak.phase, peak.step) == ("", None)
    assert 5 * STEP_MS < 29 * 10
    assert "between two steps" in peak.sentence
    assert peaks_of([RankProfile(0, "host", [])]) == []
