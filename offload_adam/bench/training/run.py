"""The whole of `bench train`: choose the batches, measure every contender, and judge."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from offload_adam.bench.machine import describe_machine
from offload_adam.bench.training.conditions import reached
from offload_adam.bench.training.contenders import CONTENDERS, MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import Alone, Measured, Task
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.points import DEFINITIONS, describe_point
from offload_adam.bench.training.process import TrainBenchmarkError, in_own_process
from offload_adam.bench.training.ratios import TARGET_RATIOS, choose_batches, is_near
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores, select_threading_layer

logger = logging.getLogger(__name__)

NUM_STEPS = 5
PROCESS_TIMEOUT_S = 900.0
LEAST_S = 15.0
"""A contender is left out when less time than this remains: its process takes long to start."""
SHARES = 2
"""A contender may take this many times its equal share of the time that is left."""
NUM_TUNINGS = 3
"""Rounds in which batches are chosen, each from the times of all before."""

Runner = Callable[[Task], Measured]
Keep = Callable[[dict[str, Any]], None]


def measure_train(
    sizes: Sizes,
    device: str,
    *,
    num_steps: int = NUM_STEPS,
    batches: Sequence[int] = (),
    targets: Sequence[float] = TARGET_RATIOS,
    first_batches: Sequence[int] = (4, 16),
    largest_batch: int | None = None,
    contenders: Sequence[str] = tuple(CONTENDERS),
    time_limit_s: float | None = None,
    keep: Keep = lambda report: None,
    run: Runner = in_own_process,
) -> dict[str, Any]:
    """Return the report of `bench train`, a JSON object.

    The model alone is measured first, then each contender; one that fails or is not installed has
    the reason in its row.

    Args:
        device: "cuda" or "cpu"; on a CPU only this package and torch can be measured.
        batches: numbers of sequences; none to choose them by `targets`.
        targets: ratios of forward to update.
        first_batches: sequences that the choice starts from.
        largest_batch: most sequences to choose; None for as many as the ratios ask for.
        contenders: names of CONTENDERS, in the order in which they are measured.
        time_limit_s: seconds for all of it, None for no limit.
        keep: called with the report so far after each contender.
        run: carries out a task.

    Raises:
        TrainBenchmarkError: no batches were given, and the update's time to choose them by could
            not be measured.
    """
    end_s = None if time_limit_s is None else time.monotonic() + time_limit_s
    select_threading_layer()
    findings = _Findings(
        sizes=sizes,
        device=device,
        num_steps=num_steps,
        bus_down_gb_per_s=_bus_down_gb_per_s(device),
        machine=describe_machine(allowed_cores()),
        end_s=end_s,
        run=run,
    )
    names = list(dict.fromkeys(contenders))
    if batches:
        findings.batches = [(None, batch) for batch in sorted(set(batches))]
        findings.measure(MODEL_ALONE, len(names) + 1)
    else:
        findings.choose(targets, first_batches, largest_batch)
    keep(findings.report())
    for number, name in enumerate(names):
        findings.measure(name, len(names) - number)
        keep(findings.report())
    return findings.report()


@dataclass(kw_only=True)
class _Findings:
    """What has been measured so far.

    batches: with the ratio of forward to update that each was chosen for, if one was.
    sequential: what the batches were chosen by.
    wall_s: seconds that each contender's process took.
    end_s: when time is up, on the monotonic clock.
    """

    sizes: Sizes
    device: str
    num_steps: int
    bus_down_gb_per_s: float | None
    machine: Mapping[str, Any]
    end_s: float | None
    run: Runner
    batches: list[tuple[float | None, int]] = field(default_factory=list)
    not_tried: list[float] = field(default_factory=list)
    sequential: Measured | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, num_left: int) -> None:
        """Measure a contender, the first of `num_left`, at all batches."""
        batches = [batch for _, batch in self.batches]
        start_s = time.monotonic()
        limit_s = self._limit_s(num_left)
        if limit_s < LEAST_S:
            self.measured[name] = _failed(batches, "no time was left")
            return
        try:
            self.measured[name] = self.run(self._task(name, batches, limit_s))
        except TrainBenchmarkError as error:
            logger.warning("%s: %s", name, error)
            self.measured[name] = _failed(batches, str(error))
        self.wall_s[name] = round(time.monotonic() - start_s, 1)
        logger.info("%s took %.1f s: %s", name, self.wall_s[name], self.measured[name])

    def _limit_s(self, num_left: int) -> float:
        if self.end_s is None:
            return PROCESS_TIMEOUT_S
        left_s = self.end_s - time.monotonic()
        return min(PROCESS_TIMEOUT_S, left_s, SHARES * left_s / num_left)

    def _task(self, name: str, batches: Sequence[int], limit_s: float) -> Task:
        return Task(
            contender=None if name == MODEL_ALONE else name,
            sizes=self.sizes,
            device=self.device,
            batches=tuple(sorted(set(batches))),
            num_steps=self.num_steps,
            time_limit_s=limit_s,
        )

    def choose(
        self, targets: Sequence[float], first_batches: Sequence[int], largest: int | None
    ) -> None:
        """Choose the batches, and measure the model alone on the way."""
        self.sequential = self._required(SEQUENTIAL, first_batches[:1])
        update_ms = self.sequential.steps[first_batches[0]].updates_only_ms or 0.0
        alone, chosen = _tune(
            lambda batches: self._required(MODEL_ALONE, batches).alone,
            update_ms,
            first_batches,
            targets,
            largest,
        )
        self.measured[MODEL_ALONE] = Measured(alone=alone)
        self.batches = sorted(chosen.items())
        self.not_tried = [target for target in targets if target not in chosen]

    def _required(self, name: str, batches: Sequence[int]) -> Measured:
        found = self.run(self._task(name, batches, self._limit_s(1)))
        if found.unavailable is not None:
            raise TrainBenchmarkError(found.unavailable)
        return found

    def report(self) -> dict[str, Any]:
        """Return everything so far as a JSON object."""
        points = [
            describe_point(
                target,
                batch,
                self.measured,
                sequential=self.sequential,
                sequence_length=self.sizes.sequence_length,
                bus_down_gb_per_s=self.bus_down_gb_per_s,
            )
            for target, batch in self.batches
        ]
        everything = [one for one in (self.sequential, *self.measured.values()) if one is not None]
        return {
            "benchmark": "train",
            "device": _device_name(self.device),
            "machine": dict(self.machine),
            "model": {
                **asdict(self.sizes),
                "num_parameters": max((one.num_parameters for one in everything), default=0),
            },
            "num_steps": self.num_steps,
            "num_buckets": max((len(one.buckets) for one in everything), default=0),
            "bus_down_gb_per_s": self.bus_down_gb_per_s,
            "points": [shown for shown, _ in points],
            "reached": reached({str(n): found for n, (_, found) in enumerate(points)}),
            "not_tried": self.not_tried,
            "wall_s": self.wall_s,
            "definitions": DEFINITIONS,
        }


def failures(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what went wrong, by contender and batch.

    A peer that is not installed is no failure, and neither is a batch that is too large.
    """
    for point in report["points"]:
        for name, row in point["contenders"].items():
            if row.get("failed"):
                yield f"{name} at {point['num_sequences']} sequences: {row['reason']}"


def _failed(batches: Sequence[int], reason: str) -> Measured:
    return Measured(reasons=dict.fromkeys(batches, reason))


def _tune(
    time_alone: Callable[[Sequence[int]], Mapping[int, Alone]],
    update_ms: float,
    first_batches: Sequence[int],
    targets: Sequence[float],
    largest: int | None,
) -> tuple[dict[int, Alone], dict[float, int]]:
    """Return the model's times, and the batch for each ratio that was reached or approached."""
    alone = dict(time_alone(first_batches))
    chosen: dict[float, int] = {}
    for _ in range(NUM_TUNINGS):
        forward_ms = {batch: one.forward_ms for batch, one in alone.items()}
        chosen = choose_batches(forward_ms, update_ms, targets, largest=largest)
        unknown = sorted(set(chosen.values()) - set(alone))
        alone.update(time_alone(unknown) if unknown else {})
        too_large = [batch for batch in unknown if batch not in alone]
        if too_large:
            largest = too_large[0] - 1
        elif all(
            is_near(alone[batch].forward_ms / update_ms, target) for target, batch in chosen.items()
        ):
            break
    return alone, {target: batch for target, batch in chosen.items() if batch in alone}


def _bus_down_gb_per_s(device: str) -> float | None:
    """Return the bandwidth of copies to the host, None where there are none."""
    if not device.startswith("cuda"):
        return None
    from offload_adam.doctor.bandwidth import bus_gb_per_s

    try:
        _, down = bus_gb_per_s(torch.device(device).index or 0)
    except (HostMemoryError, RuntimeError) as error:
        logger.warning("the bus is not measured: %s", error)
        return None
    return down


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
