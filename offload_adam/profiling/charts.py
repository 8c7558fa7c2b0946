"""The charts of the report, each a plotly figure of plain values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from offload_adam.profiling.lateness import with_late_ranks
from offload_adam.profiling.peak import REST, parts_of, place_of
from offload_adam.profiling.phases import PHASES, STEP
from offload_adam.profiling.profile import (
    RankProfile,
    inside_steps,
    label_of,
    self_times_ns,
    steps_of,
)
from offload_adam.spans import NO_BUCKET, Span

_OTHER = "#999999"


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


def _figure(traces: Sequence[Mapping[str, Any]], **layout: Any) -> Any:
    import plotly.graph_objects as go  # an optional extra
    from plotly.colors import qualitative

    common = {
        "template": "plotly_white",
        "colorway": qualitative.Safe,  # color-blind readers can tell these apart
        "height": 380,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 40},
        # Above the chart: a legend of several rows below it would cover the title of the axis.
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }
    figure = go.Figure(traces, {**common, **layout})
    return figure.update_xaxes(automargin=True).update_yaxes(automargin=True)


def _bars(rows: Mapping[str, Sequence[Span]], **layout: Any) -> Any:
    """Return a figure with a bar for each span, from its start to its end, colored by phase."""
    bars: dict[str, list[tuple[str, float, float, str]]] = defaultdict(list)
    for row, spans in rows.items():
        for span in spans:
            length_ms = (span.end_ns - span.start_ns) / 1e6
            bars[span.name].append((row, span.start_ns / 1e6, length_ms, label_of(span)))
    traces = []
    for name, members in bars.items():
        names, begins, lengths, labels = zip(*members, strict=True)
        color = PHASES[name].color if name in PHASES else _OTHER
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": names,
                "base": begins,
                "x": lengths,
                "customdata": labels,
                "marker": {"color": color, "line": {"width": 0}},
                "hovertemplate": "%{customdata}: %{x:.3f} ms from %{base:.3f} ms<extra></extra>",
            }
        )
    layout = {"height": 190 + 40 * len(rows), "barmode": "overlay", "xaxis_title": "ms", **layout}
    order = list(rows)[::-1]  # plotly draws upwards
    return _figure(traces, **layout).update_yaxes(categoryorder="array", categoryarray=order)


def _gantt(profiles: Sequence[RankProfile]) -> Chart:
    """Draw rank 0's step of median length: one row for each rank and thread, one bar a span."""
    steps = steps_of(profiles[0].spans)
    by_length = sorted(steps[1:] or steps, key=lambda step: step.end_ns - step.start_ns)
    step = by_length[(len(by_length) - 1) // 2]
    rows: dict[str, list[Span]] = defaultdict(list)
    for profile in profiles:
        for span in profile.spans:
            # Rows in order of their first span, also an earlier one: the training thread is first.
            row = rows[f"rank {profile.rank} {span.thread}"]
            if span.name != STEP and span.end_ns > step.start_ns and span.start_ns < step.end_ns:
                begin_ns, end_ns = span.start_ns - step.start_ns, span.end_ns - step.start_ns
                row.append(span._replace(start_ns=begin_ns, end_ns=end_ns))
    figure = _bars({row: spans for row, spans in rows.items() if spans})
    figure.update_xaxes(range=[0.0, (step.end_ns - step.start_ns) / 1e6])
    caption = (
        f"Step {step.bucket}, which has the median length on rank 0. Times are on rank 0's clock. "
        "The number after a phase is the bucket; after `late rank`, the rank that is late."
    )
    return Chart("gantt", "One step on every rank and thread", caption, figure)


def _split(profiles: Sequence[RankProfile]) -> Chart:
    """Draw the mean milliseconds a step of each phase, one after another, for each rank."""
    rows: dict[str, list[Span]] = {}
    for profile in profiles:
        steps = inside_steps(profile.spans)
        totals_ns: Counter[str] = Counter()
        for _, inside in steps:
            for span, own_ns in self_times_ns(inside):
                totals_ns["other" if span.name == STEP else span.name] += own_ns
        bars = rows.setdefault(f"rank {profile.rank}", [])
        now_ns = 0
        for name, total_ns in totals_ns.items():
            end_ns = now_ns + total_ns // len(steps)
            bars.append(Span(name, NO_BUCKET, "", now_ns, end_ns))
            now_ns = end_ns
    caption = (
        "Mean time of the training thread in each phase. "
        "Time in a nested phase counts only for the inner one."
    )
    return Chart("split", "Where a step goes", caption, _bars(rows, xaxis_title="ms a step"))


def _memory(profile: RankProfile, predicted: Mapping[str, int]) -> Iterator[Chart]:
    """Yield a chart of the memory of the process, and of each device."""
    samples = profile.samples
    seconds = [(sample["time_ns"] - samples[0]["time_ns"]) / 1e9 for sample in samples]
    places = [place_of(name) for sample in samples for name in sample["ledger"]]
    for number, place in enumerate(dict.fromkeys(["host", *places])):
        parts = [parts_of(sample, place) for sample in samples]
        traces = [
            _line(name, seconds, [part.get(name, 0) for part in parts], stackgroup="held")
            for name in dict.fromkeys(name for part in parts for name in part)
        ]
        planned = sum(nbytes for name, nbytes in predicted.items() if place_of(name) == place)
        if planned:
            ends = [seconds[0], seconds[-1]]
            traces.append(_line("predicted", ends, [planned] * 2, line={"dash": "dash"}))
        own = [(at_s, s["uss"]) for at_s, s in zip(seconds, samples, strict=True) if "uss" in s]
        if own and place == "host":
            times, nbytes = zip(*own, strict=True)
            traces.append(_line("not shared (USS)", times, nbytes, line={"dash": "dot"}))
        caption = (
            "Memory by category; a click on a name hides it. The dashed line is the predicted "
            f"total, without {REST}. The dotted line is the part of the process's memory that no "
            "other process shares."
        )
        key, title = f"memory-{number}", f"Memory of rank {profile.rank}, {place}"
        figure = _figure(traces, xaxis_title="seconds", yaxis_title="GiB")
        yield Chart(key, title, caption, figure)


def _line(name: str, seconds: Sequence[float], nbytes: Sequence[int], **style: Any) -> Any:
    gib = [n / 2**30 for n in nbytes]
    return {"type": "scatter", "mode": "lines", "name": name, "x": seconds, "y": gib, **style}


def _loss(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the loss, with a mark at each skipped step."""
    steps, losses = zip(*((record["step"], record["loss"]) for record in records), strict=True)
    skipped = [record["step"] for record in records if record["skipped"]]
    # A skipped step often has no finite loss: its mark is drawn at the bottom.
    lowest = min((loss for loss in losses if loss is not None), default=0)
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "loss", "x": steps, "y": losses},
        {"type": "scatter", "mode": "markers", "name": "skipped", "marker": {"symbol": "x"}}
        | {"x": skipped, "y": [lowest] * len(skipped)},
    ]
    caption = f"{len(skipped)} of {len(records)} steps were skipped."
    return Chart("loss", "Loss", caption, _figure(traces, xaxis_title="step", yaxis_title="nats"))
