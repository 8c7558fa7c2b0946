"""Find accesses to the same memory that nothing orders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Clock = tuple[int, ...]
"""How much of each actor's work is ordered before a point, one count an actor."""


class Race(NamedTuple):
    """Two accesses, at least one of them a write, that nothing orders; by their tasks' names."""

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
    """Remembers who read and wrote what, and reports what is unordered.

    Of each actor its last accesses suffice: what is ordered after them is after all earlier ones.
    Memory is told apart by the address of its storage, which nobody else may get meanwhile.

    Args:
        actors: whose counts the clocks hold, in their order.
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
        """Note accesses by an actor's work at `clock`, after a look at all before."""
        access = _Access(clock[self._places[actor]], name)
        for tensor in reads:
            for stretch in self._of(tensor):
                self._compare(actor, clock, name, stretch.writes)
            self._own(tensor).reads[actor] = access
        for tensor in writes:
            for stretch in self._of(tensor):
                self._compare(actor, clock, name, stretch.writes)
                self._compare(actor, clock, name, stretch.reads)
            self._own(tensor).writes[actor] = access

    def forget(self, tensor: torch.Tensor) -> None:
        """Begin anew with memory that its allocator has taken back and hands out again."""
        self._stretches.pop(tensor.untyped_storage().data_ptr(), None)

    def _compare(self, actor: str, clock: Clock, name: str, others: dict[str, _Access]) -> None:
        for other, access in others.items():
            if other != actor and access.number > clock[self._places[other]]:
                race = Race(access.name, name)
                if race not in self.races:
                    self.races.append(race)

    def _of(self, tensor: torch.Tensor) -> list[_Stretch]:
        """Return the known stretches that overlap with a tensor."""
        start, end = _bounds(tensor)
        known = self._stretches[tensor.untyped_storage().data_ptr()].values()
        return [stretch for stretch in known if stretch.start < end and start < stretch.end]

    def _own(self, tensor: torch.Tensor) -> _Stretch:
        bounds = _bounds(tensor)
        known = self._stretches[tensor.untyped_storage().data_ptr()]
        return known.setdefault(bounds, _Stretch(*bounds))


def _bounds(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where a tensor lies, from its first byte to after its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
