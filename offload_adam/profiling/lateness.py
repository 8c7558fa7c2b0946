"""Divides each wait for a collective into a wait for the last rank, and the transfer.

A collective moves no data before its last rank enters it. All times are on one clock:

    rank 0   | late rank #1 ... | reduce ... |
    rank 1   | forward .........| reduce ... |
                                ^ rank 1 enters
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from offload_adam.profiling.phases import ENTERED_AND_WAITED, LATE
from offload_adam.profiling.profile import RankProfile
from offload_adam.spans import NO_BUCKET, Span


class _Collective(NamedTuple):
    """One rank's part: when it entered, and the index of the span in which it waits for the end."""

    entered_ns: int
    wait: int


def with_late_ranks(profiles: Sequence[RankProfile]) -> list[RankProfile]:
    """Return the profiles with every wait for a collective divided where its last rank enters it.

    The first part becomes a span `LATE`. The second part keeps its name, and is omitted if it is
    empty. Collectives that some ranks did not record are not divided.
    """
    if len(profiles) < 2:
        return list(profiles)
    parts = [_collectives(profile.spans) for profile in profiles]
    until: list[dict[int, tuple[int, int]]] = [{} for _ in profiles]
    for key in set.intersection(*(set(part) for part in parts)):
        # Matched from the end: a long run has lost its earliest spans, on each rank another number.
        for members in zip(*(reversed(part[key]) for part in parts), strict=False):
            last = max(range(len(members)), key=lambda i: members[i].entered_ns)
            for i, member in enumerate(members):
                until[i][member.wait] = (members[last].entered_ns, profiles[last].rank)
    return [
        replace(profile, spans=list(_divided(profile.spans, ends)))
        for profile, ends in zip(profiles, until, strict=True)
    ]


def _divided(spans: Sequence[Span], until: Mapping[int, tuple[int, int]]) -> Iterator[Span]:
    """Yield the spans, those in `until` divided.

    Args:
        until: by the index of a wait, when the last rank entered the collective, and which rank.
    """
    for number, span in enumerate(spans):
        entered_ns, rank = until.get(number, (span.start_ns, NO_BUCKET))
        middle_ns = min(max(entered_ns, span.start_ns), span.end_ns)
        if middle_ns > span.start_ns:
            yield Span(LATE, rank, span.thread, span.start_ns, middle_ns)
        if middle_ns < span.end_ns or number not in until:
            yield span._replace(start_ns=middle_ns)


def _collectives(spans: Sequence[Span]) -> dict[tuple[str, int], list[_Collective]]:
    """Return the collectives of one rank by name and bucket, in order.

    A bucket's mean is entered when the bucket is packed, and waited for in `reduce`. A gather has
    two spans: it is entered at the end of the first, and waited for in the second.
    """
    entered: dict[tuple[str, int], list[int]] = defaultdict(list)
    waits: dict[tuple[str, int], list[int]] = defaultdict(list)  # indices of `spans`
    for number, span in enumerate(spans):
        key = (span.name, span.bucket)
        if span.name in ENTERED_AND_WAITED:
            entered[key].append(span.start_ns)
            waits[key].append(number)
        elif span.name == "pack":
            entered["reduce", span.bucket].append(span.end_ns)
        elif span.name in ("reduce", "gather") and span.bucket != NO_BUCKET:
            waits[key].append(number)
    found = {}
    for key, numbers in waits.items():
        if key[0] == "gather":
            # Of an odd number, the first has lost its partner.
            numbers = numbers[len(numbers) % 2 :]
            entered[key] = [spans[number].end_ns for number in numbers[::2]]
            numbers = numbers[1::2]
        # Either list may lack its earliest entries.
        surplus = len(entered[key]) - len(numbers)
        pairs = zip(entered[key][max(0, surplus) :], numbers[max(0, -surplus) :], strict=True)
        found[key] = [_Collective(*pair) for pair in pairs]
    return found
