"""Contenders of `bench train` one by one at fixed batches, within a time limit.

    python -m tests.gpu.training REPORT.json --seconds 270

Each contender runs in a process of its own, and the report is written after each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from offload_adam.bench.training import run
from offload_adam.bench.training.contenders import FSDP2, OVERLAPPED, PLAIN, SEQUENTIAL, TORCHAO
from offload_adam.bench.training.measure import Task
from offload_adam.bench.training.model import Sizes

MODEL_ALONE = "model_alone"
NAMES = (OVERLAPPED, PLAIN, MODEL_ALONE, FSDP2, TORCHAO, SEQUENTIAL)
SIZES = Sizes(num_layers=24, width=2048, num_heads=16, vocabulary=32000)
BATCHES = (48, 144)
NUM_STEPS = 3
LEAST_S = 15.0
"""A contender is left out when less time than this remains: its process takes long to start."""


def measure_all(
    report: Path,
    seconds: float,
    *,
    sizes: Sizes = SIZES,
    batches: Sequence[int] = BATCHES,
    num_steps: int = NUM_STEPS,
    names: Sequence[str] = NAMES,
) -> list[dict[str, Any]]:
    """Measure each contender, write the report after each, and return its rows."""
    end_s = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for name in names:
        task = Task(
            contender=None if name == MODEL_ALONE else name,
            sizes=sizes,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batches=tuple(batches),
            num_steps=num_steps,
        )
        started_s = time.monotonic()
        found = _measure_one(task, end_s - started_s)
        rows.append({"name": name, "wall_s": round(time.monotonic() - started_s, 1), **found})
        text = json.dumps({"sizes": asdict(sizes), "found": rows}, indent=1)
        report.write_text(text, encoding="utf-8")
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _measure_one(task: Task, left_s: float) -> dict[str, Any]:
    """Return what a process found, or `error` or `left_out` with the reason."""
    if left_s < LEAST_S:
        return {"left_out": "no time is left"}
    with mock.patch.object(run, "PROCESS_TIMEOUT_S", left_s):
        try:
            return asdict(run.in_own_process(task))
        except run.TrainBenchmarkError as error:
            return {"error": str(error)}


def main() -> None:
    """Measure all; fail where a contender raised an error or had no time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    rows = measure_all(given.report, given.seconds)
    if any("error" in row or "left_out" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
