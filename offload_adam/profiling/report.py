"""`report.html`: what a run did with its time and its memory, in one file that opens offline."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_adam.errors import MissingExtraError
from offload_adam.profiling import charts
from offload_adam.profiling.diagnosis import Diagnosis
from offload_adam.profiling.profile import RankProfile
from offload_adam.units import format_nbytes

TOLERANCE = 0.02
"""Measured bytes may differ this much from the predicted ones before the report marks them."""


@dataclass(frozen=True)
class ReportInputs:
    """All that the report draws.

    predicted: bytes by category of the ledger, as planned, for one rank.
    records: the lines of `metrics.jsonl`.
    achieved, limit: GB/s of the update, and those that this machine's memory gives; None if not
        measured.
    """

    title: str
    profiles: Sequence[RankProfile]
    diagnosis: Diagnosis | None
    records: Sequence[Mapping[str, Any]] = ()
    predicted: Mapping[str, int] = field(default_factory=dict)
    achieved: float | None = None
    limit: float | None = None


def write_report(inputs: ReportInputs, path: Path) -> None:
    """Write the report; it loads nothing from anywhere.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.io
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError(
            "report.html needs plotly: pip install 'offload-adam[report]'"
        ) from error
    figures = charts.all_charts(inputs.profiles, inputs.records, inputs.predicted)
    parts = [
        f"<section><h2>{html.escape(chart.title)}</h2><p>{html.escape(chart.caption)}</p>"
        + plotly.io.to_html(
            chart.figure,
            full_html=False,
            include_plotlyjs=False,
            config={"responsive": True, "displaylogo": False},
            div_id=f"chart-{chart.key}",
        )
        + "</section>"
        for chart in figures
    ]
    page = _PAGE.format(
        title=html.escape(inputs.title),
        sentence=html.escape(_sentence(inputs)),
        bandwidth=html.escape(_bandwidth(inputs)),
        table=_bytes_table(inputs),
        charts="\n".join(parts),
        script=get_plotlyjs(),
    )
    path.write_text(page, encoding="utf-8")


def _sentence(inputs: ReportInputs) -> str:
    if inputs.diagnosis is None:
        return "No whole step was recorded."
    return inputs.diagnosis.sentence


def _bandwidth(inputs: ReportInputs) -> str:
    if inputs.achieved is None:
        return ""
    text = f"The update moved {inputs.achieved:.1f} GB/s on rank 0"
    if inputs.limit is None:
        return text + "."
    share = 100.0 * inputs.achieved / inputs.limit
    return f"{text}, {share:.0f}% of the {inputs.limit:.1f} GB/s that this machine gives."


def _bytes_table(inputs: ReportInputs) -> str:
    """Return predicted beside measured bytes, those that differ marked."""
    measured = inputs.profiles[0].peaks if inputs.profiles else {}
    if not inputs.predicted:
        rows = [
            f"<tr><td>{html.escape(k)}</td><td>{_shown(n)}</td></tr>" for k, n in measured.items()
        ]
        return "<tr><th>category</th><th>at the peak</th></tr>" + "".join(rows)
    rows = ["<tr><th>category</th><th>predicted</th><th>at the peak</th><th></th></tr>"]
    for category in dict.fromkeys([*inputs.predicted, *measured]):
        found, planned = measured.get(category), inputs.predicted.get(category)
        differs = found is not None and planned is not None and not _close(found, planned)
        rows.append(
            f"<tr{' class=differs' if differs else ''}><td>{html.escape(category)}</td>"
            f"<td>{_shown(planned)}</td><td>{_shown(found)}</td>"
            f"<td>{'differs by more than 2%' if differs else ''}</td></tr>"
        )
    return "".join(rows)


def _close(found: int, planned: int) -> bool:
    return abs(found - planned) <= TOLERANCE * max(planned, 1)


def _shown(nbytes: int | None) -> str:
    return "" if nbytes is None else html.escape(format_nbytes(nbytes))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark;
  --ink: #1b1f24; --paper: #ffffff; --line: #d5dae0; --mark: #b35900; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ee; --paper: #14171b; --line: #3a424c; --mark: #ffb266; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; padding: 1rem; max-width: 1240px; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-bottom: 0; }}
section {{ border-top: 1px solid var(--line); margin-top: 1.5rem; padding-top: .5rem; }}
.finding {{ font-size: 1.15rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); }}
tr.differs td {{ color: var(--mark); font-weight: 600; }}
</style>
<script>{script}</script>
</head>
<body>
<h1>{title}</h1>
<p class="finding">{sentence}</p>
<p>{bandwidth}</p>
<section><h2>Bytes on rank 0</h2>
<table>{table}</table></section>
{charts}
<script>
// Charts have no background of their own: their ink follows the page's.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function recolor() {{
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  for (const chart of document.querySelectorAll(".plotly-graph-div")) {{
    Plotly.relayout(chart, {{"font.color": ink, "xaxis.gridcolor": line, "yaxis.gridcolor": line,
      "xaxis.zerolinecolor": line, "yaxis.zerolinecolor": line}});
  }}
}}
recolor();
dark.addEventListener("change", recolor);
</script>
</body>
</html>
"""
