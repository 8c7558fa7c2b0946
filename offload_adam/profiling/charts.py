"""The charts of the report, each a plotly figure of plain values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from offload_adam.layout.budget import Category
from offload_adam.profiling.lateness import with_late_ranks
from offload_adam.profiling.peak import REST, place_of
from offload_adam.profiling.phases import PHASES, STEP
from offload_adam.profiling.profile import (
    RankProfile,
    inside_steps,
    label_of,
    self_times_ns,
    steps_of,
)

_OTHER = "#999999"
_PREDICTED = "#E0245E"
_SKIPPED = "#D55E00"
_LEDGER = "parameters, gradients and optimizer"
# Okabe and Ito's palette: color-blind readers can tell these apart, on light and on dark.
_CATEGORY_COLORS = {
    Category.PARAMETERS: "#0072B2",
    Category.GRADIENTS: "#56B4E9",
    Category.GRADIENT_SHARDS: "#009E73",
    Category.SLOTS: "#E69F00",
    "master_weight": "#D55E00",
    "exp_avg": "#CC79A7",
    "exp_avg_sq": "#9467BD",
    "max_exp_avg_sq": "#8C564B",
    Category.STAGING: "#F0E442",
    Category.PREPARED: "#C9B400",
    Category.SNAPSHOT_BUFFER: "#A6D854",
    _LEDGER: "#0072B2",
}


class Chart(NamedTuple):
    """A plotly figure with its title, and a caption that says how to read it."""

    key: str
    title: str
    caption: str
    figure: Any


def all_charts(
    profiles: Sequence[RankProfile],
    records: Sequence[Mapping[str, Any]],
    predicted: Mapping[str, int],
) -> Iterator[Chart]:
    """Yield the charts for which there is data.

    Args:
        profiles: of all ranks, by rank.
        records: the lines of `metrics.jsonl`.
        predicted: bytes by category of the ledger.
    """
    if profiles and steps_of(profiles[0].spans):
        divided = with_late_ranks(profiles)
        yield _gantt(divided)
        yield _split(divided)
    if profiles and profiles[0].samples:
        yield from _memory(profiles[0], predicted)
    if records:
        yield _loss(records)


def _figure(height: int, **layout: Any) -> Any:
    import plotly.graph_objects as go  # an optional extra

    common = {
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        # Above the chart: a legend of several rows below it would cover the title of the axis.
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {"automargin": True},
        "yaxis": {"automargin": True},
    }
    return go.Figure().update_layout({**common, **layout})


def _gantt(profiles: Sequence[RankProfile]) -> Chart:
    """Draw rank 0's step of median length: one row for each rank and thread, one bar a span."""
    steps = steps_of(profiles[0].spans)
    by_length = sorted(steps[1:] or steps, key=lambda step: step.end_ns - step.start_ns)
    step = by_length[(len(by_length) - 1) // 2]
    bars: dict[str, list[tuple[str, float, float, str]]] = defaultdict(list)
    rows: dict[str, bool] = {}
    for profile in profiles:
        for span in profile.spans:
            # Rows in order of their first span, also an earlier one: the training thread is first.
            row = f"rank {profile.rank} {span.thread}"
            rows.setdefault(row, False)
            if span.name != STEP and span.end_ns > step.start_ns and span.start_ns < step.end_ns:
                begin_ms = (span.start_ns - step.start_ns) / 1e6
                length_ms = (span.end_ns - span.start_ns) / 1e6
                bars[span.name].append((row, begin_ms, length_ms, label_of(span)))
                rows[row] = True
    order = [row for row, is_drawn in rows.items() if is_drawn]
    figure = _figure(190 + 40 * len(order), barmode="overlay", xaxis_title="ms")
    for name, members in bars.items():
        names, begins, lengths, labels = zip(*members, strict=True)
        figure.add_bar(
            orientation="h",
            y=names,
            base=begins,
            x=lengths,
            name=name,
            marker={"color": _color_of(name), "line": {"width": 0}},
            customdata=labels,
            hovertemplate="%{customdata}: %{x:.3f} ms from %{base:.3f} ms<extra></extra>",
        )
    figure.update_xaxes(range=[0.0, (step.end_ns - step.start_ns) / 1e6])
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])  # plotly draws upwards
    caption = (
        f"Step {step.bucket}, which has the median length on rank 0. Times are on rank 0's clock. "
        "The number after a phase is the bucket; after `late rank` it is the rank that is late."
    )
    return Chart("gantt", "One step on every rank and thread", caption, figure)


def _split(profiles: Sequence[RankProfile]) -> Chart:
    """Stack the mean milliseconds a step of each phase, for each rank."""
    split = {f"rank {profile.rank}": _mean_split_ms(profile) for profile in profiles}
    figure = _figure(190 + 40 * len(split), barmode="stack", xaxis_title="ms a step")
    for name in dict.fromkeys(name for times in split.values() for name in times):
        times = [ranks.get(name, 0.0) for ranks in split.values()]
        color = _color_of(name)
        figure.add_bar(orientation="h", y=list(split), x=times, name=name, marker_color=color)
    figure.update_yaxes(categoryorder="array", categoryarray=list(split)[::-1])
    caption = (
        "Mean time of the training thread in each phase. "
        "Time in a nested phase counts only for the inner one."
    )
    return Chart("split", "Where a step goes", caption, figure)


def _mean_split_ms(profile: RankProfile) -> dict[str, float]:
    steps = inside_steps(profile.spans)
    totals: Counter[str] = Counter()
    for _, inside in steps:
        for span, own_ns in self_times_ns(inside):
            totals["other" if span.name == STEP else span.name] += own_ns
    return {name: own_ns / 1e6 / len(steps) for name, own_ns in totals.items()}


def _color_of(phase: str) -> str:
    return PHASES[phase].color if phase in PHASES else _OTHER


def _memory(profile: RankProfile, predicted: Mapping[str, int]) -> Iterator[Chart]:
    """Yield a chart of the ledger for the host and each device, and one of the process."""
    samples, title = profile.samples, f"Memory of rank {profile.rank}"
    ledgers: list[Mapping[str, int]] = [sample["ledger"] for sample in samples]
    seconds = [(sample["time_ns"] - samples[0]["time_ns"]) / 1e9 for sample in samples]
    categories = list(dict.fromkeys(name for ledger in ledgers for name in ledger))
    for number, place in enumerate(dict.fromkeys(map(place_of, categories))):
        held = {
            name: [ledger.get(name, 0) for ledger in ledgers]
            for name in categories
            if place_of(name) == place and any(ledger.get(name) for ledger in ledgers)
        }
        planned = sum(nbytes for name, nbytes in predicted.items() if place_of(name) == place)
        ends = [(seconds[0], planned), (seconds[-1], planned)] if planned else []
        style = {"mode": "lines", "line": {"dash": "dash", "color": _PREDICTED}}
        figure = _stacked(380, seconds, held, ends, name="predicted", **style)
        key = "memory" if number == 0 else f"memory-{number}"
        caption = "Bytes by category. The dashed line is the total that was predicted."
        yield Chart(key, f"{title}, {place}", caption, figure)
    known = [sum(n for name, n in ledger.items() if place_of(name) == "host") for ledger in ledgers]
    rest = [max(0, sample["rss"] - n) for sample, n in zip(samples, known, strict=True)]
    points = [(t, s["uss"]) for t, s in zip(seconds, samples, strict=True) if "uss" in s]
    style = {"dash": "dot", "color": _CATEGORY_COLORS[Category.SLOTS]}
    own = {"name": "not shared (USS)", "mode": "lines+markers", "line": style}
    figure = _stacked(340, seconds, {_LEDGER: known, REST: rest}, points, **own)
    caption = (
        "Resident host memory (RSS). The dotted line is the part that no other process shares."
    )
    yield Chart("process", f"{title}, the whole process", caption, figure)


def _stacked(
    height: int,
    seconds: Sequence[float],
    held: Mapping[str, Sequence[int]],
    points: Sequence[tuple[float, int]],
    **style: Any,
) -> Any:
    """Return a figure of bytes over time.

    Args:
        held: areas to stack, by name: the bytes at each of `seconds`.
        points: of a line across the areas, drawn in `style`; empty for no line.
    """
    totals = map(sum, zip(*held.values(), strict=True))
    most = max([*totals, *(nbytes for _, nbytes in points)], default=0)
    unit, unit_name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    figure = _figure(height, xaxis_title="seconds", yaxis_title=unit_name)
    for name, nbytes in held.items():
        color = _CATEGORY_COLORS.get(name.partition(" on ")[0], _OTHER)
        figure.add_scatter(
            x=seconds,
            y=[n / unit for n in nbytes],
            name=name,
            stackgroup="held",
            mode="lines",
            line={"color": color, "width": 1},
        )
    if points:
        times, nbytes = zip(*points, strict=True)
        figure.add_scatter(x=times, y=[n / unit for n in nbytes], **style)
    return figure


def _loss(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the loss, with a mark at each skipped step."""
    losses = [record["loss"] for record in records]
    figure = _figure(320, xaxis_title="step", yaxis_title="nats")
    steps = [record["step"] for record in records]
    figure.add_scatter(x=steps, y=losses, name="loss", mode="lines")
    skipped = [record["step"] for record in records if record["skipped"]]
    if skipped:
        # A skipped step often has no finite loss: its mark is drawn at the bottom.
        lowest = min((loss for loss in losses if loss is not None), default=0)
        marker = {"symbol": "x", "color": _SKIPPED}
        heights = [lowest] * len(skipped)
        figure.add_scatter(x=skipped, y=heights, name="skipped", mode="markers", marker=marker)
    caption = f"{len(skipped)} of {len(records)} steps were skipped."
    return Chart("loss", "Loss", caption, figure)
