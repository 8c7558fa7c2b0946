"""What the charts of the report share: each is a Vega-Lite specification of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Spec = dict[str, Any]
INK = "#222222"

_CONFIG: Spec = {
    "font": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "axis": {"labelFontSize": 13, "titleFontSize": 13, "titlePadding": 8, "labelLimit": 260}
    | {"titleFontWeight": "normal", "titleColor": INK, "labelColor": INK, "tickCount": 10},
    "legend": {
        "orient": "top",
        "direction": "horizontal",
        "labelFontSize": 13,
        "labelLimit": 240,
        "symbolType": "square",
        "symbolSize": 160,
        "title": None,
        "labelColor": INK,
        "layout": {"top": {"direction": "vertical", "anchor": "start"}},
    },
    "view": {"stroke": None},
}
# Ctrl and the wheel, which a pinch on a touchpad is too: the wheel alone scrolls the page.
ZOOM = {
    "name": "zoom",
    "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.ctrlKey]"},
    "bind": "scales",
}


class Chart(NamedTuple):
    """A Vega-Lite specification with its title, and a caption that says how to read it."""

    key: str
    title: str
    caption: str
    spec: Spec


def spec(title: str, layers: Sequence[Spec], height: int, **rest: Any) -> Spec:
    """Return a chart of layers, `height` pixels high and as wide as the page.

    Args:
        title: read out by screen readers; the page has it as a heading.
    """
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": list(layers),
        "config": _CONFIG,
        **rest,
    }


def number(field: str, title: str, **scale: Any) -> Spec:
    """Return the encoding of a number, on an axis whose title has its unit."""
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def colored(colors: Mapping[str, str], **rest: Any) -> Spec:
    """Return the encoding that colors marks by name, and lists the names in a legend."""
    scale = {"domain": list(colors), "range": list(colors.values())}
    # Vega does not wrap a legend by itself: at most 6 columns on a page 1000 pixels wide.
    columns = min(6, max(1, 1000 // (60 + 8 * max(map(len, colors)))))
    legend = {"columns": columns}
    return {"type": "nominal", "scale": scale, "title": None, "legend": legend, **rest}


def chosen_in_legend(field: str) -> tuple[Spec, Spec]:
    """Return a selection by clicks on the legend, and the opacity that shows it."""
    select = {"type": "point", "fields": [field]}
    opacity = {"condition": {"param": "chosen", "value": 1.0}, "value": 0.12}
    return {"name": "chosen", "select": select, "bind": "legend"}, opacity
