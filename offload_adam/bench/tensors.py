"""`bench tensors`: what many small tensors cost beside one large one, on top of plain backward."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from offload_adam.bench.comparison import NUM_ATTEMPTS, use_threads
from offload_adam.bench.contender import ADAMW, MAX_GRAD_NORM
from offload_adam.bench.interleave import Clock, Turn, interleave
from offload_adam.bench.machine import describe_machine
from offload_adam.bench.planes import require_memory
from offload_adam.optimizer import OffloadAdam

logger = logging.getLogger(__name__)

PLAIN, DROP_IN, STREAMING = "plain", "drop_in", "streaming"
DEFINITIONS = {
    "ms": "backward, step() and zero_grad(), less a plain backward whose gradients are freed",
    "ratio": "the many tensors' time / that of the one, median over the pairs",
    "pairs": "one for each round, in milliseconds",
}


class MeasurementError(RuntimeError):
    """A plain backward took longer than one with a step: the machine was disturbed."""


class WeightedSums(torch.nn.Module):
    """A model of equal flat parameters whose backward is one multiplication for each."""

    def __init__(self, num_tensors: int, numel: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(numel, dtype=dtype)) for _ in range(num_tensors)
        )
        self._input = torch.full((numel,), 0.01, dtype=dtype)

    def forward(self) -> torch.Tensor:
        """Return the sum of all weighted sums."""
        return torch.stack([(weight * self._input).sum() for weight in self.weights]).sum()


class Backward:
    """Runs a model's backward, then what `finish` does with the gradients."""

    def __init__(self, model: torch.nn.Module, finish: Callable[[], None]) -> None:
        self._model = model
        self._finish = finish
        self._loss = torch.zeros(())

    def prepare(self) -> None:
        """Run the forward, which is not timed."""
        self._loss = self._model()

    def run(self) -> None:
        """Run backward, and step or free."""
        self._loss.backward()
        self._finish()


@dataclass(frozen=True)
class Shape:
    """How the elements are cut into parameters."""

    num_tensors: int
    numel: int


@dataclass(frozen=True)
class OverheadPair:
    """One round: what the optimizer added to backward, in milliseconds."""

    many_ms: float
    one_ms: float
    ratio: float


@dataclass(frozen=True)
class Overhead:
    """What one way of use costs for many tensors and for one of as many elements."""

    ratio: float
    many_ms: float
    one_ms: float
    pairs: tuple[OverheadPair, ...]


def measure_tensors(
    num_tensors: int,
    tensor_numel: int,
    dtype: torch.dtype,
    num_threads: int,
    num_pairs: int,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Return the report of `bench tensors`, a JSON object.

    Raises:
        MeasurementError: the machine was disturbed at every attempt.
        HostMemoryError: the node does not have enough memory available.
    """
    # Six models with a gradient and a product each; four of them with optimizer state.
    numel = num_tensors * tensor_numel
    require_memory((6 * 3 * dtype.itemsize + 4 * 12) * numel)
    use_threads(num_threads)
    machine = describe_machine(num_threads)
    shapes = {
        "many": Shape(num_tensors, tensor_numel),
        "one": Shape(1, numel),
    }
    turns = [
        _turn(f"{label} {use}", shape, use, dtype, num_threads)
        for use in (PLAIN, DROP_IN, STREAMING)
        for label, shape in shapes.items()
    ]
    timings, uses = _measure(turns, num_pairs, clock)
    return {
        "benchmark": "tensors",
        "num_pairs": num_pairs,
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": {label: asdict(shape) for label, shape in shapes.items()},
        "machine": machine,
        "plain_backward_ms": {label: median(timings[f"{label} {PLAIN}"]) for label in shapes},
        "uses": {use: asdict(found) for use, found in uses.items()},
        "definitions": DEFINITIONS,
    }


def _measure(
    turns: Sequence[Turn], num_pairs: int, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, Overhead]]:
    """Return the timings and what they say, of the first attempt that says anything."""
    for attempt in range(1, NUM_ATTEMPTS + 1):
        timings = interleave(turns, num_pairs, clock=clock)
        try:
            return timings, {use: overhead(timings, use) for use in (DROP_IN, STREAMING)}
        except MeasurementError as error:
            logger.warning("attempt %d of %d: %s", attempt, NUM_ATTEMPTS, error)
            if attempt == NUM_ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def overhead(timings: Mapping[str, Sequence[float]], use: str) -> Overhead:
    """Return what `use` adds to plain backward, in pairs of the two shapes.

    Raises:
        MeasurementError: it seems to add nothing.
    """
    added = {
        label: [
            with_step - plain
            for with_step, plain in zip(
                timings[f"{label} {use}"], timings[f"{label} {PLAIN}"], strict=True
            )
        ]
        for label in ("many", "one")
    }
    if min(*added["many"], *added["one"]) <= 0.0:
        raise MeasurementError(
            f"a backward with the {use} step took no longer than without: the machine was "
            "disturbed, or the tensors are too small; measure again"
        )
    rounds = zip(added["many"], added["one"], strict=True)
    pairs = tuple(OverheadPair(many, one, many / one) for many, one in rounds)
    ratio = median(pair.ratio for pair in pairs)
    return Overhead(ratio, median(added["many"]), median(added["one"]), pairs)


def _turn(name: str, shape: Shape, use: str, dtype: torch.dtype, num_threads: int) -> Turn:
    """Return one way of use on a model of its own."""
    model = WeightedSums(shape.num_tensors, shape.numel, dtype)
    if use == PLAIN:
        backward = Backward(model, lambda: model.zero_grad(set_to_none=True))
    else:
        backward = Backward(model, _finish_with_step(model, use, num_threads))
    return Turn(name, backward.run, backward.prepare)


def _finish_with_step(model: torch.nn.Module, use: str, num_threads: int) -> Callable[[], None]:
    optimizer = OffloadAdam(
        model.parameters(),
        lr=ADAMW.lr,
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
        decoupled_weight_decay=True,
        max_grad_norm=MAX_GRAD_NORM,
        module=model if use == STREAMING else None,
        num_threads=num_threads,
    )

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return finish
