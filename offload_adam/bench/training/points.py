"""From what was measured at one batch to a point of the report: a row for each contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from offload_adam.bench.training.conditions import Condition, Point, Result, evaluate
from offload_adam.bench.training.contenders import MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import OUT_OF_MEMORY, Alone, Measured, Steps
from offload_adam.bench.training.ratios import is_near

GIB = 2**30
DEFINITIONS = {
    "forward_ms": "F: the model's forward alone, median",
    "forward_backward_ms": "the model's forward and backward alone, median",
    "update_ms": "U: this package's update with its copies to the device, without overlap; of a "
    "contender: its whole optimizer step after a backward that is over",
    "bucket_ms": "b: the largest bucket's share of U, and of its gradients' copy to the host",
    "tokens_per_s": "tokens of a batch / step_ms",
    "step_ms": "one training step among others, median; steps follow each other without a wait",
    "exposed_ms": "step_ms less forward_backward_ms",
    "state": "this package keeps fp32 master weights and moments; plain AdamW, torchao and FSDP2 "
    "keep moments in the model's dtype and no master weights",
    "clipping": "every contender clips gradients but torchao, which has none left to clip",
    "peak_gpu_gib": "most that torch's allocator held during the steps",
    "peak_host_gib": "most host memory taken since before the optimizer was made: by what the "
    "node's available memory fell on a GPU, by what the process's resident memory grew without one",
    "reason": "why a contender has no times at this batch; failed: it should have",
}


def describe_point(
    target: float | None,
    batch: int,
    measured: Mapping[str, Measured],
    *,
    sequential: Measured | None,
    sequence_length: int,
    bus_down_gb_per_s: float | None,
) -> tuple[dict[str, Any], list[Condition]]:
    """Return the report's point of one batch, and its conditions.

    Args:
        target: ratio of forward to update that the batch was chosen for, None if it was given.
        measured: by contender, the model alone among them.
        sequential: what tells U if no contender among those measured does.
    """
    own = measured.get(MODEL_ALONE, Measured()).alone.get(batch)
    timed = measured.get(SEQUENTIAL) or sequential or Measured()
    update_ms = _update_ms(timed, batch)
    steps = {name: one.steps[batch] for name, one in measured.items() if batch in one.steps}
    buckets = next((one.buckets for one in (timed, *measured.values()) if one.buckets), ())
    bucket_ms = _bucket_ms(buckets, update_ms, bus_down_gb_per_s) if update_ms else None
    rows = {name: _row(one, batch, own, batch * sequence_length) for name, one in measured.items()}
    conditions = _conditions(own, update_ms, bucket_ms, steps)
    point = {
        "target_ratio": target,
        "ratio": own.forward_ms / update_ms if own and update_ms else None,
        "near_target": _near(own, update_ms, target),
        "num_sequences": batch,
        "forward_ms": own.forward_ms if own else None,
        "forward_backward_ms": own.forward_backward_ms if own else None,
        "update_ms": update_ms,
        "bucket_ms": bucket_ms,
        "contenders": rows,
        "conditions": [asdict(condition) for condition in conditions],
    }
    return point, conditions


def _near(own: Alone | None, update_ms: float | None, target: float | None) -> bool | None:
    if own is None or not update_ms or target is None:
        return None
    return is_near(own.forward_ms / update_ms, target)


def _update_ms(timed: Measured, batch: int) -> float | None:
    """Return U at a batch, or at another one where it is not known: it depends on none."""
    steps = timed.steps.get(batch) or next(iter(timed.steps.values()), None)
    return None if steps is None else steps.updates_only_ms


def _bucket_ms(buckets: Sequence[int], update_ms: float, bus_down_gb_per_s: float | None) -> float:
    """Return the way of the largest bucket; gradients are as large as parameters."""
    if not buckets:
        return 0.0
    largest = max(buckets)
    down_ms = 0.0 if bus_down_gb_per_s is None else largest / bus_down_gb_per_s / 1e6
    return update_ms * largest / sum(buckets) + down_ms


def _row(found: Measured, batch: int, own: Alone | None, num_tokens: int) -> dict[str, Any]:
    """Return a contender's row, or the reason why there is none."""
    if batch in found.alone:
        alone = found.alone[batch]
        return _times(alone.forward_backward_ms, own, num_tokens, alone.peak_gpu_nbytes)
    if batch in found.steps:
        steps = found.steps[batch]
        return {
            **_times(median(steps.steps_ms), own, num_tokens, steps.peak_gpu_nbytes),
            "update_ms": steps.update_ms,
            "peak_host_gib": steps.peak_host_nbytes / GIB,
            "steps_ms": list(steps.steps_ms),
        }
    if found.unavailable is not None:
        return {"reason": found.unavailable, "failed": False}
    reason = found.reasons.get(batch, "it was not measured")
    return {"reason": reason, "failed": reason != OUT_OF_MEMORY}


def _times(
    step_ms: float, own: Alone | None, num_tokens: int, peak_gpu_nbytes: int | None
) -> dict[str, Any]:
    return {
        "tokens_per_s": num_tokens / step_ms * 1e3,
        "step_ms": step_ms,
        "exposed_ms": None if own is None else step_ms - own.forward_backward_ms,
        "peak_gpu_gib": None if peak_gpu_nbytes is None else peak_gpu_nbytes / GIB,
    }


def _conditions(
    own: Alone | None,
    update_ms: float | None,
    bucket_ms: float | None,
    steps: Mapping[str, Steps],
) -> list[Condition]:
    """Return every condition; none where F or U is not known."""
    if own is None or update_ms is None or bucket_ms is None:
        return []
    results = {
        name: Result(
            step_ms=median(one.steps_ms),
            exposed_ms=median(one.steps_ms) - own.forward_backward_ms,
            update_ms=one.update_ms,
            peak_gpu_nbytes=one.peak_gpu_nbytes,
        )
        for name, one in steps.items()
    }
    return evaluate(
        Point(forward_ms=own.forward_ms, update_ms=update_ms, bucket_ms=bucket_ms, results=results)
    )
