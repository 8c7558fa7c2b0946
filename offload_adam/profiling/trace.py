"""Spans and memory as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offload_adam.profiling.profile import RankProfile, label_of


def write_trace(profiles: Sequence[RankProfile], path: Path) -> None:
    """Write one track a thread and rank, and one counter a rank.

    Times are microseconds since the first span or sample of any rank, on rank 0's clock.

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
    yield _named("process_name", pid, 0, f"rank {profile.rank} on {profile.host}")
    threads = {name: tid for tid, name in enumerate(dict.fromkeys(s.thread for s in profile.spans))}
    for name, tid in threads.items():
        yield _named("thread_name", pid, tid, name)
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


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
