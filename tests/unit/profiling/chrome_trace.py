"""A reader of Chrome's trace-event format that shares no code with the writer.

Source: Google, "Trace Event Format".
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NANOSECOND_US = 1e-3


@dataclass
class Trace:
    """What a viewer would draw.

    spans: (begin, end, category) in microseconds by process and thread, by begin.
    counters: (time, values) by process and name. names: of processes, and of their threads.
    """

    spans: dict[tuple[int, int], list[tuple[float, float, str]]] = field(default_factory=dict)
    counters: dict[tuple[int, str], list[tuple[float, dict[str, float]]]] = field(
        default_factory=dict
    )
    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[tuple[int, int], str] = field(default_factory=dict)


def read_trace(path: Path) -> Trace:
    """Read a trace, and reject what the format does not allow or a viewer would draw wrongly.

    Raises:
        AssertionError: naming the event.
    """
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject_constant)
    assert isinstance(values, dict), "the object form has other keys beside the events"
    assert values.get("displayTimeUnit", "ms") in ("ms", "ns")
    trace = Trace()
    spans: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    for event in values["traceEvents"]:
        _take(event, trace, spans)
    assert trace.processes.keys() == {pid for pid, _ in trace.threads}
    assert trace.threads.keys() == spans.keys(), "tracks and their names"
    assert {pid for pid, _ in trace.counters} <= trace.processes.keys()
    trace.spans = {track: sorted(members, key=_outer_first) for track, members in spans.items()}
    for track, members in trace.spans.items():
        _require_nested(track, members)
    for name, samples in trace.counters.items():
        times = [time for time, _ in samples]
        assert times == sorted(times), f"{name} goes back in time"
    return trace


def _reject_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _take(
    event: dict[str, Any],
    trace: Trace,
    spans: dict[tuple[int, int], list[tuple[float, float, str]]],
) -> None:
    assert isinstance(event["name"], str), event
    assert type(event["pid"]) is int, event
    match event["ph"]:
        case "M":
            assert list(event["args"]) == ["name"], event
            name = event["args"]["name"]
            if event["name"] == "process_name":
                assert trace.processes.setdefault(event["pid"], name) is name, event
            else:
                assert event["name"] == "thread_name", event
                track = (event["pid"], event["tid"])
                assert trace.threads.setdefault(track, name) is name, event
        case "X":
            assert _is_number(event["ts"]), event
            assert event["ts"] >= 0, event
            assert _is_number(event["dur"]), event
            assert event["dur"] >= 0, event
            assert type(event["tid"]) is int, event
            end = event["ts"] + event["dur"]
            spans[event["pid"], event["tid"]].append((event["ts"], end, event["cat"]))
        case "C":
            assert _is_number(event["ts"]), event
            assert event["ts"] >= 0, event
            assert event["args"], event
            assert all(map(_is_number, event["args"].values())), event
            samples = trace.counters.setdefault((event["pid"], event["name"]), [])
            samples.append((event["ts"], event["args"]))
        case other:
            raise AssertionError(f"{other}: {event}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _outer_first(span: tuple[float, float, str]) -> tuple[float, float]:
    begin, end, _ = span
    return begin, -end


def _require_nested(track: tuple[int, int], spans: list[tuple[float, float, str]]) -> None:
    """Reject spans of one track that overlap without nesting: a viewer cuts them."""
    around: list[tuple[float, float, str]] = []
    for span in spans:
        while around and around[-1][1] <= span[0] + NANOSECOND_US:
            around.pop()
        if around:
            assert span[1] <= around[-1][1] + NANOSECOND_US, f"{track}: {span} in {around[-1]}"
        around.append(span)
