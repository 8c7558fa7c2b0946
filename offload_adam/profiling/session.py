"""Recording of spans and memory on every rank of a run, and their collection on rank 0."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from offload_adam.profiling.json_lines import read_objects
from offload_adam.profiling.profile import RankProfile, write_trace
from offload_adam.profiling.sampler import Ledger, MemorySampler
from offload_adam.spans import SpanRecorder, recorded_by

logger = logging.getLogger(__name__)

NUM_PROBES = 16
_TIMEOUT = timedelta(minutes=5)


@contextmanager
def profiled(
    folder: Path,
    ledger: Ledger,
    finish: Callable[[list[RankProfile]], None],
    *,
    interval_s: float,
    rank: int = 0,
    world_size: int = 1,
    store: dist.Store | None = None,
) -> Iterator[SpanRecorder]:
    """Record spans and memory in the context; then rank 0 writes the trace and calls `finish`.

    Collective when it is entered and left. If rank 0 cannot write, the error is logged and the run
    continues.

    Args:
        folder: the run's folder. Rank 0 writes `memory.jsonl` and `trace.json` there. Other ranks
            write their samples there, too, and delete them when rank 0 has collected them.
        ledger: returns the bytes that are allocated now, by category.
        finish: called on rank 0 with the profiles of all ranks, in rank order.
        interval_s: time between two memory samples.
        store: shared by all ranks; None for a single rank.
    """
    if store is not None:
        # Each profile of a process has its own keys. All ranks profile equally often.
        number = store.add(f"offload_adam/profile/entered/{rank}", 1)
        store = dist.PrefixStore(f"offload_adam/profile/{number}", store)
    recorder = SpanRecorder()
    memory = folder / ("memory.jsonl" if rank == 0 else f"memory-rank-{rank}.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    sampler = MemorySampler(memory, ledger, interval_s=interval_s)
    begin = _read_clock(store, rank, world_size, "begin")
    with recorded_by(recorder), sampler:
        yield recorder
    logger.info("Sampling the memory took %.3f s of CPU time", sampler.busy_s)
    samples = [sample for _, sample in read_objects(memory, "time_ns", "rss", "ledger")]
    peaks: dict[str, int] = {}
    for sample in samples:
        for category, nbytes in sample["ledger"].items():
            peaks[category] = max(peaks.get(category, 0), nbytes)
    host, num_dropped = socket.gethostname(), recorder.num_dropped
    own = RankProfile(rank, host, recorder.spans(), samples, peaks, num_dropped)
    clock = clock_of_rank_0(begin, _read_clock(store, rank, world_size, "end"))
    profiles = _collect(store, own.on_clock(clock), world_size)
    if rank != 0:
        memory.unlink(missing_ok=True)
        return
    try:
        write_trace(profiles, folder / "trace.json")
        finish(profiles)
    except OSError:
        logger.exception("Cannot write the profile to %s", folder)


def _collect(store: dist.Store | None, own: RankProfile, world_size: int) -> list[RankProfile]:
    """Return the profiles of all ranks on rank 0, [] elsewhere. Collective."""
    if store is None:
        return [own]
    if own.rank != 0:
        store.set(f"rank/{own.rank}", own.to_json())
        store.wait(["collected"], _TIMEOUT)
        return []
    profiles = [own]
    for rank in range(1, world_size):
        profiles.append(RankProfile.from_json(_wait(store, f"rank/{rank}")))
        store.delete_key(f"rank/{rank}")
    store.set("collected", "")
    return profiles


class ClockReading(NamedTuple):
    """What to add to this process's clock to get rank 0's, and when it was measured; both in ns."""

    at_ns: int
    offset_ns: int


def clock_of_rank_0(begin: ClockReading, end: ClockReading) -> Callable[[int], int]:
    """Return a function from times of this process's clock to those of rank 0's.

    The clocks of two hosts drift apart: the offset is interpolated linearly between the readings.
    """
    passed_ns, drift_ns = end.at_ns - begin.at_ns, end.offset_ns - begin.offset_ns

    def clock(time_ns: int) -> int:
        if passed_ns <= 0:
            return time_ns + end.offset_ns
        return time_ns + begin.offset_ns + drift_ns * (time_ns - begin.at_ns) // passed_ns

    return clock


def _read_clock(store: dist.Store | None, rank: int, world_size: int, label: str) -> ClockReading:
    """Measure the offset of this process's `perf_counter_ns` from rank 0's. Collective.

    Rank 0 answers the probes of the other ranks, rank by rank, with its own time. The probe with
    the quickest answer counts. Rank 0 is taken to have read its clock in the middle of that probe,
    so the error is at most half of the probe's time.

    Args:
        label: makes the keys of this measurement unique.

    Source: Mills, "Internet Time Synchronization: the Network Time Protocol" (1991).
    """
    if store is not None and rank == 0:
        for other in range(1, world_size):
            for probe in range(NUM_PROBES):
                _wait(store, f"clock/{label}/{other}/{probe}/ask")
                answer = str(time.perf_counter_ns())
                store.set(f"clock/{label}/{other}/{probe}/answer", answer)
    if store is None or rank == 0:
        return ClockReading(time.perf_counter_ns(), 0)
    probes: list[tuple[int, int]] = []
    for probe in range(NUM_PROBES):
        asked_ns = time.perf_counter_ns()
        store.set(f"clock/{label}/{rank}/{probe}/ask", "")
        answer_ns = int(_wait(store, f"clock/{label}/{rank}/{probe}/answer"))
        received_ns = time.perf_counter_ns()
        # The first probe may be slow, because rank 0 was still answering the rank before this one.
        probes.append((received_ns - asked_ns, answer_ns - (asked_ns + received_ns) // 2))
    _, offset_ns = min(probes, key=lambda timed: timed[0])
    return ClockReading(time.perf_counter_ns(), offset_ns)


def _wait(store: dist.Store, key: str) -> bytes:
    store.wait([key], _TIMEOUT)
    value: bytes = store.get(key)
    return value
