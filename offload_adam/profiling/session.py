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

from offload_adam.observe.spans import SpanRecorder, recorded_by
from offload_adam.profiling.clock import clock_offset_ns
from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.sampler import Ledger, MemorySampler
from offload_adam.profiling.trace import write_trace

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

    Collective at its end. A failure to write is logged and does not end the run.

    Args:
        ledger: returns the bytes held now, by category.
        finish: gets all ranks' profiles in rank order, on rank 0.
        interval_s: between two memory samples.
    """
    recorder = SpanRecorder()
    memory = place.folder / (MEMORY_NAME if place.rank == 0 else f"memory-rank-{place.rank}.jsonl")
    place.folder.mkdir(parents=True, exist_ok=True)
    sampler = MemorySampler(memory, ledger, interval_s=interval_s)
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
    profiles = _collect(place, own)
    if place.rank != 0:
        memory.unlink(missing_ok=True)
        return
    try:
        write_trace(profiles, place.folder / TRACE_NAME)
        finish(profiles)
    except OSError:
        logger.exception("the profile cannot be written to %s", place.folder)


def _collect(place: ProfiledRank, own: RankProfile) -> list[RankProfile]:
    """Return every rank's profile on rank 0, on its clock; [] elsewhere. Collective."""
    if place.store is None or place.world_size == 1:
        return [own]
    store = dist.PrefixStore(f"offload_adam/profile/{_label(place)}", place.store)
    offset_ns = clock_offset_ns(store, place.rank, place.world_size, label="end")
    shifted = own.shifted(offset_ns)
    if place.rank != 0:
        store.set(f"rank/{place.rank}", shifted.to_json())
        store.wait(["collected"], _COLLECTION)
        return []
    profiles = [shifted]
    for rank in range(1, place.world_size):
        store.wait([f"rank/{rank}"], _COLLECTION)
        profiles.append(RankProfile.from_json(store.get(f"rank/{rank}")))
        store.delete_key(f"rank/{rank}")
    store.set("collected", "")
    return profiles


def _label(place: ProfiledRank) -> str:
    """Return a name that all ranks share and no earlier profile of this store had. Collective."""
    assert place.store is not None
    number = place.store.add(f"offload_adam/profile/entered/{place.rank}", 1)
    key = f"offload_adam/profile/label/{number}"
    if place.rank == 0:
        place.store.set(key, uuid.uuid4().hex)
    place.store.wait([key], _COLLECTION)
    return str(place.store.get(key), "ascii")


def _peaks(samples: list[Mapping[str, Mapping[str, int]]]) -> dict[str, int]:
    """Return the largest value of each category of the ledger."""
    peaks: dict[str, int] = {}
    for sample in samples:
        for category, nbytes in sample["ledger"].items():
            peaks[category] = max(peaks.get(category, 0), nbytes)
    return peaks
