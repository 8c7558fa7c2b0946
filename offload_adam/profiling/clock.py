"""How far each rank's clock is from rank 0's, measured through the store that ranks meet at."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

NUM_PROBES = 16
_PREFIX = "offload_adam/clock"


def clock_offset_ns(store: dist.Store, rank: int, world_size: int, *, label: str) -> int:
    """Return what to add to this process's `perf_counter_ns` to have rank 0's. Collective.

    Rank 0 answers the others one after the other with its own time. Of sixteen questions the one
    that was answered soonest counts, and the answer is taken to stem from the middle of it: it is
    wrong by at most half of that time.

    Args:
        label: makes this measurement's keys its own; the same on all ranks, never used twice.

    Source: Mills, "Internet Time Synchronization: the Network Time Protocol" (1991).
    """
    if rank == 0:
        for other in range(1, world_size):
            for probe in range(NUM_PROBES):
                _wait(store, f"{_PREFIX}/{label}/{other}/{probe}/ask")
                answer = str(time.perf_counter_ns())
                store.set(f"{_PREFIX}/{label}/{other}/{probe}/answer", answer)
        return 0
    best_ns, offset_ns = None, 0
    for probe in range(NUM_PROBES):
        asked_ns = time.perf_counter_ns()
        store.set(f"{_PREFIX}/{label}/{rank}/{probe}/ask", "")
        answer_ns = int(_wait(store, f"{_PREFIX}/{label}/{rank}/{probe}/answer"))
        received_ns = time.perf_counter_ns()
        if best_ns is None or received_ns - asked_ns < best_ns:
            # The first probe may have waited for the ranks before this one.
            best_ns = received_ns - asked_ns
            offset_ns = answer_ns - (asked_ns + received_ns) // 2
    return offset_ns


def _wait(store: dist.Store, key: str) -> bytes:
    store.wait([key], timedelta(minutes=5))
    value: bytes = store.get(key)
    return value
