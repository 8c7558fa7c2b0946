"""Updates and copies overlap with the model: intersections of intervals from torch's profiler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from offload_adam import OffloadAdam
from offload_adam.bench.training.model import Sizes, make_model, make_tokens
from offload_adam.spans import SpanRecorder, recorded_by
from tests.gpu.batches import NoBatchError, measure_and_choose
from tests.gpu.intervals import Interval, shared, total, within

SIZES = Sizes(num_layers=6, width=1024, num_heads=8, sequence_length=512)
NUM_STEPS = 4
LEAST_SHARE = 0.5
MOST_GAP_US = 150.0
"""Most microseconds between two updates: 90 to 105 were measured on a CPU, see tests.bench.gaps."""
MARK = "spin_kernel"
"""The kernel of torch.cuda._sleep."""


@dataclass(frozen=True)
class Timeline:
    """Intervals in microseconds of the profiler's clock.

    forwards, backwards: kernels of the model.
    down, up: D2H and H2D copies.
    updates: spans of the update thread.
    """

    forwards: list[Interval]
    backwards: list[Interval]
    down: list[Interval]
    up: list[Interval]
    updates: list[Interval]


@pytest.fixture(scope="module")
def batch() -> int:
    """Return a batch whose forward is long enough to hide the update."""
    try:
        return measure_and_choose(SIZES, torch.device("cuda"))
    except NoBatchError as error:
        pytest.skip(str(error))


def record(batch: int, overlap: bool) -> Timeline:
    """Profile some steps at a batch."""
    device = torch.device("cuda")
    model = make_model(SIZES, device)
    optimizer = OffloadAdam(model.parameters(), module=model, overlap=overlap)
    tokens = make_tokens(SIZES, batch, device)

    def step() -> None:
        set_mark()
        loss = model(tokens)
        set_mark()
        loss.backward()
        set_mark()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    optimizer.synchronize()
    torch.cuda.synchronize()
    recorder = SpanRecorder()
    with (
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
        recorded_by(recorder),
    ):
        with record_function("clock"):
            clock_us = time.perf_counter_ns() / 1e3
        for _ in range(NUM_STEPS):
            step()
        optimizer.synchronize()
        torch.cuda.synchronize()
    return timeline(list(profiler.events()), recorder, clock_us)


def set_mark() -> None:
    """Launch a kernel that nothing else launches, to separate forward, backward and the rest.

    The profiler's annotations cannot do this: autograd launches backward from another thread.
    """
    torch.cuda._sleep(1)


def timeline(events: list[Any], recorder: SpanRecorder, clock_us: float) -> Timeline:
    """Sort the profiler's events and the optimizer's spans. Each step has three marks."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]

    def named(text: str) -> list[Interval]:
        return [_interval(e) for e in on_device if text in e.name]

    marks = sorted(named(MARK))
    assert len(marks) % 3 == 0
    forwards, backwards = (
        [Interval(marks[n].end, marks[n + 1].start) for n in range(first, len(marks) - 1, 3)]
        for first in (0, 1)
    )
    others = (MARK, "Memcpy", "Memset", "clock")
    kernels = [_interval(e) for e in on_device if not any(word in e.name for word in others)]
    shift = next(e.time_range.start for e in events if e.name == "clock") - clock_us
    spans = [s for s in recorder.spans() if s.name == "update"]
    return Timeline(
        forwards=within(kernels, forwards),
        backwards=within(kernels, backwards),
        down=named("Memcpy DtoH"),
        up=named("Memcpy HtoD"),
        updates=[Interval(s.start_ns / 1e3 + shift, s.end_ns / 1e3 + shift) for s in spans],
    )


def _interval(event: Any) -> Interval:
    return Interval(event.time_range.start, event.time_range.end)


def test_updates_and_copies_overlap_with_forward_and_backward(batch: int) -> None:
    found = record(batch, overlap=True)
    assert found.forwards
    assert found.backwards
    # The update of the last step is not hidden: no forward follows.
    hideable = min(total(found.updates), total(found.forwards)) * (NUM_STEPS - 1) / NUM_STEPS
    assert shared(found.updates, found.forwards) >= LEAST_SHARE * hideable
    up = total(found.up) * (NUM_STEPS - 1) / NUM_STEPS
    hideable = min(up, total(found.forwards))
    assert shared(found.up, found.forwards) >= LEAST_SHARE * hideable
    assert shared(found.down, found.backwards) >= LEAST_SHARE * total(found.down)


def test_without_overlap_no_update_runs_during_a_forward(batch: int) -> None:
    found = record(batch, overlap=False)
    assert shared(found.updates, found.forwards) <= 0.02 * total(found.updates)


def test_one_update_follows_another_at_once(batch: int) -> None:
    """The time between two updates of one step; that between two steps is longer by far."""
    found = record(batch, overlap=True)
    starts = sorted(found.updates, key=lambda update: update.start)
    gaps = [after.start - before.end for before, after in pairwise(starts)]
    within_steps = sorted(gaps)[: len(gaps) - NUM_STEPS + 1]
    assert median(within_steps) <= MOST_GAP_US
