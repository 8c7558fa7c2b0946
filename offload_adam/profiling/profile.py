"""What profiling has found on every rank, as plain values that the trace and the report draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from offload_adam.spans import NO_BUCKET, Span


@dataclass(frozen=True)
class RankProfile:
    """One rank's spans and memory samples, with times in nanoseconds of rank 0's clock.

    samples: the lines of `memory.jsonl`.
    peaks: the largest bytes of each category of the ledger.
    num_dropped: spans that found no room.
    """

    rank: int
    host: str
    spans: list[Span]
    samples: list[dict[str, Any]] = field(default_factory=list)
    peaks: Mapping[str, int] = field(default_factory=dict)
    num_dropped: int = 0

    def to_json(self) -> str:
        """Return the profile as JSON."""
        return json.dumps({**asdict(self), "spans": [list(span) for span in self.spans]})

    @staticmethod
    def from_json(text: str | bytes) -> RankProfile:
        """Return what `to_json` wrote."""
        values = json.loads(text)
        return RankProfile(**{**values, "spans": [Span(*span) for span in values["spans"]]})

    def on_clock(self, clock: Callable[[int], int]) -> RankProfile:
        """Return it with every time taken to another clock."""
        return replace(
            self,
            spans=[
                span._replace(start_ns=clock(span.start_ns), end_ns=clock(span.end_ns))
                for span in self.spans
            ],
            samples=[{**sample, "time_ns": clock(sample["time_ns"])} for sample in self.samples],
        )


STEP = "train step"
"""The span that encloses a whole step; everything else of its thread lies within one. In place of a
bucket it has the step's number."""


def self_times_ns(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Return each span with the time in it that no span within it, on its thread, accounts for."""
    own = [span.end_ns - span.start_ns for span in spans]
    open_spans: dict[str, list[int]] = {}
    order = sorted(range(len(spans)), key=lambda i: (spans[i].start_ns, -spans[i].end_ns))
    for i in order:
        stack = open_spans.setdefault(spans[i].thread, [])
        while stack and spans[stack[-1]].end_ns <= spans[i].start_ns:
            stack.pop()
        if stack:
            own[stack[-1]] -= spans[i].end_ns - spans[i].start_ns
        stack.append(i)
    return list(zip(spans, own, strict=True))


def inside_steps(spans: Sequence[Span]) -> list[tuple[Span, list[Span]]]:
    """Return each step with all spans that lie within it on its thread, itself among them.

    The first step, which compiles and allocates, is left out where there are others.

    Args:
        spans: by start, as a recorder gives them.
    """
    steps = steps_of(spans)
    counted = steps[1:] or steps
    inside: list[tuple[Span, list[Span]]] = [(step, []) for step in counted]
    number = 0
    for span in spans:
        while number < len(counted) and counted[number].end_ns <= span.start_ns:
            number += 1
        if number == len(counted):
            break
        step = counted[number]
        if span.thread == step.thread and step.start_ns <= span.start_ns <= step.end_ns:
            inside[number][1].append(span)
    return inside


def steps_of(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of whole steps, in order."""
    return [span for span in spans if span.name == STEP]


def label_of(span: Span) -> str:
    """Return the name that a span is drawn with."""
    return span.name if span.bucket == NO_BUCKET else f"{span.name} #{span.bucket}"
