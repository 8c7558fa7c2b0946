"""`report.html`: what a run did with its time and its memory, in one file that opens offline."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_adam.errors import MissingExtraError
from offload_adam.profiling import charts
from offload_adam.profiling.diagnosis import Diagnosis, Resource
from offload_adam.profiling.peak import Peak, peaks_of, place_of
from offload_adam.profiling.profile import RankProfile
from offload_adam.units import format_nbytes

TOLERANCE = 0.02
"""Measured bytes may differ this much from the predicted ones before the report marks them."""
_DIFFERS = "differs by more than 2%"


@dataclass(frozen=True)
class ReportInputs:
    """All that the report draws.

    predicted: bytes by category of the ledger, as planned, for one rank.
    records: the lines of `metrics.jsonl`.
    achieved: GB/s of rank 0's updates; limit: its share of what this machine's memory gives. None
        where they are not known.
    buckets: bytes by bucket and category on rank 0.
    planned_ms: what a step was planned to spend on a resource, and where its speed is known from.
    """

    title: str
    profiles: Sequence[RankProfile]
    diagnosis: Diagnosis | None
    records: Sequence[Mapping[str, Any]] = ()
    predicted: Mapping[str, int] = field(default_factory=dict)
    achieved: float | None = None
    limit: float | None = None
    buckets: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    planned_ms: Mapping[Resource, tuple[float, str]] = field(default_factory=dict)

    @property
    def peaks(self) -> list[Peak]:
        """Where most memory was held: on the host, and on a device."""
        return peaks_of(self.profiles)


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
            # A double click resets what a drag has enlarged; the bar would lie on the legend.
            config={"responsive": True, "displayModeBar": False},
            div_id=f"chart-{chart.key}",
        )
        + "</section>"
        for chart in figures
    ]
    page = _PAGE.format(
        title=html.escape(inputs.title),
        sentence=html.escape(_sentence(inputs)),
        notes=_notes(inputs),
        tables=_bytes_tables(inputs) + _buckets(inputs),
        charts="\n".join(parts),
        script=get_plotlyjs(),
    )
    path.write_text(page, encoding="utf-8")


def _sentence(inputs: ReportInputs) -> str:
    if inputs.diagnosis is None:
        return "No whole step was recorded."
    return inputs.diagnosis.sentence


def _notes(inputs: ReportInputs) -> str:
    """Return the further sentences, each a paragraph."""
    sentences = [_bandwidth(inputs), *_times(inputs), _dropped(inputs)]
    sentences += [peak.sentence for peak in inputs.peaks]
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences if sentence)


def _bandwidth(inputs: ReportInputs) -> str:
    if inputs.achieved is None:
        return ""
    text = f"Updates move {inputs.achieved:.1f} GB/s on rank 0"
    if inputs.limit is None:
        return text + "; what the memory gives is not known: offload-adam doctor measures it."
    share = 100.0 * inputs.achieved / inputs.limit
    return (
        f"{text}, {share:.0f}% of the {inputs.limit:.1f} GB/s that are its share of what was "
        "measured of this machine's memory."
    )


def _times(inputs: ReportInputs) -> Iterator[str]:
    """Yield what the training thread spent on each resource that a time was planned for."""
    if inputs.diagnosis is None:
        return
    for resource, (planned_ms, source) in inputs.planned_ms.items():
        found_ms = inputs.diagnosis.shares[resource] * inputs.diagnosis.step_ms
        yield (
            f"The training thread spends {found_ms:.1f} ms of a step on {resource.value}; planned "
            f"were {planned_ms:.1f} ms where nothing hides them, by the speed {source}."
        )


def _dropped(inputs: ReportInputs) -> str:
    """Say of which ranks only the latest spans were kept."""
    ranks = [str(profile.rank) for profile in inputs.profiles if profile.num_dropped]
    if not ranks:
        return ""
    return f"The run was long: only the latest spans of rank(s) {', '.join(ranks)} are in here."


def _bytes_tables(inputs: ReportInputs) -> str:
    """Return one table for each peak: predicted beside measured bytes, those that differ marked."""
    return "\n".join(_bytes_table(inputs, peak) for peak in inputs.peaks)


def _bytes_table(inputs: ReportInputs, peak: Peak) -> str:
    held = inputs.profiles[0].peaks
    title = f"rank {peak.rank}, {peak.where}"
    rows = [
        f"<tr><th>{html.escape(title)}</th><th>at the peak</th><th></th><th>most of it ever</th>"
        "<th>predicted</th><th></th></tr>"
    ]
    planned = {n: size for n, size in inputs.predicted.items() if place_of(n) == peak.where}
    unseen = [name for name in (*held, *planned) if place_of(name) == peak.where]
    for category in dict.fromkeys([*peak.parts, *unseen]):
        found, expected = held.get(category), planned.get(category)
        if not (peak.parts.get(category) or found or expected):
            continue
        differs = expected is not None and found is not None and not _close(found, expected)
        part = peak.parts.get(category, 0)
        cells = [category, format_nbytes(part), f"{part / peak.nbytes:.1%}", _shown(found)]
        cells += [_shown(expected), _DIFFERS if differs else ""]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{' class=differs' if differs else ''}>{row}</tr>")
    total = format_nbytes(peak.nbytes)
    rows.append(f"<tr class=total><td>together</td><td>{total}</td><td></td><td></td></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _buckets(inputs: ReportInputs) -> str:
    """Return a folded table of what lies in each bucket; its bytes are the same all along."""
    if not inputs.buckets:
        return ""
    names = list(dict.fromkeys(name for held in inputs.buckets.values() for name in held))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["bucket", *names])
    rows = [
        f"<tr><td>{number}</td>" + "".join(f"<td>{_shown(held.get(n))}</td>" for n in names)
        for number, held in sorted(inputs.buckets.items())
    ]
    return (
        "<details><summary>By bucket, on rank 0</summary><div class=wide>"
        f"<table><tr>{head}</tr>{'</tr>'.join(rows)}</tr></table></div></details>"
    )


def _close(found: int, planned: int) -> bool:
    return abs(found - planned) <= TOLERANCE * max(planned, 1)


def _shown(nbytes: int | None) -> str:
    return "" if nbytes is None else format_nbytes(nbytes)


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
.wide {{ overflow-x: auto; margin-top: .5rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); }}
td:nth-child(n+2):nth-child(-n+5), th:nth-child(n+2):nth-child(-n+5) {{ text-align: right;
  font-variant-numeric: tabular-nums; }}
td:nth-child(n+2) {{ white-space: nowrap; }}
tr.total td {{ font-weight: 600; }}
tr.differs td {{ color: var(--mark); font-weight: 600; }}
</style>
<script>{script}</script>
</head>
<body>
<h1>{title}</h1>
<p class="finding">{sentence}</p>
{notes}
<section><h2>What used the memory</h2>
{tables}</section>
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
