"""The results of `bench train`, with a point for each batch: as JSON, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from offload_adam.bench.report import machine_line, table
from offload_adam.bench.training.batches import is_near
from offload_adam.bench.training.contenders import LABELS, MODEL_ALONE, SEQUENTIAL
from offload_adam.bench.training.measure import OUT_OF_MEMORY, Measured, Steps
from offload_adam.bench.training.model import Sizes

Report = Mapping[str, Any]

GIB = 2**30
NONE = "-"
LEGEND = (
    "F: the model's forward.",
    f"U: offload_adam's updates without overlap, measured with {SEQUENTIAL}.",
    "b: the largest bucket's part of U, and its D2H copy.",
    "exposed: a step's time minus that of forward and backward alone.",
)
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


@dataclass(kw_only=True)
class Results:
    """The results so far.

    bus_down_gb_per_s: bandwidth of D2H copies, None without a GPU.
    batches: (target ratio or None if the batch was given, number of sequences).
    not_tried: target ratios that were left out: their batch does not fit, or another target has it.
    sequential: the measurement that gave U to choose the batches.
    measured: by contender, including the model alone.
    wall_s: seconds that the measurement of each contender took.
    """

    sizes: Sizes
    device: str
    num_steps: int
    bus_down_gb_per_s: float | None
    machine: Mapping[str, Any]
    batches: list[tuple[float | None, int]] = field(default_factory=list)
    not_tried: list[float] = field(default_factory=list)
    sequential: Measured = field(default_factory=Measured)
    measured: dict[str, Measured] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Return the report, a JSON object."""
        everything = [self.sequential, *self.measured.values()]
        on_gpu = self.device.startswith("cuda")
        return {
            "benchmark": "train",
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "machine": dict(self.machine),
            "model": {
                **asdict(self.sizes),
                "num_parameters": max(one.num_parameters for one in everything),
            },
            "num_steps": self.num_steps,
            "num_buckets": max(len(one.buckets) for one in everything),
            "bus_down_gb_per_s": self.bus_down_gb_per_s,
            "points": [self._point(target, batch) for target, batch in self.batches],
            "not_tried": self.not_tried,
            "wall_s": self.wall_s,
            "definitions": DEFINITIONS,
        }

    def _point(self, target: float | None, batch: int) -> dict[str, Any]:
        alone = self.measured.get(MODEL_ALONE, Measured()).steps.get(batch)
        forward_ms = alone.forward_ms if alone else None
        timed = self.measured.get(SEQUENTIAL, self.sequential)
        # U does not depend on the batch: it may come from another one.
        timed_steps = timed.steps.get(batch) or next(iter(timed.steps.values()), None)
        update_ms = timed_steps.updates_only_ms if timed_steps else None
        ratio = forward_ms / update_ms if forward_ms and update_ms else None
        return {
            "target_ratio": target,
            "ratio": ratio,
            "near_target": None if ratio is None or target is None else is_near(ratio, target),
            "num_sequences": batch,
            "forward_ms": forward_ms,
            "forward_backward_ms": alone.step_ms if alone else None,
            "update_ms": update_ms,
            "bucket_ms": self._bucket_ms(timed.buckets, update_ms),
            "contenders": {name: self._row(name, batch, alone) for name in self.measured},
        }

    def _bucket_ms(self, buckets: tuple[int, ...], update_ms: float | None) -> float | None:
        """Return b. A bucket's gradients have as many bytes as its parameters."""
        if not buckets or not update_ms:
            return None
        largest, bandwidth = max(buckets), self.bus_down_gb_per_s
        down_ms = 0.0 if bandwidth is None else largest / bandwidth / 1e6
        return update_ms * largest / sum(buckets) + down_ms

    def _row(self, name: str, batch: int, alone: Steps | None) -> dict[str, Any]:
        """Return the times of a contender, or the reason why it has none."""
        found = self.measured[name]
        if batch not in found.steps:
            reason = found.reasons.get(batch, "it was not measured")
            failed = found.unavailable is None and reason != OUT_OF_MEMORY
            return {"reason": found.unavailable or reason, "failed": failed}
        steps = found.steps[batch]
        return {
            "tokens_per_s": batch * self.sizes.sequence_length / steps.step_ms * 1e3,
            "step_ms": steps.step_ms,
            "exposed_ms": None if alone is None else steps.step_ms - alone.step_ms,
            "update_ms": steps.update_ms,
            "peak_gpu_gib": None if steps.peak_gpu_nbytes is None else steps.peak_gpu_nbytes / GIB,
            "peak_host_gib": steps.peak_host_nbytes / GIB,
            "steps_ms": list(steps.steps_ms),
        }


def failures(report: Report) -> Iterator[str]:
    """Yield every failure, with its contender and batch.

    A peer that is not installed is not a failure, and a batch that is too large is not one either.
    """
    for point in report["points"]:
        for name, row in point["contenders"].items():
            if row.get("failed"):
                yield f"{name} at {point['num_sequences']} sequences: {row['reason']}"


def markdown(report: Report) -> str:
    """Return a heading and a table for each batch, then a legend and the machine."""
    lines: list[str] = []
    for point in report["points"]:
        lines += [*point_heading(report, point), *table(*point_rows(point)), ""]
    return "\n".join([*lines, *LEGEND, "", machine_line(report["machine"])])


def point_heading(report: Report, point: Report) -> list[str]:
    """Return the title of a batch, and the times that all contenders have in common."""
    keys = ("forward_ms", "update_ms", "ratio", "bucket_ms")
    forward, update, ratio, bucket = (number(point[key]) for key in keys)
    times = f"Forward F: {forward} ms. Update U: {update} ms. F/U: {ratio}."
    return [f"### {title(report, point)}", "", f"{times} One bucket b: {bucket} ms.", ""]


def title(report: Report, point: Report) -> str:
    """Return device, model and batch in one line."""
    model, numel = report["model"], report["model"]["num_parameters"]
    size = f"{numel / 1e9:.3g} B" if numel >= 1e7 else f"{numel:,}"
    return (
        f"{report['device']}: {size} parameters in "
        f"{model['dtype']}, {point['num_sequences']} x {model['sequence_length']} tokens"
    )


def point_rows(point: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header of the table of one batch, and its rows."""
    header = ["optimizer", "tokens/s", "step, ms", "exposed, ms", "peak GPU, GiB", "peak host, GiB"]
    keys = ("step_ms", "exposed_ms", "peak_gpu_gib", "peak_host_gib")
    cells = []
    for name, row in point["contenders"].items():
        if "reason" in row:
            values = [row["reason"], *[NONE] * len(keys)]
        else:
            values = [f"{row['tokens_per_s']:,.0f}", *(number(row.get(key)) for key in keys)]
        cells.append([LABELS.get(name, name), *values])
    return header, cells


def number(value: float | None) -> str:
    """Return three digits or more, "-" for an unknown number."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
