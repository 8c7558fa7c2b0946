"""`python -m tests.bench.convergence`: the validation loss of runs with each state format.

Runs with the same seed have the same initial weights and data. Any difference of a bit makes two
runs diverge. So differences between formats are compared with two others: those between seeds, and
those between runs with fp32 state whose `eps` differs by 1%, which should not matter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

from offload_adam.bench.harness import prepare_machine
from tests.bench.command import run

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODELS = {
    "quickstart": [],
    "10m": [
        "--model.sizes.num_layers=6",
        "--model.sizes.width=384",
        "--model.sizes.num_heads=6",
        "--train.num_steps=1000",
        "--train.batch_size=4",
        "--optimizer.lr=1e-3",
    ],
}
"""Changes to configs/quickstart.yaml, by model. `10m` has 10.6 million parameters."""

KINDS = {
    "fp32": [],
    "bf16": ["--optimizer.state_format=bf16"],
    "mixed": ["--optimizer.state_format=mixed"],
    "int8": ["--optimizer.state_format=int8"],
    "fp32, eps 1% larger": ["--optimizer.eps=1.01e-8"],
}
COLORS = dict(zip(KINDS, ("#222222", "#0072B2", "#009E73", "#CC79A7", "#D55E00"), strict=True))


def measure_convergence(
    model: str = "quickstart", num_seeds: int = 3, picture: str = "", num_threads: int = 0
) -> dict[str, Any]:
    """Train a model in bf16 with each kind of state and seed.

    Args:
        model: one of `MODELS`.
        num_seeds: number of seeds, which are 0, 1 and so on.
        picture: file for the curves, such as curves.svg; needs matplotlib.
    """
    losses: dict[str, list[dict[int, float]]] = {}
    machine = prepare_machine(0, num_threads)
    with TemporaryDirectory() as folder:
        for seed in range(num_seeds):
            for kind in KINDS:
                losses.setdefault(kind, []).append(_train(model, kind, seed, Path(folder)))
    report = {"benchmark": "convergence", "model": model, "losses": losses, "machine": machine}
    if picture:
        draw(report, Path(picture))
    return report


def _train(model: str, kind: str, seed: int, folder: Path) -> dict[int, float]:
    """Return the validation losses of a run, by step."""
    name = f"run-{list(KINDS).index(kind)}-{seed}"
    options = {
        "run.dir": folder,
        "run.name": name,
        "run.seed": seed,
        "train.dtype": "bf16",
        "train.eval_every": 50,
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "offload_adam", "train", str(CONFIG), *MODELS[model]),
            *(f"--{key}={value}" for key, value in options.items()),
            *KINDS[kind],
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {one["step"]: one["val_loss"] for one in records if "val_loss" in one}


def show(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the last validation loss of each run, and how formats and seeds differ."""
    last = {
        kind: [curve[max(curve, key=int)] for curve in curves]
        for kind, curves in report["losses"].items()
    }
    for kind, values in last.items():
        differences = [one - other for one, other in zip(values, last["fp32"], strict=True)]
        yield (
            f"{report['model']}, {kind}: {', '.join(f'{value:.4f}' for value in values)}; "
            f"difference from fp32 {', '.join(f'{value:+.4f}' for value in differences)}, "
            f"mean {mean(differences):+.4f}"
        )
    yield f"standard deviation over the seeds, in fp32: {stdev(last['fp32']):.4f}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the validation losses over the steps: a color for each kind, a line for each seed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for kind, curves in report["losses"].items():
        for number, curve in enumerate(curves):
            steps = [int(step) for step in curve]
            label = None if number else kind
            axes.plot(steps, curve.values(), color=COLORS[kind], label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_title(f"{report['model']}: {len(curves)} seeds, each with the same data")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    run(measure_convergence, show)
