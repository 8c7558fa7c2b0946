"""Charts of bars over time: one step on every rank and thread, and the mean step of each rank."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from offload_adam.profiling.charts import ZOOM, Chart, Spec, chosen_in_legend, colored, number, spec
from offload_adam.profiling.exposed import exposed_spans
from offload_adam.profiling.glossary import GLOSSARY
from offload_adam.profiling.phases import COLORS, EXPOSED, LATE, STEP
from offload_adam.profiling.profile import (
    RankProfile,
    inside_steps,
    label_of,
    self_times_ns,
    steps_of,
)
from offload_adam.spans import NO_BUCKET, Span

MAX_BARS = 1_800
"""Of one step: the shortest spans of a step on many ranks are left out, to keep the file small."""
MAX_RANKS = 64
"""Of the mean step: the ranks that wait for others are left out first."""
_ROW_HEIGHT = 40  # pixels
_TRAINING = ": training"


def _bars(
    title: str,
    rows: Mapping[str, Sequence[Span]],
    x_title: str,
    y_title: str,
    *,
    exposed: Mapping[str, Sequence[Span]] | None = None,
    end_ms: float | None = None,
) -> Spec:
    """Return a chart with a bar for each span, from its start to its end, colored by phase.

    Args:
        exposed: spans to mark by a line below the bars of a row.
        end_ms: where the axis ends; the chart can then be zoomed.
    """
    values = [
        {**_place(row, span), "phase": span.name, "label": label_of(span)}
        for row, spans in rows.items()
        # A span is drawn over the one that encloses it.
        for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    ]
    found = {span.name for spans in rows.values() for span in spans}
    if exposed:
        found.add(EXPOSED)
    colors = {name: color for name, color in COLORS.items() if name in found}
    colors |= dict.fromkeys(sorted(found - colors.keys()), COLORS["other"])
    meanings = [{"phase": name, "meaning": GLOSSARY.get(name, "")} for name in colors]
    domain = {} if end_ms is None else {"domain": [0.0, end_ms], "nice": False}
    chosen, opacity = chosen_in_legend("phase")
    places: Spec = {
        "y": {"field": "row", "type": "nominal", "sort": list(rows), "title": y_title},
        "x": number("start", x_title, **domain),
        "x2": {"field": "end"},
    }
    bars: Spec = {
        "data": {"values": values},
        "params": [chosen] if end_ms is None else [chosen, ZOOM],
        "transform": [
            {"calculate": "datum.end - datum.start", "as": "length"},
            {
                "lookup": "phase",
                "from": {"data": {"values": meanings}, "key": "phase", "fields": ["meaning"]},
            },
        ],
        "mark": {"type": "bar", "clip": True, "height": {"band": 0.72}},
        "encoding": {
            **places,
            "color": colored(colors, field="phase"),
            "opacity": opacity,
            "tooltip": [
                {"field": "label", "title": "phase"},
                {"field": "length", "title": "length, ms", "format": ".3f"},
                {"field": "start", "title": "start, ms", "format": ".3f"},
                {"field": "meaning", "title": "meaning"},
            ],
        },
    }
    marked = [_place(row, span) for row, spans in (exposed or {}).items() for span in spans]
    strip = {
        "data": {"values": marked},
        "mark": {"type": "bar", "clip": True, "height": 4, "yOffset": 15, "tooltip": None},
        "encoding": {**places, "color": {"datum": EXPOSED}},
    }
    return spec(title, [bars, strip] if exposed else [bars], _ROW_HEIGHT * len(rows))


def _place(row: str, span: Span) -> Spec:
    """Return where the bar of a span is drawn, in milliseconds."""
    start_ms, end_ms = span.start_ns / 1e6, span.end_ns / 1e6
    return {"row": row, "start": round(start_ms, 4), "end": round(end_ms, 4)}


def gantt(profiles: Sequence[RankProfile]) -> Chart:
    """Draw rank 0's step of median length: one row for each rank and thread, one bar a span."""
    steps = steps_of(profiles[0].spans)
    by_length = sorted(steps[1:] or steps, key=lambda step: step.end_ns - step.start_ns)
    step = by_length[(len(by_length) - 1) // 2]
    length_ns = step.end_ns - step.start_ns
    rows = {row: spans for one in profiles for row, spans in _rows_in(step, one).items()}
    exposed = {row: exposed_spans(rows[row], length_ns) for row in rows if row.endswith(_TRAINING)}
    drawn, num_left_out = _longest(rows)
    title = "One step on every rank and thread"
    bars = _bars(
        title,
        drawn,
        f"time since step {step.bucket} began on rank 0, ms",
        "rank: thread",
        exposed={row: s for row, s in _longest(exposed)[0].items() if row in drawn},
        end_ms=length_ns / 1e6,
    )
    sums_ms = {
        row: sum(span.end_ns - span.start_ns for span in spans) / 1e6
        for row, spans in list(exposed.items())[:8]
    }
    listed = ", ".join(f"{row.partition(':')[0]} {ms:.1f} ms" for row, ms in sums_ms.items())
    left_out = f" The {num_left_out} shortest spans are left out." if num_left_out else ""
    caption = (
        f"Step {step.bucket}, which has the median length on rank 0 ({length_ns / 1e6:.1f} ms). "
        "Bars below each other run at the same time; all times are on rank 0's clock. The black "
        f"line under a training thread marks exposed time ({listed}): the thread runs or waits for "
        "the optimizer instead of the model. The number after a phase is the bucket; after `late "
        f"rank`, the rank that is late.{left_out}"
    )
    return Chart("gantt", title, caption, bars)


def _rows_in(step: Span, profile: RankProfile) -> dict[str, list[Span]]:
    """Return the spans of a rank by row that overlap with a step, on the clock of this step.

    The training thread comes first, and other threads in the order of their first span.
    """
    training = {one.thread for one in steps_of(profile.spans)}
    rows: dict[str, list[Span]] = {f"rank {profile.rank}{_TRAINING}": []}
    for span in profile.spans:
        name = _TRAINING if span.thread in training else f": {span.thread}"
        row = rows.setdefault(f"rank {profile.rank}{name}", [])
        if span.name != STEP and span.end_ns > step.start_ns and span.start_ns < step.end_ns:
            start_ns, end_ns = span.start_ns - step.start_ns, span.end_ns - step.start_ns
            row.append(span._replace(start_ns=start_ns, end_ns=end_ns))
    return rows


def _longest(rows: Mapping[str, Sequence[Span]]) -> tuple[dict[str, list[Span]], int]:
    """Return the longest `MAX_BARS` spans by row, and how many others there are."""
    members = [(row, span) for row, spans in rows.items() for span in spans]
    order = sorted(range(len(members)), key=lambda i: members[i][1].start_ns - members[i][1].end_ns)
    kept: dict[str, list[Span]] = defaultdict(list)
    for i in sorted(order[:MAX_BARS]):
        row, span = members[i]
        kept[row].append(span)
    return kept, max(0, len(members) - MAX_BARS)


def split(profiles: Sequence[RankProfile]) -> Chart:
    """Draw the mean milliseconds a step of each phase, one after another, for each rank."""
    means: dict[int, list[Span]] = {}
    late_ns: dict[int, int] = {}
    for profile in profiles:
        steps = inside_steps(profile.spans)
        totals_ns: Counter[str] = Counter()
        for _, inside in steps:
            for span, own_ns in self_times_ns(inside):
                totals_ns["other" if span.name == STEP else span.name] += own_ns
        row = means.setdefault(profile.rank, [])
        late_ns[profile.rank] = totals_ns[LATE] // max(1, len(steps))
        now_ns = 0
        for name, total_ns in totals_ns.items():
            end_ns = now_ns + total_ns // len(steps)
            row.append(Span(name, NO_BUCKET, "", now_ns, end_ns))
            now_ns = end_ns
    # The rank that others wait for waits least itself.
    drawn = set(sorted(means, key=late_ns.__getitem__)[:MAX_RANKS])
    num_left_out = len(means) - len(drawn)
    caption = (
        "Mean time of the training thread in each phase. "
        "Time in a nested phase counts only for the inner one."
    )
    if num_left_out:
        caption += f" The {num_left_out:,} ranks that wait longest for late ranks are left out."
    rows = {f"rank {rank}": row for rank, row in means.items() if rank in drawn}
    title = "Where a step goes"
    bars = _bars(title, rows, "mean time of a step, ms", "rank")
    return Chart("split", title, caption, bars)
