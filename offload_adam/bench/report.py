"""Show a report as a table, and write it as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write the report; floats read back exactly."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the table of a report, and below it what was measured on."""
    tables = {"tensors": _tensors_table, "rows": _rows_table, "profile": _profile_table}
    console.print(tables.get(report["benchmark"], _comparison_table)(report))
    for name, reason in report.get("left_out", {}).items():
        console.print(f"left out: {name} ({reason})", highlight=False)
    console.print(_machine_line(report["machine"]), highlight=False)


def _comparison_table(report: Mapping[str, Any]) -> Table:
    limit = report["limit"]
    table = Table(
        title=f"bench {report['benchmark']}: {report['numel']:,} parameters, "
        f"{report['machine']['num_threads']} thread(s), {report['num_pairs']} pairs",
        caption=_caption(report),
    )
    table.add_column("", no_wrap=True)
    for header in ("median ms", "least ms", "GB/s", "bytes", "ratio"):
        table.add_column(header, justify="right")
    table.add_row(
        limit["name"],
        f"{limit['ms_median']:.1f}",
        f"{min(limit['pairs_ms']):.1f}",
        f"{limit['gb_per_s']:.1f}",
        str(limit["bytes_per_param"]),
        f"{report['limit_ratio']:.3f}",
        end_section=True,
    )
    for result in report["results"]:
        table.add_row(
            result["name"],
            f"{result['ms_median']:.1f}",
            f"{result['ms_min']:.1f}",
            f"{result['gb_per_s']:.1f}",
            str(result["bytes_per_param"]),
            f"{result['ratio_to_this']:.3f}",
        )
    return table


def _caption(report: Mapping[str, Any]) -> str:
    lines = [
        "bytes: memory traffic a parameter; "
        "ratio: the row's time / offload_adam's, median over the pairs"
    ]
    lines += [
        f"{result['name']} is {result['variant']}, the faster of two ways"
        for result in report["results"]
        if result["variant"] is not None
    ]
    if "bound" in report:
        bound = report["bound"]
        lines.append(
            f"at the limit's bandwidth this step's bytes take {bound['ms']:.1f} ms, "
            f"{bound['ratio_to_torch_fused']:.2f} of torch_fused's time"
        )
    if "denormal_ratio" in report:
        lines.append(f"denormal moments against normal ones: {report['denormal_ratio']:.3f}")
    return "\n".join(lines)


def _tensors_table(report: Mapping[str, Any]) -> Table:
    many, one = report["shapes"]["many"], report["shapes"]["one"]
    table = Table(
        title=f"bench tensors: {many['num_tensors']:,} of {many['numel']:,} {report['dtype']} "
        f"against one of {one['numel']:,}, {report['machine']['num_threads']} thread(s), "
        f"{report['num_pairs']} pairs",
        caption="ms: backward, step() and zero_grad(), less plain backward; medians",
    )
    table.add_column("")
    for header in ("many, ms", "one, ms", "ratio"):
        table.add_column(header, justify="right")
    for use, found in report["uses"].items():
        table.add_row(
            use, f"{found['many_ms']:.1f}", f"{found['one_ms']:.1f}", f"{found['ratio']:.3f}"
        )
    return table


def _rows_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"bench rows: {report['touched']:,} rows of {report['num_rows']:,} x "
        f"{report['width']:,}, {report['machine']['num_threads']} thread(s), "
        f"{report['num_pairs']} pairs",
        caption="medians; ratio: lazy / dense, over the pairs",
    )
    for header in ("lazy, ms", "dense, ms", "ratio"):
        table.add_column(header, justify="right")
    table.add_row(f"{report['lazy_ms']:.3f}", f"{report['dense_ms']:.1f}", f"{report['ratio']:.5f}")
    return table


def _profile_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"bench profile: steps of {report['numel']:,} parameters, "
        f"{report['machine']['num_threads']} thread(s), {report['num_pairs']} pairs",
        caption="medians; on / off: over the pairs; overhead: what that and sampling memory add",
    )
    headers = (
        "off, ms",
        "on, ms",
        "on / off",
        "sampling",
        "overhead",
        "spans a step",
        "off, ns each",
    )
    for header in headers:
        table.add_column(header, justify="right")
    table.add_row(
        f"{report['off_ms']:.2f}",
        f"{report['on_ms']:.2f}",
        f"{report['ratio']:.4f}",
        f"{report['sampler_share']:.2%}",
        f"{report['overhead']:.2%}",
        f"{report['spans_per_step']:.1f}",
        f"{report['null_span_ns']:.0f}",
    )
    return table


def _machine_line(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load_average"][0]
    return (
        f"{machine['cpu']}, {machine['cores_allowed']} cores allowed, {machine['memory']}; "
        f"{machine['num_threads']} thread(s) on {machine['threading_layer']}; huge pages: "
        f"{machine['transparent_hugepage']}; load {load:.2f} before; {versions}"
    )
