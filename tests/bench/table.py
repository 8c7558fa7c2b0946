"""`python -m tests.bench.table`: reports of `bench train` as a Markdown table and as a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload_adam.bench.report import machine_line, table
from offload_adam.bench.training.results import NONE, number, point_heading, point_rows
from tests.bench.conditions import evaluate, reached
from tests.bench.picture import svg

Report = Mapping[str, Any]


def read(path: Path, command: str) -> Report:
    """Return a report.

    Args:
        command: "train", or "predict" for a file of `tests.bench.predict`.

    Raises:
        ValueError: the file cannot be read, or is not a report of this command.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("benchmark") != command:
        raise ValueError(f"{path} is not a report of {command}")
    return found


def markdown(reports: Sequence[Report], predictions: Sequence[Report] = ()) -> str:
    """Return a table for each report and batch with predicted times, conditions and machine."""
    lines: list[str] = []
    for report in reports:
        expected = [one for one in predictions if one["model"] == report["model"]]
        for point in report["points"]:
            lines += [*point_heading(report, point), *_with_predictions(point, expected), ""]
        words = {True: "yes", False: "NO", None: "not known"}
        found = reached([evaluate(point) for point in report["points"]])
        lines += [f"- {name}: {words[holds]}" for name, holds in found.items()]
        lines += ["", machine_line(report["machine"]), ""]
        lines += [line for one in expected for line in (_assumptions(one), "")]
    return "\n".join(lines)


def _with_predictions(point: Report, predictions: Sequence[Report]) -> list[str]:
    """Return the table of a batch, with a column of predictions after each kind of time."""
    header, cells = point_rows(point)
    if predictions:
        for key, column in (("exposed_ms", "exposed, ms"), ("step_ms", "step, ms")):
            place = header.index(column) + 1
            header.insert(place, "predicted")
            for row, (name, measured) in zip(cells, point["contenders"].items(), strict=True):
                has_times = "reason" not in measured
                row.insert(place, _predicted(predictions, point, name, key) if has_times else NONE)
    return table(header, cells)


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
        return NONE
    ends = dict.fromkeys([number(min(values)), number(max(values))])
    return " to ".join(ends)


def _assumptions(prediction: Report) -> str:
    host = dict.fromkeys(f"{point['host_gb_per_s']:g}" for point in prediction["points"])
    return (
        f"Predicted for host memory of {', '.join(host)} GB/s, a bus of "
        f"{prediction['bus_gb_per_s']:g} GB/s, and {prediction['tera_flops']:g} TFLOP/s."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it and the picture."""
    parser = argparse.ArgumentParser(description="Show reports of `bench train`.")
    parser.add_argument("files", nargs="+", type=Path, help="reports of `bench train --json`")
    parser.add_argument(
        "--predictions",
        action="append",
        default=[],
        type=Path,
        help="a file of `tests.bench.predict`; repeat for several",
    )
    parser.add_argument("--markdown", type=Path, help="write the table here, do not print it")
    parser.add_argument("--picture", type=Path, help="draw the step times as bars here, in SVG")
    options = parser.parse_args(arguments)
    try:
        reports = [read(file, "train") for file in options.files]
        text = markdown(reports, [read(file, "predict") for file in options.predictions])
    except ValueError as error:
        parser.error(str(error))
    if options.markdown is None:
        print(text)
    else:
        options.markdown.write_text(text, encoding="utf-8")
    if options.picture is not None:
        options.picture.write_text(svg(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
