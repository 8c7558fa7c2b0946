"""The report's charts, each from plain values to a plotly figure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload_adam.profiling.lateness import LATE, with_late_ranks
from offload_adam.profiling.memory_charts import by_category, of_process, places_of
from offload_adam.profiling.profile import (
    STEP,
    RankProfile,
    inside_steps,
    label_of,
    self_times_ns,
    steps_of,
)
from offload_adam.spans import Span

_OTHER = "#999999"
_SKIPPED = "#D55E00"
# Okabe and Ito's palette, with shades of it.
_PHASE_COLORS = {
    "data": "#E69F00",
    "forward": "#0072B2",
    "backward": "#009E73",
    "loss": "#8BC9B4",
    "pack": "#F2D29B",
    "reduce": "#D55E00",
    "agree": "#F0A875",
    "all-reduce": "#F7CDB0",
    "gather": "#CC79A7",
    "D2H copy": "#C9B400",
    "H2D copy": "#F0E442",
    "norm": "#A9D8F5",
    "update": "#56B4E9",
    "device update": "#86C9EF",
    "checkpoint wait": "#7F6A5A",
    "update wait": "#D8E8F2",
    LATE: "#B2182B",
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
    if profiles and steps_of(profiles[0].spans):
        divided = with_late_ranks(profiles)
        yield _gantt(divided)
        yield _split(divided)
    if profiles and profiles[0].samples:
        yield from _memory(profiles[0], predicted)
    if records:
        yield _loss(records)


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        # Above: below it would lie on the axis's title where it needs several rows.
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {"automargin": True},
        "yaxis": {"automargin": True},
        **more,
    }


def _gantt(profiles: Sequence[RankProfile]) -> Chart:
    """Draw rank 0's step of median length: one row a thread and rank, one bar a span."""
    import plotly.graph_objects as go

    step = _median_step(profiles[0])
    bars: dict[str, list[tuple[str, float, float, str]]] = defaultdict(list)
    for profile in profiles:
        for span in profile.spans:
            if span.name != STEP and span.end_ns > step.start_ns and span.start_ns < step.end_ns:
                row = f"rank {profile.rank} {span.thread}"
                begin_ms = (span.start_ns - step.start_ns) / 1e6
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
            marker={"color": _color_of(name), "line": {"width": 0}},
            customdata=labels,
            hovertemplate="%{customdata}: %{x:.3f} ms from %{base:.3f} ms<extra></extra>",
        )
    # Down the page: rank 0 first, and of each rank the training thread, which begins first.
    order = list(dict.fromkeys(f"rank {p.rank} {s.thread}" for p in profiles for s in p.spans))
    rows_drawn = {row for members in bars.values() for row, *_ in members}
    order = [row for row in order if row in rows_drawn]
    figure.update_layout(_layout(190 + 40 * len(order), barmode="overlay", xaxis_title="ms"))
    figure.update_xaxes(range=[0.0, (step.end_ns - step.start_ns) / 1e6])
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    caption = (
        f"Step {step.bucket}, of median length on rank 0, and what all others did meanwhile; "
        "clocks are aligned to rank 0's. Where it waits for a late rank, the number is that rank's."
    )
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
    figure.update_layout(_layout(190 + 40 * len(split), barmode="stack", xaxis_title="ms a step"))
    figure.update_yaxes(categoryorder="array", categoryarray=list(split)[::-1])
    caption = "Time of the training thread in each phase, what lies within another counted once."
    return Chart("split", "Where a step goes", caption, figure)


def _memory(profile: RankProfile, predicted: Mapping[str, int]) -> Iterator[Chart]:
    """Yield a chart of the ledger for each place, and one of the whole process."""
    for number, place in enumerate(places_of(profile)):
        figure = by_category(profile, predicted, place)
        figure.update_layout(_layout(380))
        key = "memory" if number == 0 else f"memory-{number}"
        title = f"Memory of rank {profile.rank}, {place}"
        caption = "What is known by name, by category; the dashed line is what was planned."
        yield Chart(key, title, caption, figure)
    figure = of_process(profile)
    figure.update_layout(_layout(340))
    caption = "All that is resident in host memory; its own is what no other process shares."
    yield Chart("process", f"Memory of rank {profile.rank}, the whole process", caption, figure)


def _loss(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the loss, with the steps that were skipped."""
    import plotly.graph_objects as go

    steps = [record["step"] for record in records]
    figure = go.Figure()
    figure.add_scatter(x=steps, y=[record["loss"] for record in records], name="loss", mode="lines")
    skipped = [record["step"] for record in records if record["skipped"]]
    if skipped:
        # A skipped step often has no loss: its mark stands at the bottom.
        lowest = min(
            (record["loss"] for record in records if record["loss"] is not None), default=0
        )
        figure.add_scatter(
            x=skipped,
            y=[lowest] * len(skipped),
            name="skipped",
            mode="markers",
            marker={"symbol": "x", "color": _SKIPPED},
        )
    figure.update_layout(_layout(320, xaxis_title="step", yaxis_title="nats"))
    return Chart("loss", "Loss", f"{len(skipped)} of {len(steps)} steps were skipped.", figure)


def _median_step(profile: RankProfile) -> Span:
    """Return a rank's step of median length, the first left out if there are others."""
    steps = steps_of(profile.spans)
    counted = sorted(steps[1:] or steps, key=lambda step: step.end_ns - step.start_ns)
    return counted[(len(counted) - 1) // 2]


def _mean_split_ms(profile: RankProfile) -> dict[str, float]:
    steps = inside_steps(profile.spans)
    totals: Counter[str] = Counter()
    for _, inside in steps:
        for span, own_ns in self_times_ns(inside):
            totals["other" if span.name == STEP else span.name] += own_ns
    return {name: own_ns / 1e6 / len(steps) for name, own_ns in totals.items()}


def _color_of(phase: str) -> str:
    """Return a phase's color, the same in every chart and every report."""
    return _PHASE_COLORS.get(phase, _OTHER)
