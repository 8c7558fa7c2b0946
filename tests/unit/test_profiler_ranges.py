"""The phases of a step are ranges in a torch.profiler that the user runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

import offload_adam
from offload_adam import OffloadAdam, OffloadPolicy, spans
from offload_adam.spans import RANGES, SpanRecorder, Stopwatch, recorded_by, span

PACKAGE = Path(offload_adam.__file__).parent
WIDTH = 16


class Range(NamedTuple):
    """A range of ours, without the prefix of its name."""

    thread: int
    name: str
    start_us: float
    end_us: float


def ranges_of(work: Callable[[], object], *, all_threads: bool) -> list[Range]:
    """Return our ranges, sorted by start."""
    config = _ExperimentalConfig(profile_all_threads=all_threads)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as trace:
        work()
    events = sorted(trace.events() or [], key=lambda event: event.time_range.start)
    prefix = "OffloadAdam::"
    return [
        Range(e.thread, e.name[len(prefix) :], e.time_range.start, e.time_range.end)
        for e in events
        if e.name.startswith(prefix)
    ]


def profiled(work: Callable[[], object], *, all_threads: bool) -> list[tuple[int, str]]:
    """Return the thread and name of each of our ranges, sorted by start."""
    return [(found.thread, found.name) for found in ranges_of(work, all_threads=all_threads)]


class Training:
    """Two layers, each in a bucket of its own."""

    def __init__(self, *, overlap: bool, compiled: bool = False) -> None:
        layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)]
        self.model = torch.nn.Sequential(*layers)
        if compiled:
            for layer in layers:
                layer.compile(backend="eager")
        self.optimizer = OffloadAdam(
            self.model.parameters(),
            module=self.model,
            max_grad_norm=1.0,
            overlap=overlap,
            num_threads=1,
            offload=OffloadPolicy(bucket_nbytes=4 * WIDTH * WIDTH),
        )
        self.step()  # the first step traces the model, compiles kernels and starts the thread

    def step(self) -> None:
        self.model(torch.ones(2, WIDTH)).square().mean().backward()
        self.optimizer.step()

    def forward(self) -> None:
        self.model(torch.ones(2, WIDTH))


@pytest.fixture
def make_training() -> Iterator[Callable[..., Training]]:
    """Makes trainings whose update threads end with the test."""
    with ExitStack() as made:

        def make(**options: bool) -> Training:
            training = Training(**options)
            made.callback(training.optimizer.close)
            return training

        yield make


def test_a_step_without_overlap_shows_its_phases_in_order(
    make_training: Callable[..., Training],
) -> None:
    training = make_training(overlap=False)
    found = profiled(training.step, all_threads=False)
    assert [name for _, name in found] == [
        *["wait_previous", "reduce", "edits", "norm", "agree", "edits"],
        *["update", "update"],
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_update_thread_shows_if_all_threads_are_profiled(
    make_training: Callable[..., Training], compiled: bool
) -> None:
    training = make_training(overlap=True, compiled=compiled)

    def work() -> None:
        training.step()
        training.forward()

    ordinary = {name for _, name in profiled(work, all_threads=False)}
    assert {"wait_previous", "reduce", "edits", "norm", "agree", "wait_update"} == ordinary
    found = profiled(work, all_threads=True)
    (training_thread,) = {thread for thread, name in found if name == "agree"}
    (update_thread,) = {thread for thread, name in found if name == "update"}
    assert training_thread != update_thread
    assert {name for thread, name in found if thread == update_thread} == {"norm", "update"}
    assert {name for thread, name in found if thread == training_thread} == ordinary


def test_a_range_and_a_recorded_span_enclose_the_same_body() -> None:
    recorder, stopwatch = SpanRecorder(), Stopwatch()

    def work() -> None:
        with recorded_by(recorder), stopwatch.span("update", 3), span("gather", 3):
            pass
        with recorded_by(recorder), pytest.raises(ValueError, match="x"), span("norm"):
            raise ValueError("x")

    update, gather, norm = ranges_of(work, all_threads=False)
    assert (update.name, gather.name, norm.name) == ("update", "all_gather", "norm")
    assert update.start_us <= gather.start_us <= gather.end_us <= update.end_us <= norm.start_us
    assert [found.name for found in recorder.spans()] == ["update", "gather", "norm"]
    assert list(stopwatch.elapsed_s) == ["update"]


def test_no_range_is_made_unless_a_profiler_runs(
    make_training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} costs time although nobody profiles")

    monkeypatch.setattr(spans, "record_function", fail)
    training = make_training(overlap=True)
    with recorded_by(SpanRecorder()):
        training.step()


def test_a_span_of_another_name_makes_no_range() -> None:
    def work() -> None:
        with span("data"), span("norm"):
            pass

    assert [name for _, name in profiled(work, all_threads=False)] == ["norm"]


def phases_in(paths: Sequence[Path]) -> set[str]:
    """Return the names that the code of these files gives to `span`, as literals."""
    calls: list[Any] = [
        node
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and "span" in (getattr(node.func, "id", None), getattr(node.func, "attr", None))
    ]
    nodes = [node for call in calls for node in ast.walk(call.args[0])]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return {value for value in values if isinstance(value, str)}


def test_the_list_of_phases_is_complete() -> None:
    marked = phases_in([*PACKAGE.glob("step/*.py"), *PACKAGE.glob("gradients/*.py")])
    assert marked == RANGES.keys()
