"""Charts of curves: memory over time, and the loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from offload_adam.profiling.charts import (
    INK,
    ZOOM,
    Chart,
    Spec,
    chosen_in_legend,
    colored,
    number,
    spec,
)
from offload_adam.profiling.peak import REST, parts_of, place_of, total_of
from offload_adam.profiling.profile import RankProfile

MAX_POINTS = 1_200
"""Of all categories of memory in one place together, so that the report of a long run is small."""
MAX_STEPS = 1_000
"""Of the loss."""
_SMOOTHED_SHARE = 0.02
"""Of all steps: the number of steps over which the loss is averaged, at least 5."""
# Paul Tol's "muted" palette, which color-blind readers can tell apart.
_MUTED = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255")
_REST_COLOR = "#BBBBBB"
_T = TypeVar("_T")


def _thinned(values: Sequence[_T], key: Callable[[_T], float], most: int) -> list[_T]:
    """Return at most `most` values: of each group of neighbors, the one of largest `key`."""
    size = math.ceil(len(values) / most)
    return [max(values[i : i + size], key=key) for i in range(0, len(values), size or 1)]


def memory(profile: RankProfile, predicted: Mapping[str, int]) -> Iterator[Chart]:
    """Yield a chart of the memory of the process, and of each device."""
    places = [place_of(name) for sample in profile.samples for name in sample["ledger"]]
    for index, place in enumerate(dict.fromkeys(["host", *places])):
        planned = sum(nbytes for name, nbytes in predicted.items() if place_of(name) == place)
        caption = "Memory by category."
        if planned:
            caption += f" The dashed line is the predicted total, without {REST}."
        if place == "host":
            caption += (
                " The dotted line is the part of the process's memory that no other process shares."
            )
        title = f"Memory of rank {profile.rank}, {place}"
        yield Chart(f"memory-{index}", title, caption, _held(title, profile, place, planned))


def _held(title: str, profile: RankProfile, place: str, planned: int) -> Spec:
    """Return the chart of one place.

    Args:
        planned: bytes, 0 if they are not known.
    """
    own = [sample for sample in profile.samples if place == "host" and "uss" in sample]
    names = {n: None for s in profile.samples for n in parts_of(s, place) if n != REST}
    most = max(50, MAX_POINTS // (len(names) + 1))
    samples = _thinned(profile.samples, partial(total_of, where=place), most)
    largest = max(total_of(sample, place) for sample in samples)
    unit, nbytes_of_unit = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    begin_ns = profile.samples[0]["time_ns"]

    def point(sample: Mapping[str, Any], nbytes: int, **rest: Any) -> Spec:
        seconds = (sample["time_ns"] - begin_ns) / 1e9
        return {"s": round(seconds, 4), "held": round(nbytes / nbytes_of_unit, 4), **rest}

    parts = [parts_of(sample, place) for sample in samples]
    areas = [
        point(sample, part.get(name, 0), name=name, order=order)
        for order, name in enumerate([*names, REST])
        for sample, part in zip(samples, parts, strict=True)
    ]
    ends = (samples[0], samples[-1]) if planned else ()
    lines = [point(sample, planned, line="predicted") for sample in ends]
    lines += [
        point(sample, sample["uss"], line="not shared (USS)")
        for sample in _thinned(own, lambda sample: sample["uss"], most)
    ]
    return _areas(title, areas, lines, [*names, REST], unit)


def _areas(
    title: str, areas: Sequence[Spec], lines: Sequence[Spec], names: Sequence[str], unit: str
) -> Spec:
    """Return a chart of stacked areas by `name`, with lines by `line` over them."""
    colors = {name: _MUTED[i % len(_MUTED)] for i, name in enumerate(names)} | {REST: _REST_COLOR}
    chosen, opacity = chosen_in_legend("name")
    places = {
        "x": number("s", "time since the first sample, s", nice=False),
        "y": number("held", f"memory, {unit}"),
    }
    stacked: Spec = {
        "data": {"name": "areas"},
        "params": [chosen, ZOOM],
        "mark": {"type": "area", "clip": True, "stroke": "white", "strokeWidth": 1},
        "encoding": {
            **places,
            "color": colored(colors, field="name"),
            "order": {"field": "order", "type": "quantitative"},
            "opacity": opacity,
        },
    }
    # An area has one tooltip for all its points: invisible lines carry one for each sample.
    times = {point["s"] for point in areas}
    readings: Spec = {
        "data": {"name": "areas"},
        "transform": [{"pivot": "name", "value": "held", "groupby": ["s"]}],
        "mark": {"type": "rule", "opacity": 0, "strokeWidth": max(2, 900 // len(times))}
        | {"clip": True},
        "encoding": {
            "x": places["x"],
            "tooltip": [{"field": "s", "title": "time, s"}]
            + [{"field": name, "title": f"{name}, {unit}", "format": ",.2f"} for name in names],
        },
    }
    dashes = {"predicted": [8, 5], "not shared (USS)": [2, 3]}
    present = {row["line"] for row in lines}
    dashes = {name: dash for name, dash in dashes.items() if name in present}
    over: Spec = {
        "data": {"values": list(lines)},
        "mark": {"type": "line", "clip": True, "strokeWidth": 2.5, "color": INK},
        "encoding": {
            **places,
            "strokeDash": {
                "field": "line",
                "type": "nominal",
                "scale": {"domain": list(dashes), "range": list(dashes.values())},
                "legend": {"symbolType": "stroke", "symbolSize": 500, "title": None},
            },
        },
    }
    layers = [stacked, over, readings] if lines else [stacked, readings]
    return spec(title, layers, 320, datasets={"areas": list(areas)})


def readable(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records that `loss` can draw. A killed process may have left damaged ones."""
    return [
        record
        for record in records
        if _is_int(record.get("step"))
        and (isinstance(value := record.get("loss", ""), float) or _is_int(value) or value is None)
        and type(record.get("skipped")) is bool
    ]


def _is_int(value: object) -> bool:
    """Return whether a value of JSON is a whole number of 64 bits."""
    return type(value) is int and abs(value) < 2**63


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _smoothed(losses: Iterable[float | None], num_steps: int) -> Iterator[float | None]:
    """Yield the exponential moving average over about `num_steps`, without the missing values.

    It is divided by the sum of its weights, as Adam's moments are: it starts at the first loss.
    """
    keep = 1.0 - 2.0 / (num_steps + 1)
    total = weight = 0.0
    for loss in losses:
        if loss is not None:
            total, weight = keep * total + (1.0 - keep) * loss, keep * weight + 1.0 - keep
        yield total / weight if weight else None


def loss(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the loss and its moving average, with a mark at each skipped step.

    Args:
        records: at least one, of those that are `readable`.
    """
    window = max(5, round(_SMOOTHED_SHARE * len(records)))
    losses = [_finite(record["loss"]) for record in records]
    rows = [
        {"step": record["step"], "loss": loss, "smoothed": smoothed}
        for record, loss, smoothed in zip(records, losses, _smoothed(losses, window), strict=True)
    ]
    every = math.ceil(len(rows) / (MAX_STEPS))
    rows = rows[::-1][::every][::-1]  # with the last step
    skipped = [record["step"] for record in records if record["skipped"]]
    # A skipped step often has no finite loss: its mark is drawn at the bottom.
    lowest = min((loss for loss in losses if loss is not None), default=0.0)
    marks = [{"step": step, "loss": lowest} for step in skipped[-MAX_POINTS:]]
    colors = {"loss": "#56B4E9", "smoothed": "#0072B2"}
    if skipped:
        colors["skipped"] = "#D55E00"
    x = number("step", "step", zero=False, nice=False) | {"axis": {"tickMinStep": 1}}
    y = {"type": "quantitative", "scale": {"zero": False}, "title": "loss, nats"}
    read = [
        {"field": "step", "title": "step"},
        {"field": "loss", "title": "loss, nats", "format": ".4f"},
        {"field": "smoothed", "title": "smoothed, nats", "format": ".4f"},
    ]

    def layer(name: str, mark: Spec, tooltip: Any, **rest: Any) -> Spec:
        return {
            "mark": {"clip": True, **mark},
            "encoding": {
                "x": x,
                "y": {**y, "field": "smoothed" if name == "smoothed" else "loss"},
                "color": {**colored(colors), "datum": name},
                "tooltip": tooltip,
            },
            **rest,
        }

    raw = {"type": "line", "strokeWidth": 1, "point": {"size": 12}}
    layers = [
        layer("loss", raw, read, params=[ZOOM]),
        layer("smoothed", {"type": "line", "strokeWidth": 3}, read),
    ]
    if skipped:
        cross = {"type": "point", "shape": "cross", "size": 70, "filled": True}
        layers.append(layer("skipped", cross, read[:1], data={"values": marks}))
    thinned = f" Every {every}th step is drawn." if every > 1 else ""
    caption = (
        f"{len(skipped)} of {len(records)} steps were skipped. The thick line is a moving "
        f"average over about {window} steps.{thinned}"
    )
    return Chart("loss", "Loss", caption, spec("Loss", layers, 320, data={"values": rows}))
