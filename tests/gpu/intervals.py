"""Intervals of time, and how much they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A half-open interval, in any unit."""

    start: float
    end: float


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union as intervals that neither overlap nor touch."""
    union: list[Interval] = []
    for interval in sorted(intervals):
        if union and interval.start <= union[-1].end:
            last = union.pop()
            interval = Interval(last.start, max(last.end, interval.end))
        union.append(interval)
    return union


def total(intervals: Sequence[Interval]) -> float:
    """Return the length of the union."""
    return sum(end - start for start, end in merged(intervals))


def shared(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Return the length of the intersection of both unions."""
    length = 0.0
    mine, others = merged(one), merged(other)
    first = 0
    for start, end in mine:
        while first < len(others) and others[first].end <= start:
            first += 1
        for number in range(first, len(others)):
            if others[number].start >= end:
                break
            length += min(end, others[number].end) - max(start, others[number].start)
    return length


def within(intervals: Iterable[Interval], windows: Sequence[Interval]) -> list[Interval]:
    """Return the intervals that begin in one of the windows."""
    return [i for i in intervals if any(w.start <= i.start < w.end for w in windows)]
