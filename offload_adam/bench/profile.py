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
from offload_adam.optimizer import OffloadAdam
from offload_adam.options import OffloadPolicy
from offload_adam.profiling.sampler import MemorySampler
from offload_adam.spans import SpanRecorder, Stopwatch, recorded_by, span
from offload_adam.step.ledger import by_category

OFF, ON = "off", "on"
INTERVAL_MS = 100.0
"""Between two samples of memory: the default of `profile.interval_ms`."""
NUM_LAYERS = 8
_BATCH_SIZE = 64
_NUM_NULL_SPANS = 100_000
DEFINITIONS = {
    "off_ms": "processor time of a step on one thread that nothing records, disturbed less by "
    "what else runs than its length would be; median",
    "on_ms": "the same step while its spans are recorded; median",
    "ratio": "on_ms / off_ms, median over the pairs",
    "pairs": "one for each round: milliseconds of a step, off and on",
    "sampler_share": "processor time, for each second, of the thread that samples memory every "
    f"{INTERVAL_MS:.0f} ms: at most this part of a step can be lost to it",
    "overhead": "ratio - 1 + sampler_share; 0.02 is 2%",
    "spans_per_step": "what was recorded of each step, mean",
    "null_span_ns": "what a span costs that nobody records",
}


class Steps:
    """Forward, backward and step of a stack of linear layers, one bucket a layer, as a job does it.

    Owns: what records while it is `watched`.
    """

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
        self._watching = ExitStack()
        self.recorder = SpanRecorder()

    def watch(self) -> None:
        """Record from now on."""
        self._watching.close()
        self._watching.enter_context(recorded_by(self.recorder))

    def unwatch(self) -> None:
        """Record no longer."""
        self._watching.close()

    def run(self) -> None:
        """Do one step."""
        with span("train step"):
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

    def ledger(self) -> Mapping[str, int]:
        """Return what the optimizer holds."""
        return by_category(self._optimizer.memory_ledger())


def measure_profile(
    width: int, num_pairs: int, *, clock: Clock = time.thread_time
) -> dict[str, Any]:
    """Return the report of `bench profile`, a JSON object.

    Args:
        width: of `NUM_LAYERS` square layers.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    require_memory(20 * NUM_LAYERS * width**2)
    use_threads(1)
    machine = describe_machine(1)
    steps = Steps(width)
    turns = [Turn(OFF, steps.run, steps.unwatch), Turn(ON, steps.run, steps.watch)]
    with _sampled(steps) as sampler:
        start_s = time.perf_counter()
        timings = interleave(turns, num_pairs, clock=clock)
        sampler_share = sampler.busy_s / (time.perf_counter() - start_s)
    steps.unwatch()
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
        "definitions": DEFINITIONS,
    }


def compare_steps(timings: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return medians and pairs of the steps' milliseconds."""
    pairs = pair_up(timings[OFF], timings[ON])
    return {
        "off_ms": median(timings[OFF]),
        "on_ms": median(timings[ON]),
        "ratio": median_ratio(pairs),
        "pairs": [asdict(pair) for pair in pairs],
    }


@contextmanager
def _sampled(steps: Steps) -> Iterator[MemorySampler]:
    """Sample memory inside, beside steps of both kinds."""
    with tempfile.TemporaryDirectory(prefix="bench-profile-") as folder:
        path = Path(folder) / "memory.jsonl"
        with MemorySampler(path, steps.ledger, interval_s=INTERVAL_MS / 1e3) as sampler:
            yield sampler


def _null_span_ns() -> float:
    start_ns = time.perf_counter_ns()
    for _ in range(_NUM_NULL_SPANS):
        with span("nobody"):
            pass
    return (time.perf_counter_ns() - start_ns) / _NUM_NULL_SPANS
