"""Run `bench train`: choose the batches and measure every contender."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload_adam.bench.machine import describe_machine
from offload_adam.bench.training.batches import TARGET_RATIOS, choose_batches, is_near
from offload_adam.bench.training.contenders import CONTENDERS, MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import OUT_OF_MEMORY, Measured, Task, in_own_process
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.results import Results
from offload_adam.doctor.bandwidth import bus_gb_per_s
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores, select_threading_layer

logger = logging.getLogger(__name__)

NUM_STEPS = 5
FIRST_BATCHES = (4, 16)
"""The choice of batches starts from the times at these numbers of sequences."""
NUM_ROUNDS = 3
"""Rounds in which batches are chosen, each from the times of all rounds before."""
PROCESS_TIMEOUT_S = 900.0
LEAST_S = 15.0
"""With less time left, a contender is skipped: starting its process takes seconds."""
SHARES = 2
"""A contender may take this many times its equal share of the time that is left."""


class TrainBenchmarkError(RuntimeError):
    """The measurement that the choice of batches needs has failed."""


class ModelTooLargeError(RuntimeError):
    """The model does not fit into the GPU with the batches from which others are chosen."""


def measure_train(
    sizes: Sizes,
    device: str,
    *,
    num_steps: int = NUM_STEPS,
    batches: Sequence[int] = (),
    largest_batch: int | None = None,
    contenders: Sequence[str] = tuple(CONTENDERS),
    time_limit_s: float | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
    run: Callable[[Task], Measured] = in_own_process,
) -> dict[str, Any]:
    """Return the report of `bench train`, a JSON object.

    The model alone is measured first, then each contender. If a contender fails or is not
    installed, its row has the reason.

    Args:
        device: "cuda" or "cpu". On a CPU only this package and torch can be measured.
        batches: numbers of sequences; if empty, they are chosen by the ratio of forward to update.
        largest_batch: most sequences to choose, None for no limit.
        contenders: names of CONTENDERS, in the order in which they are measured.
        time_limit_s: seconds for everything, None for no limit.
        keep: called after each contender with the report so far.
        run: carries out a task.

    Raises:
        TrainBenchmarkError: `batches` is empty, and the measurement to choose them failed.
        ModelTooLargeError: `batches` is empty, and the model is too large to choose them.
    """
    end_s = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
    select_threading_layer()
    results = Results(
        sizes=sizes,
        device=device,
        num_steps=num_steps,
        bus_down_gb_per_s=_bus_down_gb_per_s(device),
        machine=describe_machine(allowed_cores()),
    )

    def measure(name: str, chosen: Sequence[int], num_left: int = 1) -> Measured:
        """Measure a contender, one of `num_left` that are not measured yet."""
        left_s = end_s - time.monotonic()
        limit_s = min(PROCESS_TIMEOUT_S, left_s, SHARES * left_s / num_left)
        if limit_s < LEAST_S:
            return Measured(reasons=dict.fromkeys(chosen, "no time was left"))
        logger.info("Measuring %s at %s sequences", name, ", ".join(map(str, chosen)))
        return run(
            Task(
                contender=name,
                sizes=sizes,
                device=device,
                batches=tuple(chosen),
                num_steps=num_steps,
                time_limit_s=limit_s,
            )
        )

    names = list(dict.fromkeys(contenders))
    if batches:
        results.batches = [(None, batch) for batch in sorted(set(batches))]
        names.insert(0, MODEL_ALONE)
    else:
        _choose_batches(results, measure, largest_batch)
        keep(results.report())
    for number, name in enumerate(names):
        start_s = time.monotonic()
        chosen = sorted({batch for _, batch in results.batches})
        found = results.measured[name] = measure(name, chosen, len(names) - number)
        results.wall_s[name] = round(time.monotonic() - start_s, 1)
        reasons = [f"{reason} at {batch} sequences" for batch, reason in found.reasons.items()]
        problems = [found.unavailable] if found.unavailable else reasons
        outcome = f"; {', '.join(problems)}" if problems else ""
        logger.info("Finished %s in %.1f s%s", name, results.wall_s[name], outcome)
        keep(results.report())
    return results.report()


def _choose_batches(
    results: Results, measure: Callable[[str, Sequence[int]], Measured], largest: int | None
) -> None:
    """Choose batches and measure the model alone at them, until the ratios are near the targets."""

    def required(name: str, batches: Sequence[int], least: int = 1) -> Measured:
        """Measure batches, of which `least` must have times unless they do not fit."""
        found = measure(name, batches)
        reasons = [found.unavailable] if found.unavailable else found.reasons.values()
        failures = [reason for reason in reasons if reason != OUT_OF_MEMORY]
        if failures and len(found.steps) < least:
            raise TrainBenchmarkError(f"{name} failed, so no batches were chosen: {failures[0]}")
        return found

    results.sequential = required(SEQUENTIAL, FIRST_BATCHES[:1])
    alone = dict(required(MODEL_ALONE, FIRST_BATCHES, least=2).steps)
    if not results.sequential.steps or len(alone) < 2:
        first = " and ".join(map(str, FIRST_BATCHES))
        raise ModelTooLargeError(
            f"The GPU has too little memory for {first} sequences, from whose times the batches "
            "are chosen. Make the model smaller, or give --batches."
        )
    update_ms = results.sequential.steps[FIRST_BATCHES[0]].updates_only_ms or 0.0
    chosen: dict[float, int] = {}
    for _ in range(NUM_ROUNDS):
        forward_ms = {batch: one.forward_ms or 0.0 for batch, one in alone.items()}
        chosen = choose_batches(forward_ms, update_ms, largest=largest)
        unknown = sorted(set(chosen.values()) - set(alone))
        alone.update(required(MODEL_ALONE, unknown).steps if unknown else {})
        too_large = [batch for batch in unknown if batch not in alone]
        if too_large:
            largest = too_large[0] - 1
        elif all(
            is_near((alone[batch].forward_ms or 0.0) / update_ms, target)
            for target, batch in chosen.items()
        ):
            break
    results.measured[MODEL_ALONE] = Measured(steps=alone)
    # Several targets may share a batch, such as 1 for a small model: keep the one nearest to its
    # ratio.
    targets: dict[int, float] = {}
    for target, batch in chosen.items():
        if batch in alone:
            ratio = (alone[batch].forward_ms or 0.0) / update_ms
            sharing = (targets.get(batch, target), target)
            targets[batch] = min(sharing, key=lambda each: abs(each - ratio))
    results.batches = sorted((target, batch) for batch, target in targets.items())
    tried = [target for target, _ in results.batches]
    results.not_tried = [target for target in TARGET_RATIOS if target not in tried]


def _bus_down_gb_per_s(device: str) -> float | None:
    """Return the bandwidth of D2H copies, None without a GPU."""
    if not device.startswith("cuda"):
        return None
    try:
        _, down = bus_gb_per_s(torch.device(device).index or 0)
    except (HostMemoryError, RuntimeError) as error:
        logger.warning("Skipping the measurement of the bus: %s", error)
        return None
    return down
