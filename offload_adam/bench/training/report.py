"""A report of `bench train` for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a report as lines of text."""
    model = report["model"]
    yield f"{report['device']}: {model['num_parameters']:,} parameters, {model['dtype']}"
    for point in report["points"]:
        yield (
            f"F/U {point['ratio']:.2f} ({point['num_sequences']} sequences): F "
            f"{point['forward_ms']:.1f} ms, U {point['update_ms']:.1f}, b {point['bucket_ms']:.2f}"
        )
        for name, found in point["contenders"].items():
            peak = found["peak_gpu_gib"]
            on_gpu = "" if peak is None else f", GPU {peak:.2f} GiB"
            yield (
                f"  {name:<26} step {found['step_ms']:9.1f} ms, exposed {found['exposed_ms']:9.1f}"
                f"{on_gpu}, host {found['host_gib']:.2f} GiB"
            )
    for name, holds in report["reached"].items():
        said = {True: "yes", False: "NO", None: "not told"}[holds]
        yield f"{said:<9}{name}"
    for name, reason in report["left_out"].items():
        yield f"left out: {name} ({reason})"
