"""`report.html`: where the time and the memory of a run went, in one file that opens offline."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_adam.errors import MissingExtraError
from offload_adam.integrations.missing import how_to_install
from offload_adam.printable import printable
from offload_adam.profiling.charts import Chart
from offload_adam.profiling.curves import loss, memory, readable
from offload_adam.profiling.diagnosis import Diagnosis
from offload_adam.profiling.glossary import GLOSSARY
from offload_adam.profiling.lateness import with_late_ranks
from offload_adam.profiling.peak import Peak, peaks_of, place_of
from offload_adam.profiling.phases import COLORS, Resource
from offload_adam.profiling.profile import RankProfile, steps_of
from offload_adam.profiling.timelines import gantt, split
from offload_adam.units import format_nbytes

MAX_BUCKETS = 500
"""Rows of the table of buckets, to keep the file small."""
TOLERANCE = 0.02
"""Measured bytes that differ more than this from the predicted ones are marked."""


@dataclass(frozen=True)
class ReportInputs:
    """The content of the report.

    records: the lines of `metrics.jsonl`. Damaged ones are skipped.
    profiles: of all ranks, by rank.
    predicted: bytes by category of rank 0's ledger; they are the same for each rank.
    update_gb_per_s: bandwidth of rank 0's updates, None if it is not known.
    memory_gb_per_s: rank 0's share of the memory bandwidth, None if it is not known.
    buckets: bytes by bucket and category, on rank 0.
    planned_ms: milliseconds that a step was predicted to spend on a resource, and the source of
        its speed.
    environment: where and how the report was made, by name.
    """

    title: str
    profiles: Sequence[RankProfile]
    diagnosis: Diagnosis | None
    records: Sequence[Mapping[str, Any]] = ()
    predicted: Mapping[str, int] = field(default_factory=dict)
    update_gb_per_s: float | None = None
    memory_gb_per_s: float | None = None
    buckets: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    planned_ms: Mapping[Resource, tuple[float, str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def write_report(inputs: ReportInputs, path: Path) -> None:
    """Write the report, which loads nothing from the network.

    Raises:
        MissingExtraError: vl-convert-python, which has Vega-Lite, is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError(
            f"report.html needs vl-convert-python: {how_to_install('report')}"
        ) from error
    sections = [
        f"<h2>{_escaped(chart.title)}</h2><p>{_escaped(chart.caption)}</p>"
        f'<div class="chart" id="chart-{chart.key}"></div>'
        f'<script type="application/json" id="spec-{chart.key}">{_json(chart.spec)}</script>'
        for chart in _charts(inputs)
    ]
    diagnosis, peaks = inputs.diagnosis, peaks_of(inputs.profiles)
    page = _PAGE.format(
        title=_escaped(inputs.title),
        sentence=_escaped(diagnosis.sentence if diagnosis else "No whole step was recorded."),
        notes="\n".join(f"<p>{_escaped(note)}</p>" for note in _notes(inputs, peaks)),
        tables="\n".join(_bytes_table(inputs, peak) for peak in peaks) or "<p>Not sampled.</p>",
        buckets=_buckets_table(inputs.buckets),
        charts="\n".join(sections),
        glossary=_definitions(GLOSSARY),
        environment=_definitions(inputs.environment),
        script=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
    )
    path.write_text(page, encoding="utf-8")


def _charts(inputs: ReportInputs) -> Iterator[Chart]:
    """Yield the charts for which there is data."""
    profiles = inputs.profiles
    if profiles and steps_of(profiles[0].spans):
        divided = with_late_ranks(profiles)
        yield gantt(divided)
        yield split(divided)
    if profiles and profiles[0].samples:
        yield from memory(profiles[0], inputs.predicted)
    if records := readable(inputs.records):
        yield loss(records)


def _json(spec: Mapping[str, Any]) -> str:
    """Return JSON that may stand in a script element: `</script>` in a name cannot end it."""
    return json.dumps(spec, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _escaped(text: str) -> str:
    """Return text for the page, also of bytes that are no UTF-8, such as those of a file's name."""
    return html.escape(printable(text))


def _definitions(meanings: Mapping[str, str]) -> str:
    """Return a list of names with their meanings, phases with their color."""
    items = []
    for name, meaning in meanings.items():
        color = f' style="border-color: {COLORS[name]}"' if name in COLORS else ""
        items.append(f"<dt{color}>{_escaped(name)}</dt><dd>{_escaped(meaning)}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _notes(inputs: ReportInputs, peaks: Sequence[Peak]) -> Iterator[str]:
    """Yield the paragraphs below the diagnosis."""
    measured, share = inputs.update_gb_per_s, inputs.memory_gb_per_s
    if measured is not None:
        text = f"Updates move {measured:.1f} GB/s on rank 0"
        if share is None:
            yield f"{text}. To measure this machine's memory bandwidth, run offload-adam doctor."
        elif measured > share:
            yield (
                f"{text}, more than the {share:.1f} GB/s measured as this rank's share of "
                "the machine's memory bandwidth: the machine was busy then, or the state fits into "
                "the caches. Run offload-adam doctor again on an idle machine."
            )
        else:
            yield (
                f"{text}, {measured / share:.0%} of the {share:.1f} GB/s that are this rank's "
                "share of the machine's measured memory bandwidth."
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
    held = inputs.profiles[peak.rank].peaks
    # Predicted for rank 0's device: each rank names its own.
    planned = {
        name.replace(place_of(name), peak.where): nbytes
        for name, nbytes in inputs.predicted.items()
        if (place_of(name) == "host") == (peak.where == "host")
    }
    others = [name for name in (*held, *planned) if place_of(name) == peak.where]
    rows = [[f"rank {peak.rank}, {peak.where}", "at the peak", "", "maximum", "predicted", ""]]
    for category in dict.fromkeys([*peak.parts, *others]):
        part, found, expected = (
            peak.parts.get(category, 0),
            held.get(category),
            planned.get(category),
        )
        if not (part or found or expected):
            continue
        differs = (
            found is not None
            and expected is not None
            and abs(found - expected) > TOLERANCE * max(expected, 1)
        )
        mark = f"differs by more than {TOLERANCE:.0%}" if differs else ""
        cells = [category, format_nbytes(part), f"{part / peak.nbytes:.1%}"]
        rows.append([*cells, _shown(found), _shown(expected), mark])
    return _table([*rows, ["total", format_nbytes(peak.nbytes)]])


def _buckets_table(buckets: Mapping[int, Mapping[str, int]]) -> str:
    """Return the table of the bytes of each bucket, which are constant over the run."""
    names = list(dict.fromkeys(name for held in buckets.values() for name in held))
    largest = sorted(buckets, key=lambda n: (-sum(buckets[n].values()), n))[:MAX_BUCKETS]
    rows = [[str(n), *(_shown(buckets[n].get(name)) for name in names)] for n in sorted(largest)]
    num_left_out = len(buckets) - len(rows)
    note = f"<p>The {num_left_out:,} smallest buckets are left out.</p>" if num_left_out else ""
    return _table([["bucket", *names], *rows]) + note


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


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
body {{ font: 16px/1.5 system-ui, sans-serif; margin: auto; padding: 1rem; max-width: 1240px; }}
body {{ color: #222; background: #fff; }}
table {{ border-collapse: collapse; margin-top: .5rem; }}
td {{ padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #d5dae0; white-space: nowrap; }}
tr:first-child {{ font-weight: 600; }}
td:nth-child(n+2):nth-child(-n+5) {{ text-align: right; }}
.chart {{ width: 100%; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }}
dt {{ border-left: 1rem solid transparent; padding-left: .5rem; font-weight: 600; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
</style>
<script>{script}</script>
</head>
<body>
<h1>{title}</h1>
<p><b>{sentence}</b></p>
{notes}
<h2>What used the memory</h2>
{tables}
<details><summary>By bucket, on rank 0</summary>{buckets}</details>
<p>In the charts below, rest the pointer on a mark to read its values, and click a name in the
legend to see it alone. Ctrl and the mouse wheel zoom, dragging moves, and a double click resets.
</p>
{charts}
<details><summary>What the names mean</summary>{glossary}</details>
<h2>How this report was made</h2>
{environment}
<script>
for (const chart of document.querySelectorAll(".chart")) {{
  const spec = JSON.parse(document.getElementById(chart.id.replace("chart", "spec")).textContent);
  vegaEmbed(chart, spec, {{ actions: false, renderer: "svg" }});
}}
</script>
</body>
</html>
"""
