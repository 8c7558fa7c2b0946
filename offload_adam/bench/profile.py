"""`bench profile`: steps whose spans and memory are recorded against the same ones unwatched."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from offload_adam.bench.comparison import use_threads
from offload_adam.bench.interleave import Clock, Turn, interleave
from offload_adam.bench.machine import describe_machine
from offload_adam.bench.planes import require_memory
from offload_adam.bench.results import median_ratio, pair_up
from offload_adam.observe.spans import SpanRecorder, Stopwatch, recorded_by, span
from offload_adam.optimizer import OffloadAdam
from offload_adam.profiling.sampler import MemorySampler
from offload_adam.step.ledger import by_category

OFF, ON = "off", "on"
INTERVAL_MS = 100.0
"""Between two samples of memory: the default of `profile.interval_ms`."""
NUM_LAYERS = 8
NUM_STEPS = 10
"""Steps in one turn: together they take longer than two samples are apart."""
_BATCH_SIZE = 64
_NUM_NULL_SPANS = 100_000
DEFINITIONS = {
    "off_ms": "a step that nothing records; median",
    "on_ms": "the same step while spans are recorded and memory is sampled every "
    f"{INTERVAL_MS:.0f} ms; median",
    "ratio": "on_ms / off_ms, median over the pairs; 1.02 is an overhead of 2%",
    "pairs": "one for each round: milliseconds of a step, off and on",
    "spans_per_step": "what was recorded of each step, mean",
    "null_span_ns": "what a span costs that nobody records",
}


class Steps:
    """Forward, backward and step of a stack of linear layers, one bucket a layer, as a job does it.

    Owns: the sampler of memory, between `watch` and `unwatch`.
    """

    def __init__(self, width: int, num_threads: int, folder: Path) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(width, width, bias=False) for _ in range(NUM_LAYERS))
        self._model = nn.Sequential(*layers)
        self._optimizer = OffloadAdam(
            self._model.parameters(),
            lr=1e-4,
            max_grad_norm=1.0,
            module=self._model,
            num_threads=num_threads,
            bucket_nbytes=4 * width * width,
        )
        self._input = torch.randn(_BATCH_SIZE, width)
        self._path = folder / "memory.jsonl"
        self._watching = ExitStack()
        self._is_watched = False
        self.recorder = SpanRecorder()

    def watch(self) -> None:
        """Record from now on; the first sample, which is slow, is not for the step to pay."""
        if not self._is_watched:
            sampler = MemorySampler(self._path, self._ledger, interval_s=INTERVAL_MS / 1e3)
            self._watching.enter_context(sampler)
            self._watching.enter_context(recorded_by(self.recorder))
            time.sleep(1.5 * INTERVAL_MS / 1e3)
            self._is_watched = True

    def unwatch(self) -> None:
        """Record no longer."""
        self._watching.close()
        self._is_watched = False

    def run(self) -> None:
        """Do `NUM_STEPS` steps."""
        for number in range(NUM_STEPS):
            with span("train step", number):
                self._step()

    def _step(self) -> None:
        watch = Stopwatch()
        with watch.span("forward"):
            loss = self._model(self._input).square().mean()
        with watch.span("backward"):
            loss.backward()
        with watch.span("step"):
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _ledger(self) -> Mapping[str, int]:
        return by_category(self._optimizer.memory_ledger())


def measure_profile(
    width: int, num_threads: int, num_pairs: int, *, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Return the report of `bench profile`, a JSON object.

    Args:
        width: of `NUM_LAYERS` square layers.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    require_memory(20 * NUM_LAYERS * width**2)
    use_threads(num_threads)
    machine = describe_machine(num_threads)
    with _steps(width, num_threads) as steps:
        turns = [Turn(OFF, steps.run, steps.unwatch), Turn(ON, steps.run, steps.watch)]
        timings = interleave(turns, num_pairs, clock=clock)
        num_spans = len(steps.recorder.spans()) + steps.recorder.num_dropped
        steps.unwatch()
    num_recorded = num_spans / sum(s.name == "train step" for s in steps.recorder.spans())
    return {
        "benchmark": "profile",
        "num_pairs": num_pairs,
        "numel": NUM_LAYERS * width**2,
        "machine": machine,
        **compare_steps(timings),
        "spans_per_step": num_recorded,
        "null_span_ns": _null_span_ns(),
        "definitions": DEFINITIONS,
    }


def compare_steps(timings: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return medians and pairs of one step's milliseconds, from those of the turns."""
    each = {name: [ms / NUM_STEPS for ms in turns_ms] for name, turns_ms in timings.items()}
    pairs = pair_up(each[OFF], each[ON])
    return {
        "off_ms": median(each[OFF]),
        "on_ms": median(each[ON]),
        "ratio": median_ratio(pairs),
        "pairs": [asdict(pair) for pair in pairs],
    }


@contextmanager
def _steps(width: int, num_threads: int) -> Iterator[Steps]:
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as folder:
        steps = Steps(width, num_threads, Path(folder))
        try:
            yield steps
        finally:
            steps.unwatch()


def _null_span_ns() -> float:
    start_ns = time.perf_counter_ns()
    for _ in range(_NUM_NULL_SPANS):
        with span("nobody"):
            pass
    return (time.perf_counter_ns() - start_ns) / _NUM_NULL_SPANS
