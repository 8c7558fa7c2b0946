"""The ledger: the bytes that an optimizer has allocated, by category, bucket and device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from offload_adam.layout.budget import Category
from offload_adam.params.bucket import BucketState


class LedgerEntry(NamedTuple):
    """The bytes of one allocation.

    category: a `Category`, or torch's key of a state tensor, such as "exp_avg".
    bucket: None for memory that all buckets share.
    device: "cpu", "cuda:0" and so on.
    """

    category: str
    bucket: int | None
    device: str
    nbytes: int


def bucket_entries(state: BucketState) -> Iterator[LedgerEntry]:
    """Yield the allocations of one bucket: its parameters and this rank's planes of state."""
    index = state.layout.index
    yield LedgerEntry(Category.PARAMETERS, index, str(state.device), state.flat.nbytes)
    planes = state.planes.allocated(own_master=state.own_master)
    if state.planes.gradient_shard is not None:
        planes[Category.GRADIENT_SHARDS] = state.planes.gradient_shard
    for category, plane in planes.items():
        yield LedgerEntry(category, index, str(plane.device), plane.nbytes)


def by_category(entries: Iterable[LedgerEntry]) -> dict[str, int]:
    """Return bytes by category; those on a device have keys such as "exp_avg on cuda:0"."""
    totals: Counter[str] = Counter()
    for entry in entries:
        totals[_label(entry)] += entry.nbytes
    return dict(totals)


def by_bucket(entries: Iterable[LedgerEntry]) -> dict[int, dict[str, int]]:
    """Return the bytes of each bucket by category, without memory that all buckets share."""
    buckets: dict[int, dict[str, int]] = {}
    for entry in entries:
        if entry.bucket is not None:
            buckets.setdefault(entry.bucket, {})[_label(entry)] = entry.nbytes
    return buckets


def _label(entry: LedgerEntry) -> str:
    return entry.category if entry.device == "cpu" else f"{entry.category} on {entry.device}"
