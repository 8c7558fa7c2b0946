"""`report.html`: where the time and the memory of a run went, in one file that opens offline."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_adam.errors import MissingExtraError
from offload_adam.profiling import charts
from offload_adam.profiling.diagnosis import Diagnosis
from offload_adam.profiling.peak import Peak, peaks_of, place_of
from offload_adam.profiling.phases import Resource
from offload_adam.profiling.profile import RankProfile
from offload_adam.units import format_nbytes

TOLERANCE = 0.02
"""Measured bytes that differ more than this from the predicted ones are marked."""


@dataclass(frozen=True)
class ReportInputs:
    """The content of the report.

    records: the lines of `metrics.jsonl`.
    predicted: bytes by category of the ledger, for one rank.
    achieved: GB/s of rank 0's updates, None if it is not known.
    limit: this rank's share of the memory bandwidth in GB/s, None if it is not known.
    buckets: bytes by bucket and category, on rank 0.
    planned_ms: milliseconds that a step was predicted to spend on a resource, and the source of
        its speed.
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


def write_report(inputs: ReportInputs, path: Path) -> None:
    """Write the report, which loads nothing from the network.

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
    sections = [
        f"<section><h2>{html.escape(chart.title)}</h2><p>{html.escape(chart.caption)}</p>"
        + plotly.io.to_html(
            chart.figure,
            full_html=False,
            include_plotlyjs=False,
            # Without the mode bar, which would cover the legend. A double click resets the zoom.
            config={"responsive": True, "displayModeBar": False},
            div_id=f"chart-{chart.key}",
        )
        + "</section>"
        for chart in charts.all_charts(inputs.profiles, inputs.records, inputs.predicted)
    ]
    diagnosis, peaks = inputs.diagnosis, peaks_of(inputs.profiles)
    page = _PAGE.format(
        title=html.escape(inputs.title),
        sentence=html.escape(diagnosis.sentence if diagnosis else "No whole step was recorded."),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in _notes(inputs, peaks)),
        tables="\n".join(_bytes_table(inputs, peak) for peak in peaks) + _buckets_table(inputs),
        charts="\n".join(sections),
        script=get_plotlyjs(),
    )
    path.write_text(page, encoding="utf-8")


def _notes(inputs: ReportInputs, peaks: Sequence[Peak]) -> Iterator[str]:
    """Yield the paragraphs below the diagnosis."""
    if inputs.achieved is not None:
        text = f"Updates move {inputs.achieved:.1f} GB/s on rank 0"
        if inputs.limit is None:
            yield f"{text}. To measure this machine's memory bandwidth, run offload-adam doctor."
        else:
            yield (
                f"{text}, {inputs.achieved / inputs.limit:.0%} of the {inputs.limit:.1f} GB/s that "
                "is its share of this machine's measured memory bandwidth."
            )
    if inputs.diagnosis is not None:
        for resource, (planned_ms, source) in inputs.planned_ms.items():
            found_ms = inputs.diagnosis.shares[resource] * inputs.diagnosis.step_ms
            yield (
                f"The training thread spends {found_ms:.1f} ms of a step on {resource.value}. The "
                f"plan predicts {planned_ms:.1f} ms without overlap (speed {source})."
            )
    dropped = [str(profile.rank) for profile in inputs.profiles if profile.num_dropped]
    if dropped:
        ranks = ", ".join(dropped)
        yield f"The run was long: this report has only the latest spans of rank(s) {ranks}."
    yield from (peak.sentence for peak in peaks)


def _bytes_table(inputs: ReportInputs, peak: Peak) -> str:
    """Return the table of one peak, with the categories marked that differ from the plan."""
    held = inputs.profiles[0].peaks
    planned = {n: size for n, size in inputs.predicted.items() if place_of(n) == peak.where}
    others = [name for name in (*held, *planned) if place_of(name) == peak.where]
    head = [f"rank {peak.rank}, {peak.where}", "at the peak", "", "maximum", "predicted", ""]
    rows = [_row(head, tag="th")]
    for category in dict.fromkeys([*peak.parts, *others]):
        found, expected = held.get(category), planned.get(category)
        if not (peak.parts.get(category) or found or expected):
            continue
        differs = (
            expected is not None
            and found is not None
            and abs(found - expected) > TOLERANCE * max(expected, 1)
        )
        part = peak.parts.get(category, 0)
        cells = [category, format_nbytes(part), f"{part / peak.nbytes:.1%}"]
        cells += [_shown(found), _shown(expected)]
        mark = f"differs by more than {TOLERANCE:.0%}" if differs else ""
        rows.append(_row([*cells, mark], kind="differs" if differs else ""))
    rows.append(_row(["total", format_nbytes(peak.nbytes), "", ""], kind="total"))
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _buckets_table(inputs: ReportInputs) -> str:
    """Return a folded table of the bytes of each bucket, which are constant over the run."""
    if not inputs.buckets:
        return ""
    names = list(dict.fromkeys(name for held in inputs.buckets.values() for name in held))
    rows = [_row(["bucket", *names], tag="th")]
    for number, held in sorted(inputs.buckets.items()):
        rows.append(_row([str(number), *(_shown(held.get(name)) for name in names)]))
    return (
        "<details><summary>By bucket, on rank 0</summary><div class=wide>"
        f"<table>{''.join(rows)}</table></div></details>"
    )


def _row(cells: Sequence[str], *, tag: str = "td", kind: str = "") -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{f' class={kind}' if kind else ''}>{inner}</tr>"


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
// Charts are transparent: the color of their text and lines follows the page's scheme.
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
