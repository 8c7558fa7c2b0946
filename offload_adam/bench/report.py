"""Show a report as a Markdown table, which is readable in a terminal too, and write it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDEST = 17
"""Longer cells after the first column, such as error messages, do not widen their column. The
longest short reason, "out of GPU memory", still does."""


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write the report through a temporary file: a killed process leaves the previous file."""
    partial = partial_path(path)
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """Return the path of the temporary file of `write_json`."""
    return path.with_name(path.name + ".part")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, the first column aligned left and the others right."""
    cells = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)
    ]
    widths = [
        max(len(cell) for cell in column if number == 0 or len(cell) <= _WIDEST)
        for number, column in enumerate(zip(*cells, strict=True))
    ]
    lines = []
    for first, *others in cells:
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


def comparison(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report of `bench kernel`, `bench step` or `bench fsdp2` as lines of text."""
    ranks = (
        f" of {report['dtype']} on {report['num_ranks']} rank(s)" if "num_ranks" in report else ""
    )
    yield from heading(report, f"{report['numel']:,} parameters{ranks}")
    yield from comparison_table(report["results"])
    for result in report["results"]:
        if (meaning := report["definitions"].get(result["name"])) is not None:
            yield f"{result['name']}: {meaning}."
    yield ""
    for name, rate in report.get("updates_per_s_and_core", {}).items():
        threads = report["machine"]["num_threads"]
        floor_ms = report["numel"] / rate / threads * 1e3
        yield (
            f"{name}: one core updates {rate / 1e9:.2f} G parameters/s in its cache, so "
            f"{threads} core(s) need at least {floor_ms:.1f} ms for the arithmetic of the update."
        )
    for name, reason in report["left_out"].items():
        yield f"Left out: {name} ({reason})."
    yield machine_line(report["machine"])


def comparison_table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield results as a table, and what its columns mean."""
    header = ("contender", "median, ms", "least, ms", "GB/s", "bytes", "ratio")
    rows = [
        (
            result["name"],
            f"{result['ms_median']:.1f}",
            f"{result['ms_min']:.1f}",
            f"{result['gb_per_s']:.1f}",
            f"{result['bytes_per_param']:.4g}",
            f"{result['ratio_to_this']:.3f}",
        )
        for result in results
    ]
    yield from table(header, rows)
    yield ""
    yield "bytes: memory traffic per parameter. ratio: the row's time / offload_adam's, median."
    for result in results:
        if result["variant"] is not None:
            yield f"{result['name']} is {result['variant']}, the fastest of its variants."


def heading(report: Mapping[str, Any], subject: str) -> Iterator[str]:
    """Yield what was measured, on how many threads and in how many rounds."""
    yield (
        f"bench {report['benchmark']}: {subject}, {report['machine']['num_threads']} thread(s), "
        f"{report['num_pairs']} rounds"
    )
    yield ""


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return the machine of a report in one line."""
    commit = f"commit {machine['commit']}, " if machine["commit"] else ""  # none in a wheel
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}, {commit}{machine['cpu']} with {machine['cores_allowed']} cores and "
        f"{machine['memory']}, {machine['num_threads']} thread(s) on {machine['threading_layer']}, "
        f"huge pages: {machine['transparent_hugepage'] or 'none'}, load "
        f"{machine['load_average'][0]:.2f} before, Python {machine['python']}, {versions}."
    )
