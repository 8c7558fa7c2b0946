"""Show results of `bench train` as Markdown, with predictions beside the measured times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
_NONE = "-"


def read(path: Path, command: str) -> Report:
    """Return a report of `bench train` or `bench predict`.

    Args:
        command: "train" or "predict".

    Raises:
        ValueError: the file cannot be read, or is not a report of this command.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("benchmark") != command:
        raise ValueError(f"{path} is no file of `offload-adam bench {command} --json {path.name}`")
    return found


def markdown(reports: Sequence[Report], predictions: Sequence[Report] = ()) -> str:
    """Return a heading and a table for each report and batch, then conditions and machine."""
    lines: list[str] = []
    for report in reports:
        expected = [one for one in predictions if one["model"] == report["model"]]
        for point in report["points"]:
            lines += [f"### {title(report, point)}", "", _times(point), ""]
            lines += [*_table(point, expected), ""]
        words = {True: "yes", False: "NO", None: "not known"}
        lines += [f"- {name}: {words[holds]}" for name, holds in report["reached"].items()]
        lines += ["", machine_line(report["machine"]), ""]
        lines += [line for one in expected for line in (_assumptions(one), "")]
    return "\n".join(lines)


def title(report: Report, point: Report) -> str:
    """Return device, model and batch in one line."""
    model, numel = report["model"], report["model"]["num_parameters"]
    size = f"{numel / 1e9:.3g} B" if numel >= 1e7 else f"{numel:,}"
    return (
        f"{report['device']}: {size} parameters in "
        f"{model['dtype']}, {point['num_sequences']} x {model['sequence_length']} tokens"
    )


def _table(point: Report, predictions: Sequence[Report]) -> list[str]:
    times = ("step", "exposed")
    header = ["optimizer", "tokens/s"]
    for time in times:
        header += [f"{time}, ms", *(["predicted"] if predictions else [])]
    header += ["peak GPU, GiB", "peak host, GiB"]
    rows = []
    for name, row in point["contenders"].items():
        cells = [LABELS.get(name, name)]
        if "reason" in row:
            rows.append([*cells, row["reason"], *[_NONE] * (len(header) - 2)])
            continue
        cells.append(f"{row['tokens_per_s']:,.0f}")
        for time in times:
            cells.append(_number(row[f"{time}_ms"]))
            if predictions:
                cells.append(_predicted(predictions, point, name, f"{time}_ms"))
        cells += [_number(row.get(f"peak_{place}_gib")) for place in ("gpu", "host")]
        rows.append(cells)
    return table(header, rows)


def _predicted(predictions: Sequence[Report], point: Report, name: str, key: str) -> str:
    """Return the predicted value of a row, a range if predictions differ, "-" without any.

    Predictions of the same batch differ in the assumed bandwidth of host memory.
    """
    values = [
        expected["contenders"][name][key]
        for prediction in predictions
        for expected in prediction["points"]
        if expected["num_sequences"] == point["num_sequences"] and name in expected["contenders"]
    ]
    if not values:
        return _NONE
    ends = dict.fromkeys([_number(min(values)), _number(max(values))])
    return " to ".join(ends)


def _number(value: float | None) -> str:
    """Return three digits or more, "-" for an unknown number."""
    if value is None:
        return _NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _times(point: Report) -> str:
    keys = ("forward_ms", "update_ms", "ratio", "bucket_ms")
    forward, update, ratio, bucket = (_number(point[key]) for key in keys)
    return (
        f"Forward F: {forward} ms. Update U: {update} ms. F/U: {ratio}. One bucket b: {bucket} ms."
    )


def _assumptions(prediction: Report) -> str:
    host = dict.fromkeys(f"{point['host_gb_per_s']:g}" for point in prediction["points"])
    return (
        f"Predicted for host memory of {', '.join(host)} GB/s, a bus of "
        f"{prediction['bus_gb_per_s']:g} GB/s, and {prediction['tera_flops']:g} TFLOP/s."
    )
