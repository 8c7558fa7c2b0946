"""Profiles of ranks whose clocks differ and drift: their collectives overlap on rank 0's clock."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.session import NUM_PROBES, profiled
from offload_adam.spans import span
from tests.support.ranks import RankPool

NUM_COLLECTIVES = 20
TICK_NS = 1_000_000
DRIFT = 10
"""The clock of rank r gains r ticks in this many."""
# A rank's offset is that of a probe, and is taken to be that of the moment after the last one.
# A probe reads the clock three times, beside a few readings of the threads that sample memory.
TOLERANCE_NS = 4 * NUM_PROBES * 2 * TICK_NS // DRIFT


def profile_collectives(rank: int, world_size: int, folder: str) -> list[RankProfile]:
    """Profile some collectives with a clock of this rank's own, and return all profiles.

    The time is one number in the ranks' store, so that none can lose the core for a while: every
    reading on any rank takes a tick of it, and work as many as it says.
    """
    collected: list[RankProfile] = []
    original, store = time.perf_counter_ns, _get_default_store()

    def pass_ticks(num_ticks: int) -> int:
        return int(store.add("now", num_ticks)) * TICK_NS

    def own_clock() -> int:
        now_ns = pass_ticks(1)
        return now_ns + rank * (100_000_000_000 + now_ns // DRIFT)

    time.perf_counter_ns = own_clock
    chance = random.Random(rank)
    try:
        with profiled(
            Path(folder),
            dict,
            collected.extend,
            interval_s=10.0,
            rank=rank,
            world_size=world_size,
            store=store,
        ):
            for number in range(NUM_COLLECTIVES):
                dist.barrier()  # so that no rank's work falls between the others' probes
                pass_ticks(chance.randrange(100))
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
    assert max(span.end_ns for span in profiles[2].spans) - begin > 2 * DRIFT * TOLERANCE_NS
