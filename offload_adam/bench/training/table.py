"""Show the report of `bench train` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload_adam.bench.report import machine_line, table
from offload_adam.bench.training.contenders import (
    DEEPSPEED,
    FSDP2,
    MODEL_ALONE,
    OVERLAPPED,
    PLAIN,
    SEQUENTIAL,
    TORCHAO,
)

Report = Mapping[str, Any]

LABELS = {
    MODEL_ALONE: "forward and backward alone",
    OVERLAPPED: "offload_adam, overlapped",
    SEQUENTIAL: "offload_adam, sequential",
    PLAIN: "torch AdamW(fused=True), nothing offloaded",
    FSDP2: "FSDP2 + CPUOffloadPolicy + fused AdamW",
    TORCHAO: "torchao CPUOffloadOptimizer",
    DEEPSPEED: "DeepSpeed ZeRO-2 + CPU offload",
}
NONE = "-"


def markdown(report: Report) -> str:
    """Return a heading and a table for each batch, then the machine."""
    lines: list[str] = []
    for point in report["points"]:
        lines += [*heading(report, point), *table(*rows(point)), ""]
    return "\n".join([*lines, machine_line(report["machine"])])


def heading(report: Report, point: Report) -> list[str]:
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


def rows(point: Report) -> tuple[list[str], list[list[str]]]:
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
