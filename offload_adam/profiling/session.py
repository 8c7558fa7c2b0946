"""A profiled stretch of a run: what is recorded on each rank, and what rank 0 writes of it."""

from __future__ import annotations

import json
import logging
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from offload_adam.profiling.clock import ClockMap, read_clock
from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.sampler import Ledger, MemorySampler
from offload_adam.profiling.trace import write_trace
from offload_adam.spans import SpanRecorder, recorded_by

logger = logging.getLogger(__name__)

MEMORY_NAME, TRACE_NAME = "memory.jsonl", "trace.json"
_COLLECTION = timedelta(minutes=5)


@dataclass(frozen=True)
class ProfiledRank:
    """Who records, and where to.

    folder: the run's folder; rank 0 writes there, other ranks keep their samples in a folder of
        their own until they have sent them.
    store: what the ranks meet at, None for a rank alone.
    """

    rank: int
    world_size: int
    folder: Path
    store: dist.Store | None


@contextmanager
def profiled(
    place: ProfiledRank,
    ledger: Ledger,
    finish: Callable[[list[RankProfile]], None],
    *,
    interval_s: float,
) -> Iterator[SpanRecorder]:
    """Record spans and memory inside; afterwards rank 0 writes the trace and calls `finish`.

    Collective at its begin and its end. A failure to write is logged and does not end the run.

    Args:
        ledger: returns the bytes held now, by category.
        finish: gets all ranks' profiles in rank order, on rank 0.
        interval_s: between two memory samples.
    """
    recorder = SpanRecorder()
    memory = place.folder / (MEMORY_NAME if place.rank == 0 else f"memory-rank-{place.rank}.jsonl")
    place.folder.mkdir(parents=True, exist_ok=True)
    sampler = MemorySampler(memory, ledger, interval_s=interval_s)
    store = _meeting_place(place)
    begin = read_clock(store, place.rank, place.world_size, label="begin")
    with recorded_by(recorder), sampler:
        yield recorder
    logger.info("sampling memory took %.3f s of processor time", sampler.busy_s)
    samples = [json.loads(line) for line in memory.read_text(encoding="utf-8").splitlines()]
    own = RankProfile(
        place.rank,
        socket.gethostname(),
        recorder.spans(),
        samples,
        _peaks(samples),
        recorder.num_dropped,
    )
    end = read_clock(store, place.rank, place.world_size, label="end")
    profiles = _collect(place, store, own.on_clock(ClockMap(begin, end)))
    if place.rank != 0:
        memory.unlink(missing_ok=True)
        return
    try:
        write_trace(profiles, place.folder / TRACE_NAME)
        finish(profiles)
    except OSError:
        logger.exception("the profile cannot be written to %s", place.folder)


def _collect(place: ProfiledRank, store: dist.Store | None, own: RankProfile) -> list[RankProfile]:
    """Return every rank's profile on rank 0; [] elsewhere. Collective."""
    if store is None:
        return [own]
    if place.rank != 0:
        store.set(f"rank/{place.rank}", own.to_json())
        store.wait(["collected"], _COLLECTION)
        return []
    profiles = [own]
    for rank in range(1, place.world_size):
        store.wait([f"rank/{rank}"], _COLLECTION)
        profiles.append(RankProfile.from_json(store.get(f"rank/{rank}")))
        store.delete_key(f"rank/{rank}")
    store.set("collected", "")
    return profiles


def _meeting_place(place: ProfiledRank) -> dist.Store | None:
    """Return a store that all ranks share and no earlier profile has used. Collective."""
    if place.store is None or place.world_size == 1:
        return None
    number = place.store.add(f"offload_adam/profile/entered/{place.rank}", 1)
    key = f"offload_adam/profile/label/{number}"
    if place.rank == 0:
        place.store.set(key, uuid.uuid4().hex)
    place.store.wait([key], _COLLECTION)
    return dist.PrefixStore(f"offload_adam/profile/{place.store.get(key).decode()}", place.store)


def _peaks(samples: list[Mapping[str, Mapping[str, int]]]) -> dict[str, int]:
    """Return the largest value of each category of the ledger."""
    peaks: dict[str, int] = {}
    for sample in samples:
        for category, nbytes in sample["ledger"].items():
            peaks[category] = max(peaks.get(category, 0), nbytes)
    return peaks
