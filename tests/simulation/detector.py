"""Detect races: unordered accesses to the same memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Clock = tuple[int, ...]
"""A vector clock: for each actor, how much of its work is ordered before a point."""


class Race(NamedTuple):
    """The task names of two unordered accesses, of which at least one is a write."""

    first: str
    second: str


class _Access(NamedTuple):
    number: int
    name: str


@dataclass
class _Stretch:
    """Bytes [start, end) of a storage, and each actor's last read and write of them."""

    start: int
    end: int
    reads: dict[str, _Access] = field(default_factory=dict)
    writes: dict[str, _Access] = field(default_factory=dict)


class Detector:
    """Records each actor's reads and writes of memory, and reports races.

    Only each actor's last accesses are stored: an access ordered after them is also ordered after
    all earlier ones. Memory is identified by its storage's address, so a test must not free a
    storage whose address may be reused.

    Args:
        actors: in the order of the clocks' counts.
    """

    def __init__(self, actors: Sequence[str]) -> None:
        self.races: list[Race] = []
        self._places = {actor: place for place, actor in enumerate(actors)}
        self._stretches: defaultdict[int, dict[tuple[int, int], _Stretch]] = defaultdict(dict)

    def access(
        self,
        actor: str,
        clock: Clock,
        name: str,
        reads: Iterable[torch.Tensor],
        writes: Iterable[torch.Tensor],
    ) -> None:
        """Compare accesses by an actor at `clock` with all earlier ones, and record them."""
        access = _Access(clock[self._places[actor]], name)
        for tensor in reads:
            own, overlapping = self._stretches_of(tensor)
            for stretch in overlapping:
                self._compare(actor, clock, name, stretch.writes)
            own.reads[actor] = access
        for tensor in writes:
            own, overlapping = self._stretches_of(tensor)
            for stretch in overlapping:
                self._compare(actor, clock, name, stretch.writes)
                self._compare(actor, clock, name, stretch.reads)
            own.writes[actor] = access

    def forget(self, tensor: torch.Tensor) -> None:
        """Forget all accesses to memory that its allocator has freed."""
        self._stretches.pop(tensor.untyped_storage().data_ptr(), None)

    def _compare(self, actor: str, clock: Clock, name: str, others: dict[str, _Access]) -> None:
        for other, access in others.items():
            if other != actor and access.number > clock[self._places[other]]:
                race = Race(access.name, name)
                if race not in self.races:
                    self.races.append(race)

    def _stretches_of(self, tensor: torch.Tensor) -> tuple[_Stretch, list[_Stretch]]:
        """Return a tensor's own stretch, and all known ones that overlap with it."""
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        known = self._stretches[tensor.untyped_storage().data_ptr()]
        own = known.get((start, end))
        if own is None:
            own = known[start, end] = _Stretch(start, end)
        return own, [s for s in known.values() if s.start < end and start < s.end]
