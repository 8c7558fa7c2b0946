"""The whole of `bench train`: tune the batches, measure everyone, and judge."""

from __future__ import annotations

import logging
import multiprocessing
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from offload_adam.bench.machine import describe_machine
from offload_adam.bench.training.conditions import Point, Result, evaluate, reached
from offload_adam.bench.training.contenders import CONTENDERS, OVERLAPPED, SEQUENTIAL
from offload_adam.bench.training.measure import Alone, Measured, Steps, Task, measure
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.ratios import TARGET_RATIOS, choose_batches, is_near
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores, select_threading_layer

logger = logging.getLogger(__name__)

NUM_STEPS = 5
PROCESS_TIMEOUT_S = 900.0
GIB = 2**30
NUM_TUNINGS = 3
"""Rounds in which batches are chosen, each from the times of all before."""
_DEFINITIONS = {
    "forward_ms": "F: the model's forward alone, median",
    "forward_backward_ms": "the model's forward and backward alone, median",
    "update_ms": "U: this package's update with its copies to the device, without overlap; of a "
    "contender: its whole optimizer step after a backward that is over",
    "bucket_ms": "b: the largest bucket's share of U, and of its gradients' copy to the host",
    "step_ms": "one training step among others, median; steps follow each other without a wait",
    "exposed_ms": "step_ms less forward_backward_ms",
    "state": "this package keeps fp32 master weights and moments; plain AdamW, torchao and FSDP2 "
    "keep moments in the model's dtype and no master weights",
    "peak_gpu_gib": "most that torch's allocator held during the steps",
    "host_gib": "host memory taken since before the optimizer was made: by what the node's "
    "available memory fell on a GPU, by what the process's resident memory grew without one",
}

Runner = Callable[[Task], Measured]


class TrainBenchmarkError(RuntimeError):
    """This package itself could not be measured."""


def measure_train(
    sizes: Sizes,
    device: str,
    *,
    num_steps: int = NUM_STEPS,
    targets: Sequence[float] = TARGET_RATIOS,
    first_batches: Sequence[int] = (4, 16),
    largest_batch: int | None = None,
    contenders: Sequence[str] = tuple(CONTENDERS),
    run: Runner | None = None,
) -> dict[str, Any]:
    """Return the report of `bench train`, a JSON object.

    Args:
        device: "cuda" or "cpu"; on a CPU only this package and torch can be measured.
        first_batches: sequences that the tuning starts from.
        largest_batch: most sequences to try; None for as many as the ratios ask for.
        run: carries out a task; None for a process of its own for each.

    Raises:
        TrainBenchmarkError: this package could not be measured.
    """
    run = run or in_own_process
    select_threading_layer()
    bus_down = _bus_down_gb_per_s(device)
    machine = describe_machine(allowed_cores())

    def task(contender: str | None, batches: Sequence[int]) -> Task:
        return Task(
            contender=contender,
            sizes=sizes,
            device=device,
            batches=tuple(sorted(set(batches))),
            num_steps=num_steps,
        )

    sequential = _require(run(task(SEQUENTIAL, first_batches[:1])))
    assert sequential.steps is not None
    update_ms = sequential.steps[first_batches[0]].updates_only_ms or 0.0
    alone, chosen = _tune(
        lambda batches: _require(run(task(None, batches))).alone or {},
        update_ms,
        first_batches,
        targets,
        largest_batch,
    )
    batches = sorted(set(chosen.values()))
    # This package is measured whatever is asked for: all others are judged beside it.
    names = dict.fromkeys([OVERLAPPED, *contenders])
    measured = {name: _try(run, task(name, batches)) for name in names}
    if measured[OVERLAPPED].steps is None:
        raise TrainBenchmarkError(f"{OVERLAPPED}: {measured[OVERLAPPED].unavailable}")
    points = {
        target: _point(target, chosen[target], alone, measured, sequential, bus_down)
        for target in sorted(chosen)
    }
    conditions = {str(target): evaluate(point) for target, (point, _) in points.items()}
    return {
        "benchmark": "train",
        "device": _device_name(device),
        "machine": machine,
        "model": {**asdict(sizes), "num_parameters": sequential.num_parameters},
        "num_steps": num_steps,
        "num_buckets": len(sequential.buckets),
        "bus_down_gb_per_s": bus_down,
        "points": [
            {**shown, "conditions": [asdict(one) for one in conditions[str(target)]]}
            for target, (_, shown) in points.items()
        ],
        "reached": reached(conditions),
        "not_tried": [target for target in targets if target not in chosen],
        "left_out": {
            name: found.unavailable for name, found in measured.items() if found.unavailable
        },
        "definitions": _DEFINITIONS,
    }


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


def _require(found: Measured) -> Measured:
    if found.unavailable is not None:
        raise TrainBenchmarkError(found.unavailable)
    return found


def _try(run: Runner, task: Task) -> Measured:
    try:
        return run(task)
    except TrainBenchmarkError as error:
        logger.warning("%s: %s", task.contender, error)
        return Measured(unavailable=str(error))


def _point(
    target: float,
    batch: int,
    alone: Mapping[int, Alone],
    measured: Mapping[str, Measured],
    first: Measured,
    bus_down_gb_per_s: float | None,
) -> tuple[Point, dict[str, Any]]:
    """Return one point to judge, and as it is written."""
    own = alone[batch]
    sequential = measured.get(SEQUENTIAL, first)
    every = {
        name: one.steps[batch]
        for name, one in measured.items()
        if one.steps is not None and batch in one.steps
    }
    timed = every.get(SEQUENTIAL) or next(iter((sequential.steps or {}).values()))
    update_ms = timed.updates_only_ms or 0.0
    results = {name: _result(steps, own) for name, steps in every.items()}
    point = Point(
        forward_ms=own.forward_ms,
        update_ms=update_ms,
        bucket_ms=_bucket_ms(first.buckets, update_ms, bus_down_gb_per_s),
        results=results,
    )
    shown = {
        "target_ratio": target,
        "ratio": own.forward_ms / update_ms if update_ms else None,
        "near_target": bool(update_ms) and is_near(own.forward_ms / update_ms, target),
        "num_sequences": batch,
        **asdict(own),
        "update_ms": update_ms,
        "bucket_ms": point.bucket_ms,
        "contenders": {name: _shown(every[name], result) for name, result in results.items()},
    }
    return point, shown


def _bucket_ms(buckets: Sequence[int], update_ms: float, bus_down_gb_per_s: float | None) -> float:
    """Return the way of the largest bucket; gradients are as large as parameters."""
    if not buckets:
        return 0.0
    largest = max(buckets)
    down_ms = 0.0 if bus_down_gb_per_s is None else largest / bus_down_gb_per_s / 1e6
    return update_ms * largest / sum(buckets) + down_ms


def _result(steps: Steps, own: Alone) -> Result:
    step_ms = median(steps.steps_ms)
    return Result(
        step_ms=step_ms,
        exposed_ms=step_ms - own.forward_backward_ms,
        update_ms=steps.update_ms,
        peak_gpu_nbytes=steps.peak_gpu_nbytes,
    )


def _shown(steps: Steps, result: Result) -> dict[str, Any]:
    peak = steps.peak_gpu_nbytes
    return {
        "step_ms": result.step_ms,
        "exposed_ms": result.exposed_ms,
        "update_ms": result.update_ms,
        "peak_gpu_gib": None if peak is None else peak / GIB,
        "host_gib": steps.host_nbytes / GIB,
        "steps_ms": list(steps.steps_ms),
    }


def _bus_down_gb_per_s(device: str) -> float | None:
    """Return the bandwidth of copies to the host, None where there are none."""
    if not device.startswith("cuda"):
        return None
    from offload_adam.doctor.devices import bus_gb_per_s

    try:
        _, down = bus_gb_per_s(torch.device(device).index or 0)
    except HostMemoryError as error:
        logger.warning("the bus is not measured: %s", error)
        return None
    return down


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def in_own_process(task: Task) -> Measured:
    """Carry out a task in a spawned process, so that nothing of it stays behind.

    Raises:
        TrainBenchmarkError: it failed, or did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_answer, args=(task, answers), daemon=True)
    process.start()
    try:
        found = _wait(answers, process)
    finally:
        process.join(timeout=10.0)
        if process.is_alive():
            process.kill()
            process.join()
    if isinstance(found, str):
        raise TrainBenchmarkError(found)
    return found


def _wait(answers: Any, process: Any) -> Measured | str:
    """Return the answer, or why there is none."""
    for _ in range(int(PROCESS_TIMEOUT_S)):
        try:
            found: Measured | str = answers.get(timeout=1.0)
            return found
        except queue.Empty:
            if not process.is_alive() and answers.empty():
                return f"its process ended with {process.exitcode}"
    return f"it did not end within {PROCESS_TIMEOUT_S:.0f} s"


def _answer(task: Task, answers: Any) -> None:
    """Put what was measured, or the error's text, into the queue."""
    try:
        answers.put(measure(task))
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        answers.put(f"{type(error).__name__}: {first}")
