"""`python -m tests.bench.tensors`: the cost of many small tensors against one large one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from offload_adam.bench.harness import (
    Clock,
    Contender,
    interleave,
    median_ratio,
    pair_up,
    prepare_machine,
)
from offload_adam.bench.peers import OUR_SETTINGS
from offload_adam.bench.report import heading, table
from offload_adam.optimizer import OffloadAdam
from tests.bench.command import DisturbedError, run, undisturbed

PLAIN, DROP_IN, STREAMING = "plain", "drop_in", "streaming"


class WeightedSums(torch.nn.Module):
    """Flat parameters of one size; the backward of each is one multiplication."""

    def __init__(self, num_tensors: int, numel: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(numel, dtype=dtype)) for _ in range(num_tensors)
        )
        self._input = torch.full((numel,), 0.01, dtype=dtype)

    def forward(self) -> torch.Tensor:
        """Return the sum of all weighted sums."""
        return torch.stack([(weight * self._input).sum() for weight in self.weights]).sum()


def backward_and_step(name: str, model: WeightedSums, use: str, num_threads: int) -> Contender:
    """Return a backward that frees its gradients (PLAIN) or takes an optimizer step."""
    optimizer = None
    if use != PLAIN:
        optimizer = OffloadAdam(
            model.parameters(),
            **OUR_SETTINGS,
            module=model if use == STREAMING else None,
            num_threads=num_threads,
        )
    loss = torch.zeros(())

    def forward() -> None:
        nonlocal loss
        loss = model()

    def backward() -> None:
        loss.backward()
        if optimizer is None:
            model.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()

    return Contender(name, backward, prepare=forward)


def measure_tensors(
    num_tensors: int = 10_000,
    tensor_numel: int = 6_400,
    dtype: str = "bfloat16",
    num_threads: int = 1,
    num_pairs: int = 7,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Measure the time that the optimizer adds to a plain backward, drop-in and streaming.

    Raises:
        DisturbedError: the machine was disturbed at every attempt.
        HostMemoryError: the node does not have enough memory available.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    numel = num_tensors * tensor_numel
    # Six models, each with a gradient and a product; four of them have optimizer state.
    machine = prepare_machine((6 * 3 * torch_dtype.itemsize + 4 * 12) * numel, num_threads)
    shapes = {"many": (num_tensors, tensor_numel), "one": (1, numel)}
    contenders = [
        backward_and_step(f"{label} {use}", WeightedSums(*shape, torch_dtype), use, num_threads)
        for use in (PLAIN, DROP_IN, STREAMING)
        for label, shape in shapes.items()
    ]

    def attempt() -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
        timings = interleave(contenders, num_pairs, clock=clock)
        return timings, {use: overhead(timings, use) for use in (DROP_IN, STREAMING)}

    timings, uses = undisturbed(attempt)
    return {
        "benchmark": "tensors",
        "num_pairs": num_pairs,
        "dtype": dtype,
        "shapes": shapes,
        "machine": machine,
        "plain_backward_ms": {label: median(timings[f"{label} {PLAIN}"]) for label in shapes},
        "uses": uses,
    }


def overhead(timings: Mapping[str, Sequence[float]], use: str) -> dict[str, Any]:
    """Return the time that `use` adds to plain backward, with many tensors and with one.

    Raises:
        DisturbedError: in some round, the added time is not positive.
    """
    added = {}
    for label in ("many", "one"):
        rounds = zip(timings[f"{label} {use}"], timings[f"{label} {PLAIN}"], strict=True)
        added[label] = [with_step - plain for with_step, plain in rounds]
    if min(*added["many"], *added["one"]) <= 0.0:
        raise DisturbedError(
            f"A backward with a {use} step took no longer than without. Measure again on a quiet "
            "machine, or with larger tensors."
        )
    pairs = pair_up(added["one"], added["many"])
    return {
        "ratio": median_ratio(pairs),
        "many_ms": median(added["many"]),
        "one_ms": median(added["one"]),
        "pairs": pairs,
    }


def show(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report as lines of text."""
    (num_many, numel), (_, total) = report["shapes"]["many"], report["shapes"]["one"]
    sizes = f"{num_many:,} of {numel:,} {report['dtype']} against one of {total:,}"
    yield from heading(report, sizes)
    rows = [
        (use, f"{found['many_ms']:.1f}", f"{found['one_ms']:.1f}", f"{found['ratio']:.3f}")
        for use, found in report["uses"].items()
    ]
    yield from table(("", "many, ms", "one, ms", "many / one"), rows)
    yield ""
    yield "ms: backward, step() and zero_grad(), less plain backward; medians."


if __name__ == "__main__":
    run(measure_tensors, show)
