"""Reads a written report as a browser does: its elements, text, and charts drawn as SVG."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_VOID = {"meta", "link", "br", "hr", "img"}
_ADDRESSES = {"src", "href", "data", "srcset", "action", "poster"}


@dataclass
class Page(HTMLParser):
    """The parsed page. Fails on an element that is not closed in order.

    text: all text outside scripts and styles. specs: of the charts, by key.
    addresses: of everything that the page refers to.
    """

    text: str = ""
    specs: dict[str, Any] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin outside of all elements."""
        super().__init__()
        self._open: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        values = dict(attrs)
        self.addresses += [values[key] or "" for key in values.keys() & _ADDRESSES]
        if values.get("class") == "chart":
            self.charts.append((values["id"] or "").removeprefix("chart-"))
        if tag not in _VOID:
            self._open.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        """Leave the innermost element."""
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        """Take text, code, styles, or the specification of a chart."""
        tag, values = self._open[-1] if self._open else ("", {})
        if tag == "script" and values.get("type") == "application/json":
            self.specs[(values["id"] or "").removeprefix("spec-")] = strict_json(data)
        elif tag in ("script", "style"):
            self.code.append(data)
        else:
            self.text += data


def strict_json(text: str) -> Any:
    """Return the value, as a browser reads it: without NaN and Infinity."""

    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=reject)


def read_page(path: Path) -> Page:
    """Return a page, all of whose elements are closed."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page._open
    return page


def values_of(spec: Any, key: str) -> Iterator[Any]:
    """Yield what stands under a key anywhere in a specification."""
    if isinstance(spec, dict):
        if key in spec:
            yield spec[key]
        for member in spec.values():
            yield from values_of(member, key)
    elif isinstance(spec, list):
        for member in spec:
            yield from values_of(member, key)


def drawn(spec: Any) -> str:
    """Return the chart as SVG, drawn by the library that the page has, 900 pixels wide."""
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg({**spec, "width": 900})
    return svg


def bars(svg: str, color: str) -> int:
    """Return the number of bars of a color."""
    return len(re.findall(rf'aria-roledescription="bar"[^>]*fill="{color}"', svg))
