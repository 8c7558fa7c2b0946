"""Write a report of `bench train`, and show it as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as JSON. A process that is killed meanwhile leaves the file as it was."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a report as lines of text."""
    model = report["model"]
    yield f"{report['device']}: {model['num_parameters']:,} parameters, {model['dtype']}"
    for point in report["points"]:
        ratio, bucket_ms = _number(point["ratio"], 2), _number(point["bucket_ms"], 2)
        yield (
            f"F/U {ratio} ({point['num_sequences']} sequences): F "
            f"{_number(point['forward_ms'])} ms, U {_number(point['update_ms'])}, b {bucket_ms}"
        )
        for name, row in point["contenders"].items():
            yield f"  {name:<26} {_described(row)}"
    for name, holds in report["reached"].items():
        said = {True: "yes", False: "NO", None: "not told"}[holds]
        yield f"{said:<9}{name}"


def _described(row: Mapping[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    text = f"step {row['step_ms']:9.1f} ms, exposed {_number(row['exposed_ms']):>9}"
    for place in ("gpu", "host"):
        gib = row.get(f"peak_{place}_gib")
        text += "" if gib is None else f", {place} {gib:.2f} GiB"
    return text


def _number(value: float | None, digits: int = 1) -> str:
    """Return a number, or a word for one that is not known."""
    return "unknown" if value is None else f"{value:.{digits}f}"
