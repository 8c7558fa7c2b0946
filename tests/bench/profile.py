"""`python -m tests.bench.profile`: steps with recorded spans and memory against steps without."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from offload_adam.bench.harness import (
    Clock,
    Contender,
    interleave,
    median_ratio,
    pair_up,
    prepare_machine,
)
from offload_adam.bench.report import heading, table
from offload_adam.optimizer import OffloadAdam
from offload_adam.options import OffloadPolicy
from offload_adam.profiling.sampler import MemorySampler
from offload_adam.spans import SpanRecorder, Stopwatch, recorded_by, span
from offload_adam.step.ledger import by_category
from tests.bench.command import run

OFF, ON = "off", "on"
INTERVAL_MS = 100.0
"""Interval of memory samples, the default of `profile.interval_ms`."""
NUM_LAYERS = 8
_BATCH_SIZE = 64
_NUM_NULL_SPANS = 100_000


class Steps:
    """Training steps of a stack of linear layers with one bucket a layer, and their recorder."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(width, width, bias=False) for _ in range(NUM_LAYERS))
        self._model = nn.Sequential(*layers)
        self._optimizer = OffloadAdam(
            self._model.parameters(),
            lr=1e-4,
            max_grad_norm=1.0,
            module=self._model,
            num_threads=1,
            offload=OffloadPolicy(bucket_nbytes=4 * width * width),
        )
        self._input = torch.randn(_BATCH_SIZE, width)
        self._recording = ExitStack()
        self.recorder = SpanRecorder()

    def stop_recording(self) -> None:
        """Run the next steps unrecorded."""
        self._recording.close()

    def start_recording(self) -> None:
        """Record the next steps."""
        self._recording.close()
        self._recording.enter_context(recorded_by(self.recorder))

    def run(self) -> None:
        """Run one step with the spans of a training job."""
        watch = Stopwatch()
        with span("train step"):
            with watch.span("forward"):
                loss = self._model(self._input).square().mean()
            with watch.span("backward"):
                loss.backward()
            with watch.span("step"):
                self._optimizer.step()
                self._optimizer.zero_grad()

    def ledger(self) -> Mapping[str, int]:
        """Return the optimizer's bytes by category."""
        return by_category(self._optimizer.memory_ledger())


def measure_profile(
    width: int = 512, num_pairs: int = 301, *, clock: Clock = time.thread_time
) -> dict[str, Any]:
    """Measure the processor time of steps on one thread, which other processes disturb little.

    Returns:
        sampler_share: processor time of the sampling thread for each second, which is at most the
            part of a step that sampling costs.
        overhead: ratio - 1 + sampler_share; 0.02 is 2%.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    machine = prepare_machine(20 * NUM_LAYERS * width**2, 1)
    steps = Steps(width)
    contenders = [
        Contender(OFF, steps.run, prepare=steps.stop_recording),
        Contender(ON, steps.run, prepare=steps.start_recording),
    ]
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as folder:
        path = Path(folder) / "memory.jsonl"
        with MemorySampler(path, steps.ledger, interval_s=INTERVAL_MS / 1e3) as sampler:
            start_s = time.perf_counter()
            timings = interleave(contenders, num_pairs, clock=clock)
            sampler_share = sampler.busy_s / (time.perf_counter() - start_s)
    steps.stop_recording()
    spans = steps.recorder.spans()
    found = compare_steps(timings)
    return {
        "benchmark": "profile",
        "num_pairs": num_pairs,
        "numel": NUM_LAYERS * width**2,
        "machine": machine,
        **found,
        "sampler_share": sampler_share,
        "overhead": found["ratio"] - 1.0 + sampler_share,
        "spans_per_step": len(spans) / sum(one.name == "train step" for one in spans),
        "null_span_ns": _null_span_ns(),
    }


def compare_steps(timings: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return medians and pairs of the steps' milliseconds."""
    pairs = pair_up(timings[OFF], timings[ON])
    return {
        "off_ms": median(timings[OFF]),
        "on_ms": median(timings[ON]),
        "ratio": median_ratio(pairs),
        "pairs": pairs,
    }


def _null_span_ns() -> float:
    """Return the nanoseconds of a span that nothing records."""
    start_ns = time.perf_counter_ns()
    for _ in range(_NUM_NULL_SPANS):
        with span("off"):
            pass
    return (time.perf_counter_ns() - start_ns) / _NUM_NULL_SPANS


def show(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as lines of text."""
    yield from heading(report, f"steps of {report['numel']:,} parameters")
    cells = {
        "off, ms": f"{report['off_ms']:.2f}",
        "on, ms": f"{report['on_ms']:.2f}",
        "on / off": f"{report['ratio']:.4f}",
        "sampling": f"{report['sampler_share']:.2%}",
        "overhead": f"{report['overhead']:.2%}",
        "spans a step": f"{report['spans_per_step']:.1f}",
        "span while off, ns": f"{report['null_span_ns']:.0f}",
    }
    yield from table(list(cells), [list(cells.values())])
    yield ""


if __name__ == "__main__":
    run(measure_profile, show)
