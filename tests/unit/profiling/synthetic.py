"""Profiles with known answers: steps of two ranks, in whole milliseconds."""

from __future__ import annotations

from collections.abc import Mapping

from offload_adam.profiling.phases import STEP
from offload_adam.profiling.profile import RankProfile
from offload_adam.spans import NO_BUCKET, Span

MS = 1_000_000
PHASES = {"data": 1, "forward": 8, "backward": 14, "update": 9, "gather": 2}
NUM_STEPS = 5


def profile(rank: int = 0, phases: Mapping[str, int] = PHASES, *, start_ms: int = 0) -> RankProfile:
    """Return steps of these phases in sequence. A `reduce` takes the last 3 ms of `backward`."""
    spans = []
    now = start_ms * MS
    for number in range(1, 1 + NUM_STEPS):
        begin = now
        for name, length_ms in phases.items():
            spans.append(Span(name, NO_BUCKET, "MainThread", now, now + length_ms * MS))
            now += length_ms * MS
            if name == "backward":
                spans.append(Span("reduce", 0, "MainThread", now - 3 * MS, now))
        spans.append(Span(STEP, number, "MainThread", begin, now))
    samples = [
        {"time_ns": i * MS, "rss": 2**30, "available": 2**33, "ledger": {"state": 2**20 * i}}
        for i in range(10)
    ]
    spans.sort(key=lambda span: span.start_ns)
    return RankProfile(rank, "host", spans, samples, {"state": 9 * 2**20})
