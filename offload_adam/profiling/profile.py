"""The spans and memory samples of one rank, and the Chrome trace of all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from offload_adam.profiling.phases import STEP
from offload_adam.spans import NO_BUCKET, Span


@dataclass(frozen=True)
class RankProfile:
    """What one rank recorded. After collection, all times are nanoseconds of rank 0's clock.

    spans: by start.
    samples: the lines of `memory.jsonl`.
    peaks: maximum bytes of each category of the ledger.
    num_dropped: number of older spans that were overwritten.
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
        """Return the profile that `to_json` wrote."""
        values = json.loads(text)
        return RankProfile(**{**values, "spans": [Span(*span) for span in values["spans"]]})

    def on_clock(self, clock: Callable[[int], int]) -> RankProfile:
        """Return a copy in which `clock` has converted every time."""
        return replace(
            self,
            spans=[
                span._replace(start_ns=clock(span.start_ns), end_ns=clock(span.end_ns))
                for span in self.spans
            ],
            samples=[{**sample, "time_ns": clock(sample["time_ns"])} for sample in self.samples],
        )


def steps_of(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of whole steps, in order."""
    return [span for span in spans if span.name == STEP]


def inside_steps(spans: Sequence[Span]) -> list[tuple[Span, list[Span]]]:
    """Return each step with the spans that start in it on its thread, itself included.

    The first step, which compiles and allocates, is skipped unless it is the only one.

    Args:
        spans: by start.
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


def self_times_ns(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Return each span with its time minus that of the spans nested in it on its thread."""
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


def label_of(span: Span) -> str:
    """Return a span's name with its bucket, such as 'update #3'."""
    return span.name if span.bucket == NO_BUCKET else f"{span.name} #{span.bucket}"


def write_trace(profiles: Sequence[RankProfile], path: Path) -> None:
    """Write a Chrome trace, which Perfetto and chrome://tracing open.

    Each thread of each rank has a track, and each rank has a counter of its memory. Times are
    microseconds since the first span or sample of any rank, on rank 0's clock.

    Source: Google, "Trace Event Format".
    """
    spans = [profile.spans[0].start_ns for profile in profiles if profile.spans]
    samples = [profile.samples[0]["time_ns"] for profile in profiles if profile.samples]
    origin_ns = min([*spans, *samples], default=0)
    events = [event for profile in profiles for event in _events(profile, origin_ns)]
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    path.write_text(text, encoding="utf-8")


def _events(profile: RankProfile, origin_ns: int) -> Iterator[dict[str, Any]]:
    pid = profile.rank

    def named(what: str, tid: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}

    yield named("process_name", 0, f"rank {profile.rank} on {profile.host}")
    threads = {name: tid for tid, name in enumerate(dict.fromkeys(s.thread for s in profile.spans))}
    yield from (named("thread_name", tid, name) for name, tid in threads.items())
    for span in profile.spans:
        yield {
            "ph": "X",
            "name": label_of(span),
            "cat": span.name,
            "pid": pid,
            "tid": threads[span.thread],
            "ts": (span.start_ns - origin_ns) / 1e3,
            "dur": (span.end_ns - span.start_ns) / 1e3,
        }
    for sample in profile.samples:
        values = {"rss": sample["rss"], **sample["ledger"]}
        if "device_allocated" in sample:
            values["device"] = sample["device_allocated"]
        yield {
            "ph": "C",
            "name": "memory, bytes",
            "pid": pid,
            "ts": (sample["time_ns"] - origin_ns) / 1e3,
            "args": values,
        }
