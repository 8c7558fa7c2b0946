"""Turn the measurements at one batch into a point of the report: a row for each contender."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload_adam.bench.training.batches import is_near
from offload_adam.bench.training.contenders import MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import OUT_OF_MEMORY, Measured, Steps

GIB = 2**30
DEFINITIONS = {
    "forward_ms": "F: the model's forward alone, median",
    "forward_backward_ms": "the model's forward and backward alone, median",
    "update_ms": "of a batch, U: this package's update and its H2D copies, without overlap; of a "
    "contender: its whole optimizer step, which begins after backward has finished",
    "bucket_ms": "b: the largest bucket's share of U, plus the D2H copy of its gradients",
    "tokens_per_s": "tokens of a batch / step_ms",
    "step_ms": "one training step, median; steps follow each other without a wait",
    "exposed_ms": "step_ms - forward_backward_ms",
    "state": "this package keeps fp32 master weights and moments; plain AdamW, torchao and FSDP2 "
    "keep moments in the model's dtype and no master weights",
    "clipping": "every contender clips gradients except torchao, which frees them in backward",
    "peak_gpu_gib": "maximum that torch's allocator held during the steps",
    "peak_host_gib": "maximum of host memory taken since before the optimizer was made: on a GPU, "
    "by how much the node's available memory fell; on a CPU, by how much resident memory grew",
    "reason": "why a contender has no times at this batch; failed: it should have times",
}


def describe_point(
    target: float | None,
    batch: int,
    measured: Mapping[str, Measured],
    *,
    sequential: Measured | None,
    sequence_length: int,
    bus_down_gb_per_s: float | None,
) -> dict[str, Any]:
    """Return the report's point of one batch.

    Args:
        target: ratio of forward to update that the batch was chosen for, None if it was given.
        measured: by contender, including the model alone.
        sequential: gives U if `measured` does not contain the sequential optimizer.
        bus_down_gb_per_s: bandwidth of D2H copies, None without a GPU.
    """
    steps = {name: one.steps[batch] for name, one in measured.items() if batch in one.steps}
    alone = steps.get(MODEL_ALONE)
    forward_ms = alone.forward_ms if alone else None
    timed = measured.get(SEQUENTIAL) or sequential or Measured()
    update_ms = _update_ms(timed, batch)
    buckets = next((one.buckets for one in (timed, *measured.values()) if one.buckets), ())
    bucket_ms = _bucket_ms(buckets, update_ms, bus_down_gb_per_s) if update_ms else None
    ratio = forward_ms / update_ms if forward_ms and update_ms else None
    num_tokens = batch * sequence_length
    return {
        "target_ratio": target,
        "ratio": ratio,
        "near_target": None if ratio is None or target is None else is_near(ratio, target),
        "num_sequences": batch,
        "forward_ms": forward_ms,
        "forward_backward_ms": alone.step_ms if alone else None,
        "update_ms": update_ms,
        "bucket_ms": bucket_ms,
        "contenders": {
            name: _row(steps[name], alone, num_tokens) if name in steps else _no_row(one, batch)
            for name, one in measured.items()
        },
    }


def _update_ms(timed: Measured, batch: int) -> float | None:
    """Return U, measured at this batch or at another one: U does not depend on the batch."""
    steps = timed.steps.get(batch) or next(iter(timed.steps.values()), None)
    return None if steps is None else steps.updates_only_ms


def _bucket_ms(
    buckets: tuple[int, ...], update_ms: float, bus_down_gb_per_s: float | None
) -> float:
    """Return b. A bucket's gradients have as many bytes as its parameters."""
    if not buckets:
        return 0.0
    largest = max(buckets)
    down_ms = 0.0 if bus_down_gb_per_s is None else largest / bus_down_gb_per_s / 1e6
    return update_ms * largest / sum(buckets) + down_ms


def _row(steps: Steps, alone: Steps | None, num_tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_s": num_tokens / steps.step_ms * 1e3,
        "step_ms": steps.step_ms,
        "exposed_ms": None if alone is None else steps.step_ms - alone.step_ms,
        "update_ms": steps.update_ms,
        "peak_gpu_gib": None if steps.peak_gpu_nbytes is None else steps.peak_gpu_nbytes / GIB,
        "peak_host_gib": steps.peak_host_nbytes / GIB,
        "steps_ms": list(steps.steps_ms),
    }


def _no_row(found: Measured, batch: int) -> dict[str, Any]:
    """Return the reason why a contender has no times."""
    if found.unavailable is not None:
        return {"reason": found.unavailable, "failed": False}
    reason = found.reasons.get(batch, "it was not measured")
    return {"reason": reason, "failed": reason != OUT_OF_MEMORY}
