"""Spans are kept with their thread and bucket, within fixed memory."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest

from offload_adam.profiling.profile import self_times_ns
from offload_adam.spans import (
    Span,
    SpanRecorder,
    Stopwatch,
    recorded_by,
    span,
)
from tests.unit.profiling.synthetic import MS, profile


def test_spans_of_all_threads_are_kept_in_order() -> None:
    recorder = SpanRecorder()

    def work() -> None:
        with span("update", 3):
            time.sleep(0.01)

    with recorded_by(recorder):
        thread = threading.Thread(target=work, name="worker")
        with span("step"):
            thread.start()
            thread.join()
    with span("nobody listens"):
        pass
    outer, inner = recorder.spans()
    assert (outer.name, outer.bucket, outer.thread) == ("step", -1, "MainThread")
    assert (inner.name, inner.bucket, inner.thread) == ("update", 3, "worker")
    assert outer.start_ns <= inner.start_ns < inner.end_ns <= outer.end_ns
    assert inner.end_ns - inner.start_ns >= 9 * MS


def test_a_span_that_raises_is_kept() -> None:
    recorder = SpanRecorder()
    with recorded_by(recorder), pytest.raises(ValueError, match="x"), span("fails"):
        raise ValueError("x")
    assert [found.name for found in recorder.spans()] == ["fails"]
    with span("after"):
        pass
    assert len(recorder.spans()) == 1


def test_a_full_recorder_keeps_the_latest_and_counts_the_rest() -> None:
    recorder = SpanRecorder(capacity=4)
    for number in range(7):
        recorder.add("x", number, number, number + 1)
    assert [found.bucket for found in recorder.spans()] == [3, 4, 5, 6]
    assert recorder.num_dropped == 3


def test_a_stopwatch_sums_and_its_stretches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0
    monkeypatch.setattr(time, "perf_counter", lambda: float(now_s))
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_s * 10**9)
    recorder, watch = SpanRecorder(), Stopwatch()
    with recorded_by(recorder):
        for bucket in range(3):
            with watch.span("update", bucket):
                now_s += 2 + bucket
            now_s += 100
    spans = recorder.spans()
    assert [found.bucket for found in spans] == [0, 1, 2]
    assert [found.end_ns - found.start_ns for found in spans] == [2 * 10**9, 3 * 10**9, 4 * 10**9]
    assert watch.elapsed_s == {"update": 9.0}


def test_recording_allocates_nothing_that_stays_and_silence_nothing_at_all() -> None:
    recorder = SpanRecorder(capacity=100)
    with recorded_by(recorder), span("warm"):
        pass
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        with recorded_by(recorder):
            for _ in range(1000):
                with span("warm"):
                    pass
        for _ in range(1000):
            with span("off"):
                pass
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    grown = sum(
        entry.size_diff
        for entry in after.compare_to(before, "filename")
        if entry.traceback[0].filename.endswith("spans.py")
    )
    assert grown < 1024
    assert span("a") is span("b", 1)


def test_time_within_another_span_is_counted_once() -> None:
    spans = profile().spans
    own: dict[str, int] = {}
    for found, own_ns in self_times_ns(spans):
        own[found.name] = own.get(found.name, 0) + own_ns
    times = {name: value / MS / 5 for name, value in own.items()}
    assert times == {
        "data": 1,
        "forward": 8,
        "backward": 11,
        "reduce": 3,
        "update": 9,
        "gather": 2,
        "train step": 0,
    }


def test_threads_do_not_lie_within_each_other() -> None:
    spans = [Span("a", -1, "one", 0, 10), Span("b", -1, "two", 2, 8), Span("c", -1, "one", 3, 5)]
    assert [own_ns for _, own_ns in self_times_ns(spans)] == [8, 6, 2]
