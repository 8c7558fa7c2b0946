"""How far each rank's clock is from rank 0's, measured through the store that ranks meet at."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

NUM_PROBES = 16
_PREFIX = "offload_adam/clock"


@dataclass(frozen=True, slots=True)
class Reading:
    """What to add to this process's clock to have rank 0's, and when that was found, in ns."""

    at_ns: int
    offset_ns: int


@dataclass(frozen=True, slots=True)
class ClockMap:
    """Takes times of this process's clock to rank 0's; two hosts' clocks drift apart meanwhile."""

    begin: Reading
    end: Reading

    def __call__(self, time_ns: int) -> int:
        """Return the time on rank 0's clock, as if the drift were even."""
        passed_ns = self.end.at_ns - self.begin.at_ns
        drift_ns = self.end.offset_ns - self.begin.offset_ns
        if passed_ns <= 0:
            return time_ns + self.end.offset_ns
        return time_ns + self.begin.offset_ns + drift_ns * (time_ns - self.begin.at_ns) // passed_ns


def read_clock(store: dist.Store | None, rank: int, world_size: int, *, label: str) -> Reading:
    """Return how far this process's clock is from rank 0's now. Collective.

    Args: as `clock_offset_ns`; without a store this process is alone.
    """
    if store is None or world_size == 1:
        return Reading(time.perf_counter_ns(), 0)
    offset_ns = clock_offset_ns(store, rank, world_size, label=label)
    return Reading(time.perf_counter_ns(), offset_ns)


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
