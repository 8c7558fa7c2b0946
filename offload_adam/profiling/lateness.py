"""Which rank the others wait for, and how long, in the collectives of a merged profile.

A collective moves nothing before its last rank has begun it: what a rank waits until then is that
rank's lateness, and only the rest is the transfer. All times are on one clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from offload_adam.profiling.profile import RankProfile
from offload_adam.spans import NO_BUCKET, Span

LATE = "late rank"
"""The part of a wait in which a rank is still missing; in place of a bucket it has that rank."""

_AT_ONCE = frozenset({"agree", "all-reduce"})
"""Collectives that a rank begins where it begins to wait for them."""


class _Collective(NamedTuple):
    """One rank's part: when it began it, and which of its spans is the wait for its end."""

    begun_ns: int
    wait: int


def with_late_ranks(profiles: Sequence[RankProfile]) -> list[RankProfile]:
    """Return the profiles with every wait for a collective divided where its last rank begins it.

    The first part is a span `LATE`, the second one keeps the name and is left out where it is
    empty. What only some of the ranks have recorded stays whole.
    """
    if len(profiles) < 2:
        return list(profiles)
    parts = [_collectives(profile.spans) for profile in profiles]
    until: list[dict[int, tuple[int, int]]] = [{} for _ in profiles]
    for key in set.intersection(*(set(part) for part in parts)):
        # From the last one back: a long run keeps its latest spans only.
        for members in zip(*(reversed(part[key]) for part in parts), strict=False):
            last = max(range(len(members)), key=lambda i: members[i].begun_ns)
            for i, member in enumerate(members):
                # The last one waits from its own begin on: for it there is nothing to divide.
                until[i][member.wait] = (members[last].begun_ns, profiles[last].rank)
    return [
        replace(profile, spans=list(_divided(profile.spans, ends)))
        for profile, ends in zip(profiles, until, strict=True)
    ]


def _divided(spans: Sequence[Span], until: Mapping[int, tuple[int, int]]) -> Iterable[Span]:
    for number, span in enumerate(spans):
        if number not in until:
            yield span
            continue
        begun_ns, rank = until[number]
        middle_ns = min(max(begun_ns, span.start_ns), span.end_ns)
        if middle_ns > span.start_ns:
            yield Span(LATE, rank, span.thread, span.start_ns, middle_ns)
        if middle_ns < span.end_ns:
            yield span._replace(start_ns=middle_ns)


def _collectives(spans: Sequence[Span]) -> dict[tuple[str, int], list[_Collective]]:
    """Return the collectives of one rank by name and bucket, in their order.

    A bucket's mean begins when it has been packed, and is waited for in `reduce`. Of a gather there
    are two spans: the first begins it and the second waits.
    """
    begins: dict[tuple[str, int], list[int]] = defaultdict(list)
    waits: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, span in enumerate(spans):
        key = (span.name, span.bucket)
        if span.name in _AT_ONCE:
            begins[key].append(span.start_ns)
            waits[key].append(number)
        elif span.name == "pack":
            begins["reduce", span.bucket].append(span.end_ns)
        elif span.name in ("reduce", "gather") and span.bucket != NO_BUCKET:
            waits[key].append(number)
    for key in waits:
        if key[0] == "gather":
            begins[key] = [spans[number].end_ns for number in waits[key][-2::-2][::-1]]
            waits[key] = waits[key][-1::-2][::-1]
    return {
        key: [_Collective(*pair) for pair in _from_the_end(begins[key], waits[key])]
        for key in waits
    }


def _from_the_end(begins: Sequence[int], waits: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of both, of which either may lack its first ones."""
    count = min(len(begins), len(waits))
    return list(zip(begins[len(begins) - count :], waits[len(waits) - count :], strict=True))
