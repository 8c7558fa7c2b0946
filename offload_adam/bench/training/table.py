"""The documentation's table of `bench train`, from result files and predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
_COLUMNS = (
    "optimizer",
    "tokens/s",
    "step, ms",
    "predicted",
    "exposed, ms",
    "predicted",
    "peak GPU, GiB",
    "peak host, GiB",
)
_NONE = "-"


def read(path: Path, command: str) -> Report:
    """Return a file that `bench train` or `bench predict` has written; `command` is which of them.

    Raises:
        ValueError: the file is of another kind; the message says what writes such a one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("benchmark") != command:
        raise ValueError(f"{path} is no file of `offload-adam bench {command} --json {path.name}`")
    return found


def markdown(reports: Sequence[Report], predictions: Sequence[Report] = ()) -> str:
    """Return a heading and a table for each report and batch."""
    lines: list[str] = []
    for report in reports:
        for point in report["points"]:
            lines += [f"### {title(report, point)}", "", *_table(report, point, predictions), ""]
        expected = [one for one in predictions if one["model"] == report["model"]]
        notes = [_conditions_line(report), _source(report), *map(_assumptions, expected)]
        lines += [line for note in notes for line in (note, "")]
    return "\n".join(lines)


def title(report: Report, point: Report) -> str:
    """Return what was trained on what, in one line."""
    model = report["model"]
    return (
        f"{report['device']}: {model['num_parameters'] / 1e9:.3g} B parameters in "
        f"{model['dtype']}, {point['num_sequences']} x {model['sequence_length']} tokens"
    )


def _table(report: Report, point: Report, predictions: Sequence[Report]) -> Iterator[str]:
    yield _line(_COLUMNS)
    yield _line(["---", *["---:"] * (len(_COLUMNS) - 1)])
    for name, row in point["contenders"].items():
        label = LABELS.get(name, name)
        if "reason" in row:
            yield _line([label, row["reason"], *[_NONE] * (len(_COLUMNS) - 2)])
            continue
        yield _line(
            [
                label,
                f"{row['tokens_per_s']:,.0f}",
                _number(row["step_ms"]),
                predicted(predictions, report, point, name, "step_ms"),
                _number(row["exposed_ms"]),
                predicted(predictions, report, point, name, "exposed_ms"),
                _number(row.get("peak_gpu_gib")),
                _number(row.get("peak_host_gib")),
            ]
        )


def predicted(
    predictions: Sequence[Report], report: Report, point: Report, name: str, key: str
) -> str:
    """Return the predicted value of a row, a range where predictions differ, "-" without any.

    A prediction counts if it is of the same model and batch. Predictions differ by the bandwidth of
    host memory that they assume.
    """
    values = [
        expected["contenders"][name][key]
        for prediction in predictions
        if prediction["model"] == report["model"]
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


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _conditions_line(report: Report) -> str:
    said = {True: "yes", False: "no", None: "not told"}
    found = [f"{name}: {said[holds]}" for name, holds in report["reached"].items()]
    return "Conditions: " + ("; ".join(found) or "none could be told") + "."


def _assumptions(prediction: Report) -> str:
    host = dict.fromkeys(f"{point['host_gb_per_s']:g}" for point in prediction["points"])
    return (
        f"Predicted for host memory of {', '.join(host)} GB/s, a bus of "
        f"{prediction['bus_gb_per_s']:g} GB/s, and {prediction['tera_flops']:g} TFLOP/s."
    )


def _source(report: Report) -> str:
    """Return where the numbers are from, and F and U of each batch."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    times = "; ".join(
        f"{point['num_sequences']} sequences: F {_number(point['forward_ms'])} ms, "
        f"U {_number(point['update_ms'])} ms"
        for point in report["points"]
    )
    return (
        f"{machine['date']}, commit {machine['commit']}, {machine['cpu']} with "
        f"{machine['cores_allowed']} cores, Python {machine['python']}, {versions}. {times}."
    )
