"""Profiles of ranks whose clocks differ and drift: their collectives overlap on rank 0's clock."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from offload_adam.observe.spans import span
from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.session import ProfiledRank, profiled
from tests.ranks import RankPool

NUM_COLLECTIVES = 20
TOLERANCE_NS = 20_000_000
"""Half of the quickest round trip through the store, on a machine that is busy."""


def profile_collectives(rank: int, world_size: int, folder: str) -> list[RankProfile]:
    """Profile some collectives with a clock of this rank's own, and return all profiles."""
    collected: list[RankProfile] = []
    original = time.perf_counter_ns
    origin_ns = original()
    # Minutes ahead, and a tenth of a second more with each second.
    time.perf_counter_ns = lambda: (
        original() + rank * (100_000_000_000 + (original() - origin_ns) // 10)
    )
    chance = random.Random(rank)
    try:
        place = ProfiledRank(rank, world_size, Path(folder), _get_default_store())
        with profiled(place, dict, collected.extend, interval_s=10.0):
            for number in range(NUM_COLLECTIVES):
                time.sleep(chance.uniform(0.0, 0.1))
                with span("all-reduce", number):
                    dist.all_reduce(torch.zeros(1))
    finally:
        time.perf_counter_ns = original
    return collected


def test_collectives_overlap_on_one_clock(ranks: RankPool, tmp_path: Path) -> None:
    profiles, others, _ = ranks.run(profile_collectives, 3, str(tmp_path))
    assert others == []
    assert [profile.rank for profile in profiles] == [0, 1, 2]
    for number in range(NUM_COLLECTIVES):
        spans = [span for p in profiles for span in p.spans if span.bucket == number]
        assert len(spans) == 3
        # Nobody is through before the last one has come.
        last_come = max(span.start_ns for span in spans)
        first_gone = min(span.end_ns for span in spans)
        assert last_come <= first_gone + TOLERANCE_NS
    # And the ranks took their time between them: without the drift the last would be far off.
    begin = min(span.start_ns for span in profiles[0].spans)
    assert max(span.end_ns for span in profiles[2].spans) - begin > 15 * TOLERANCE_NS
