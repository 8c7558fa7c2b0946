"""Draw the step times of `bench train` as bars, in SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from offload_adam.bench.training.contenders import LABELS
from offload_adam.bench.training.results import title

WIDTH, LABEL_WIDTH, BAR_WIDTH = 920, 310, 420
ROW, BAR, HEAD, LEGEND = 26, 18, 40, 34
MODEL_COLOR, EXPOSED_COLOR, TEXT_COLOR = "#BBBBBB", "#D55E00", "#222222"


def svg(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return one group of bars for each report and batch.

    A bar is a training step: forward and backward alone, then the exposed time of the optimizer.
    """
    parts: list[str] = []
    y = LEGEND
    for report in reports:
        for point in report["points"]:
            parts += _group(report, point, y)
            y += HEAD + ROW * len(point["contenders"])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" '
        f'viewBox="0 0 {WIDTH} {y + 10}" font-family="sans-serif" font-size="13" '
        f'fill="{TEXT_COLOR}">'
    )
    background = f'<rect width="{WIDTH}" height="{y + 10}" fill="white"/>'
    return "\n".join([head, background, *_legend(), *parts, "</svg>"]) + "\n"


def _legend() -> Iterator[str]:
    entries = ((MODEL_COLOR, "forward and backward alone"), (EXPOSED_COLOR, "exposed optimizer"))
    for number, (color, text) in enumerate(entries):
        x = LABEL_WIDTH + number * 220
        yield f'<rect x="{x}" y="10" width="14" height="14" fill="{color}"/>'
        yield _text(x + 20, 22, text)


def _group(report: Mapping[str, Any], point: Mapping[str, Any], top: int) -> Iterator[str]:
    """Yield the bars of one batch; the longest has the full width."""
    rows = point["contenders"]
    longest_ms = max((row["step_ms"] for row in rows.values() if "step_ms" in row), default=1.0)
    yield _text(10, top + 24, title(report, point), weight="bold")
    for number, (name, row) in enumerate(rows.items()):
        y = top + HEAD + number * ROW
        yield _text(LABEL_WIDTH - 8, y + 14, LABELS.get(name, name), anchor="end")
        if "reason" in row:
            yield _text(LABEL_WIDTH, y + 14, row["reason"], style="italic")
            continue
        scale = BAR_WIDTH / longest_ms
        # Noise can make a small exposed time negative.
        exposed_ms = max(0.0, row["exposed_ms"] or 0.0)
        model = (row["step_ms"] - exposed_ms) * scale
        yield _bar(LABEL_WIDTH, y, model, MODEL_COLOR)
        yield _bar(LABEL_WIDTH + model, y, exposed_ms * scale, EXPOSED_COLOR)
        value = f"{row['step_ms']:,.0f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        yield _text(LABEL_WIDTH + row["step_ms"] * scale + 6, y + 14, value)


def _bar(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>'


def _text(x: float, y: float, text: str, **attributes: str) -> str:
    names = {"anchor": "text-anchor", "weight": "font-weight", "style": "font-style"}
    given = "".join(f' {names[key]}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y}"{given}>{escape(text)}</text>'
