"""Run `bench train`: choose the batches and measure every contender."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from offload_adam.bench.machine import describe_machine
from offload_adam.bench.training.batches import TARGET_RATIOS, tune_batches
from offload_adam.bench.training.contenders import CONTENDERS, MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import Measured, Steps, Task
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.points import DEFINITIONS, describe_point
from offload_adam.bench.training.process import TrainBenchmarkError, in_own_process
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores, select_threading_layer

logger = logging.getLogger(__name__)

NUM_STEPS = 5
PROCESS_TIMEOUT_S = 900.0
LEAST_S = 15.0
"""With less time left, a contender is skipped: starting its process takes seconds."""
SHARES = 2
"""A contender may take this many times its equal share of the time that is left."""


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
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
    run: Callable[[Task], Measured] = in_own_process,
) -> dict[str, Any]:
    """Return the report of `bench train`, a JSON object.

    The model alone is measured first, then each contender. If a contender fails or is not
    installed, its row has the reason.

    Args:
        device: "cuda" or "cpu". On a CPU only this package and torch can be measured.
        batches: numbers of sequences; if empty, they are chosen by `targets`.
        targets: ratios of forward to update.
        first_batches: sequences that the choice starts from.
        largest_batch: most sequences to choose, None for no limit.
        contenders: names of CONTENDERS, in the order in which they are measured.
        time_limit_s: seconds for everything, None for no limit.
        keep: called after each contender with the report so far.
        run: carries out a task.

    Raises:
        TrainBenchmarkError: `batches` is empty, and the measurement to choose them failed.
    """
    end_s = None if time_limit_s is None else time.monotonic() + time_limit_s
    select_threading_layer()
    session = _Session(
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
        session.batches = [(None, batch) for batch in sorted(set(batches))]
        session.measure(MODEL_ALONE, len(names) + 1)
    else:
        session.choose_batches(targets, first_batches, largest_batch)
    keep(session.report())
    for number, name in enumerate(names):
        session.measure(name, len(names) - number)
        keep(session.report())
    return session.report()


@dataclass(kw_only=True)
class _Session:
    """The results so far.

    end_s: end of the time limit, on the monotonic clock.
    batches: (target ratio or None if the batch was given, number of sequences).
    not_tried: target ratios without a batch that fits.
    sequential: the measurement that gave U to choose the batches.
    measured: by contender.
    wall_s: seconds that each contender's process took.
    """

    sizes: Sizes
    device: str
    num_steps: int
    bus_down_gb_per_s: float | None
    machine: Mapping[str, Any]
    end_s: float | None
    run: Callable[[Task], Measured]
    batches: list[tuple[float | None, int]] = field(default_factory=list)
    not_tried: list[float] = field(default_factory=list)
    sequential: Measured | None = None
    measured: dict[str, Measured] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, num_left: int) -> None:
        """Measure a contender at all batches.

        Args:
            num_left: contenders that are not measured yet, including this one.
        """
        batches = [batch for _, batch in self.batches]
        start_s = time.monotonic()
        limit_s = self._limit_s(num_left)
        if limit_s < LEAST_S:
            self.measured[name] = Measured(reasons=dict.fromkeys(batches, "no time was left"))
            return
        try:
            self.measured[name] = self.run(self._task(name, batches, limit_s))
        except TrainBenchmarkError as error:
            logger.warning("Skipping %s: %s", name, error)
            self.measured[name] = Measured(reasons=dict.fromkeys(batches, str(error)))
        self.wall_s[name] = round(time.monotonic() - start_s, 1)
        logger.info("Measured %s in %.1f s: %s", name, self.wall_s[name], self.measured[name])

    def _limit_s(self, num_left: int) -> float:
        if self.end_s is None:
            return PROCESS_TIMEOUT_S
        left_s = self.end_s - time.monotonic()
        return min(PROCESS_TIMEOUT_S, left_s, SHARES * left_s / num_left)

    def _task(self, name: str, batches: Sequence[int], limit_s: float) -> Task:
        return Task(
            contender=name,
            sizes=self.sizes,
            device=self.device,
            batches=tuple(sorted(set(batches))),
            num_steps=self.num_steps,
            time_limit_s=limit_s,
        )

    def choose_batches(
        self, targets: Sequence[float], first_batches: Sequence[int], largest: int | None
    ) -> None:
        """Choose the batches; this also measures the model alone."""
        self.sequential = self._required(SEQUENTIAL, first_batches[:1])
        update_ms = self.sequential.steps[first_batches[0]].updates_only_ms or 0.0

        def measure_alone(batches: Sequence[int]) -> Mapping[int, Steps]:
            return self._required(MODEL_ALONE, batches).steps

        alone, chosen = tune_batches(measure_alone, update_ms, first_batches, targets, largest)
        self.measured[MODEL_ALONE] = Measured(steps=alone)
        self.batches = sorted(chosen.items())
        self.not_tried = [target for target in targets if target not in chosen]

    def _required(self, name: str, batches: Sequence[int]) -> Measured:
        found = self.run(self._task(name, batches, self._limit_s(1)))
        if found.unavailable is not None:
            raise TrainBenchmarkError(found.unavailable)
        return found

    def report(self) -> dict[str, Any]:
        """Return all results so far as a JSON object."""
        everything = [one for one in (self.sequential, *self.measured.values()) if one is not None]
        on_gpu = self.device.startswith("cuda")
        return {
            "benchmark": "train",
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "machine": dict(self.machine),
            "model": {
                **asdict(self.sizes),
                "num_parameters": max((one.num_parameters for one in everything), default=0),
            },
            "num_steps": self.num_steps,
            "num_buckets": max((len(one.buckets) for one in everything), default=0),
            "bus_down_gb_per_s": self.bus_down_gb_per_s,
            "points": [
                describe_point(
                    target,
                    batch,
                    self.measured,
                    sequential=self.sequential,
                    sequence_length=self.sizes.sequence_length,
                    bus_down_gb_per_s=self.bus_down_gb_per_s,
                )
                for target, batch in self.batches
            ],
            "not_tried": self.not_tried,
            "wall_s": self.wall_s,
            "definitions": DEFINITIONS,
        }


def failures(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield every failure, with its contender and batch.

    A peer that is not installed is not a failure, and a batch that is too large is not one either.
    """
    for point in report["points"]:
        for name, row in point["contenders"].items():
            if row.get("failed"):
                yield f"{name} at {point['num_sequences']} sequences: {row['reason']}"


def _bus_down_gb_per_s(device: str) -> float | None:
    """Return the bandwidth of D2H copies, None without a GPU."""
    if not device.startswith("cuda"):
        return None
    from offload_adam.doctor.bandwidth import bus_gb_per_s

    try:
        _, down = bus_gb_per_s(torch.device(device).index or 0)
    except (HostMemoryError, RuntimeError) as error:
        logger.warning("Skipping the measurement of the bus: %s", error)
        return None
    return down
