"""The report's charts, each from plain values to a plotly figure."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from offload_adam.observe.spans import Span
from offload_adam.profiling.profile import (
    STEP,
    RankProfile,
    label_of,
    self_times_ns,
    steps_of,
)

# Okabe and Ito's palette: told apart by those who do not see all colours, on light and on dark.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")


_OTHER = "#999999"
_PHASE_COLORS = {
    "data": "#E69F00",
    "forward": "#0072B2",
    "backward": "#009E73",
    "loss": "#8BC9B4",
    "pack": "#F2D29B",
    "reduce": "#D55E00",
    "agree": "#F0A875",
    "gather": "#CC79A7",
    "copy down": "#C9B400",
    "copy up": "#F0E442",
    "norm": "#A9D8F5",
    "update": "#56B4E9",
}
"""What waits for one resource has shades of one color."""


@dataclass(frozen=True)
class Chart:
    """One figure with what a reader should look for in it."""

    key: str
    title: str
    caption: str
    figure: Any


def all_charts(
    profiles: Sequence[RankProfile],
    records: Sequence[Mapping[str, Any]],
    predicted: Mapping[str, int],
) -> Iterator[Chart]:
    """Yield the charts that there are values for."""
    if any(steps_of(profile.spans) for profile in profiles):
        yield _gantt(profiles)
        yield _split(profiles)
    if any(profile.samples for profile in profiles):
        yield _memory(profiles[0], predicted)
    if records:
        yield _loss(records)


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 30, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": -0.25, "traceorder": "normal"},
        "xaxis": {"automargin": True},
        "yaxis": {"automargin": True},
        **more,
    }


def _gantt(profiles: Sequence[RankProfile]) -> Chart:
    """Draw the step of median length: one row a thread and rank, one bar a span."""
    import plotly.graph_objects as go

    number = _median_step(profiles[0])
    bars: dict[str, list[tuple[str, float, float, str]]] = defaultdict(list)
    first = steps_of(profiles[0].spans)[number]
    for profile in profiles:
        steps = steps_of(profile.spans)
        if number >= len(steps):
            continue
        start_ns, end_ns = steps[number].start_ns, steps[number].end_ns
        for span in profile.spans:
            if span.name != STEP and span.end_ns > start_ns and span.start_ns < end_ns:
                row = f"rank {profile.rank} {span.thread}"
                begin_ms = (span.start_ns - first.start_ns) / 1e6
                bars[span.name].append(
                    (row, begin_ms, (span.end_ns - span.start_ns) / 1e6, label_of(span))
                )
    figure = go.Figure()
    for name, members in bars.items():
        rows, begins, lengths, labels = zip(*members, strict=True)
        figure.add_bar(
            orientation="h",
            y=rows,
            base=begins,
            x=lengths,
            name=name,
            marker_color=_color_of(name),
            customdata=labels,
            hovertemplate="%{customdata}: %{x:.3f} ms from %{base:.3f} ms<extra></extra>",
        )
    num_rows = len({row for members in bars.values() for row, *_ in members})
    figure.update_layout(_layout(160 + 40 * num_rows, barmode="overlay", xaxis_title="ms"))
    caption = f"Step {number + 1}, of median length on rank 0; clocks are aligned to rank 0's."
    return Chart("gantt", "One step on every rank and thread", caption, figure)


def _split(profiles: Sequence[RankProfile]) -> Chart:
    """Stack the mean milliseconds a step of each phase, for each rank."""
    import plotly.graph_objects as go

    split = {f"rank {profile.rank}": _mean_split_ms(profile) for profile in profiles}
    names = list(dict.fromkeys(name for times in split.values() for name in times))
    figure = go.Figure()
    for name in names:
        times = [ranks.get(name, 0.0) for ranks in split.values()]
        color = _color_of(name)
        figure.add_bar(orientation="h", y=list(split), x=times, name=name, marker_color=color)
    figure.update_layout(_layout(160 + 40 * len(split), barmode="stack", xaxis_title="ms a step"))
    caption = "Time of the training thread in each phase, what lies within another counted once."
    return Chart("split", "Where a step goes", caption, figure)


def _memory(profile: RankProfile, predicted: Mapping[str, int]) -> Chart:
    """Stack the ledger's bytes over time, the resident set and the prediction as lines."""
    import plotly.graph_objects as go

    samples = profile.samples
    origin_ns = samples[0]["time_ns"]
    times = [(sample["time_ns"] - origin_ns) / 1e9 for sample in samples]
    figure = go.Figure()
    categories = dict.fromkeys(name for sample in samples for name in sample["ledger"])
    for color, name in zip(cycle(_COLORS), categories, strict=False):
        gib = [sample["ledger"].get(name, 0) / 2**30 for sample in samples]
        figure.add_scatter(
            x=times, y=gib, name=name, stackgroup="ledger", mode="lines", line_color=color
        )
    rss = [sample["rss"] / 2**30 for sample in samples]
    figure.add_scatter(x=times, y=rss, name="resident", mode="lines", line_dash="dot")
    if predicted:
        total = sum(predicted.values()) / 2**30
        ends = [times[0], times[-1]]
        figure.add_scatter(
            x=ends, y=[total, total], name="predicted", mode="lines", line_dash="dash"
        )
    figure.update_layout(_layout(380, xaxis_title="seconds", yaxis_title="GiB"))
    caption = "Bytes that the optimizer holds, by category; resident is the whole process."
    return Chart("memory", "Memory of rank 0", caption, figure)


def _loss(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the loss, with the steps that were skipped."""
    import plotly.graph_objects as go

    steps = [record["step"] for record in records]
    figure = go.Figure()
    figure.add_scatter(x=steps, y=[record["loss"] for record in records], name="loss", mode="lines")
    skipped = [record["step"] for record in records if record["skipped"]]
    if skipped:
        figure.add_scatter(
            x=skipped,
            y=[0.0] * len(skipped),
            name="skipped",
            mode="markers",
            marker={"symbol": "x", "color": _COLORS[3]},
        )
    figure.update_layout(_layout(320, xaxis_title="step", yaxis_title="nats"))
    return Chart("loss", "Loss", f"{len(skipped)} of {len(steps)} steps were skipped.", figure)


def _median_step(profile: RankProfile) -> int:
    """Return which step of a rank has the median length, the first left out if there are others."""
    lengths = [step.end_ns - step.start_ns for step in steps_of(profile.spans)]
    counted = lengths[1:] or lengths
    return lengths.index(statistics.median_low(counted), len(lengths) - len(counted))


def _mean_split_ms(profile: RankProfile) -> dict[str, float]:
    steps = steps_of(profile.spans)
    steps = steps[1:] or steps
    inside = [span for step in steps for span in _within(profile.spans, step)]
    totals: Counter[str] = Counter()
    for span, own_ns in self_times_ns(inside):
        totals["other" if span.name == STEP else span.name] += own_ns
    return {name: own_ns / 1e6 / len(steps) for name, own_ns in totals.items()}


def _within(spans: Sequence[Span], step: Span) -> Iterator[Span]:
    for span in spans:
        same = span.thread == step.thread
        if same and step.start_ns <= span.start_ns and span.end_ns <= step.end_ns:
            yield span


def _color_of(phase: str) -> str:
    """Return a phase's color, the same in every chart and every report."""
    return _PHASE_COLORS.get(phase, _OTHER)
