"""`python -m tests.bench.tracking`: how closely stored second moments follow the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offload_adam.bench.harness import prepare_machine
from offload_adam.options import StateFormat
from tests.bench.command import run
from tests.support.tracking import PHASES, nearest_store, optimizer_store, path_error, track

BETAS2 = (0.95, 0.99, 0.999)
BF16, CODES = "bf16", "mixed and int8"
NEAREST = "bf16 rounded to nearest, for comparison"
STORES = {
    "fp32": optimizer_store,
    BF16: lambda beta2: optimizer_store(beta2, state_format="bf16"),
    CODES: lambda beta2: optimizer_store(beta2, state_format="mixed"),  # the same codes in int8
    NEAREST: nearest_store,
}
COLORS = {"fp32": "#222222", BF16: "#0072B2", CODES: "#009E73", NEAREST: "#D55E00"}


def measure_tracking(
    num_steps: int = 2500, every: int = 50, picture: str = "", num_threads: int = 0
) -> dict[str, Any]:
    """Measure the error of stored second moments while the gradients fall and rise.

    Args:
        num_steps: steps of each phase.
        every: steps between two samples.
        picture: file for the curves, such as curves.svg; needs matplotlib.
    """
    machine = prepare_machine(0, num_threads)
    samples: dict[str, list[dict[str, Any]]] = {}
    for name, make in STORES.items():
        for beta2 in BETAS2:
            for sample in track(make(beta2), beta2, num_steps=num_steps, every=every):
                error = (sample.ratio - 1).abs().mean()
                samples.setdefault(name, []).append(
                    {
                        "beta2": beta2,
                        "phase": sample.phase,
                        "step": sample.step,
                        "mean": float(sample.ratio.mean()),
                        "spread": float(error),
                        "least": float(sample.ratio.min()),
                    }
                )
    formats: tuple[StateFormat, ...] = ("bf16", "mixed", "int8")
    paths = {
        f"{state_format}, beta2 {beta2}, lr {lr}": path_error(state_format, lr, beta2)
        for state_format in formats
        for beta2 in (0.95, 0.999)
        for lr in (1e-3, 1e-5, 1e-6)
    }
    report = {
        "benchmark": "tracking",
        "num_steps": num_steps,
        "samples": samples,
        "paths": paths,
        "machine": machine,
    }
    if picture:
        draw(report, Path(picture))
    return report


def show(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ratios at the end of each phase, and the differences of paths."""
    yield "Root of the stored second moment over the exact one: mean (mean absolute error)"
    for name, samples in report["samples"].items():
        for beta2 in BETAS2:
            last = {one["phase"]: one for one in samples if one["beta2"] == beta2}
            cells = (
                f"{phase} {last[phase]['mean']:.4f} ({last[phase]['spread']:.2%})"
                for phase in PHASES
            )
            yield f"{name}, beta2 {beta2}: {'; '.join(cells)}"
    yield "Distance of the weights from those with fp32 state after 1,000 steps, over their path"
    for name, error in report["paths"].items():
        yield f"{name}: {error:.2%}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the mean and the error of the ratio over the steps of all phases, for each beta2."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(BETAS2), figsize=(9, 5.5), sharex=True, sharey="row", layout="constrained"
    )
    starts = {phase: number * report["num_steps"] for number, phase in enumerate(PHASES)}
    for column, beta2 in enumerate(BETAS2):
        for name, samples in report["samples"].items():
            shown = [one for one in samples if one["beta2"] == beta2]
            steps = [starts[one["phase"]] + one["step"] for one in shown]
            style = "--" if name == NEAREST else "-"
            for row, key in enumerate(("mean", "spread")):
                values = [one[key] for one in shown]
                axes[row][column].plot(steps, values, style, color=COLORS[name], label=name)
        for axis in axes[:, column]:
            for start in list(starts.values())[1:]:
                axis.axvline(start, color="#BBBBBB", linewidth=0.8)
        axes[0][column].set_title(f"beta2 = {beta2}")
        axes[1][column].set_xlabel("step")
        axes[1][column].set_yscale("log")
    axes[0][0].set_ylabel("mean of stored / exact")
    axes[1][0].set_ylabel("mean absolute error")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(
        "Root of the second moment: gradients fall tenfold at the first line, rise at the second"
    )
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    run(measure_tracking, show)
