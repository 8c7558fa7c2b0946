"""The report's charts of memory over time: by category with the plan, and of the whole process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from offload_adam.layout.budget import Category
from offload_adam.profiling.peak import REST, place_of
from offload_adam.profiling.profile import RankProfile

_GIB, _MIB = 2**30, 2**20
_PREDICTED = "#E0245E"
_OTHER = "#999999"
# Okabe and Ito's palette: told apart by those who do not see all colours, on light and on dark.
_COLORS = {
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
}


def places_of(profile: RankProfile) -> list[str]:
    """Return where the ledger's bytes lie: the host, and devices."""
    return list(dict.fromkeys(place_of(name) for s in profile.samples for name in s["ledger"]))


def by_category(profile: RankProfile, predicted: Mapping[str, int], place: str) -> Any:
    """Stack the ledger's bytes in one place over time, with the plan's sum as a line."""
    import plotly.graph_objects as go

    samples = profile.samples
    names = [
        name
        for name in dict.fromkeys(name for sample in samples for name in sample["ledger"])
        if place_of(name) == place and any(sample["ledger"].get(name) for sample in samples)
    ]
    planned = sum(nbytes for name, nbytes in predicted.items() if place_of(name) == place)
    most = max(sum(sample["ledger"].get(name, 0) for name in names) for sample in samples)
    unit, unit_name = _unit(max(most, planned))
    times = list(_seconds(samples))
    figure = go.Figure()
    for name in names:
        held = [sample["ledger"].get(name, 0) / unit for sample in samples]
        _add_area(figure, times, held, name, _COLORS.get(name.partition(" on ")[0], _OTHER))
    if planned:
        figure.add_scatter(
            x=[times[0], times[-1]],
            y=[planned / unit] * 2,
            name="predicted",
            mode="lines",
            line={"dash": "dash", "color": _PREDICTED},
        )
    figure.update_layout(xaxis_title="seconds", yaxis_title=unit_name)
    return figure


def of_process(profile: RankProfile) -> Any:
    """Stack what the ledger knows of the host and the rest up to the resident set, over time."""
    import plotly.graph_objects as go

    samples = profile.samples
    unit, unit_name = _unit(max(sample["rss"] for sample in samples))
    times = list(_seconds(samples))
    known = [
        sum(nbytes for name, nbytes in sample["ledger"].items() if place_of(name) == "host")
        for sample in samples
    ]
    rest = [max(0, s["rss"] - n) / unit for s, n in zip(samples, known, strict=True)]
    figure = go.Figure()
    _add_area(
        figure, times, [n / unit for n in known], "the ledger's", _COLORS[Category.PARAMETERS]
    )
    _add_area(figure, times, rest, REST, _OTHER)
    own = [(t, s["uss"] / unit) for t, s in zip(times, samples, strict=True) if "uss" in s]
    if own:
        figure.add_scatter(
            x=[time for time, _ in own],
            y=[value for _, value in own],
            name="its own (USS)",
            mode="lines+markers",
            line={"dash": "dot", "color": _COLORS[Category.SLOTS]},
        )
    figure.update_layout(xaxis_title="seconds", yaxis_title=unit_name)
    return figure


def _add_area(figure: Any, x: list[float], y: list[float], name: str, color: str) -> None:
    line = {"color": color, "width": 1}
    figure.add_scatter(x=x, y=y, name=name, stackgroup="held", mode="lines", line=line)


def _unit(most: int) -> tuple[int, str]:
    return (_GIB, "GiB") if most >= _GIB else (_MIB, "MiB")


def _seconds(samples: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    for sample in samples:
        yield (sample["time_ns"] - samples[0]["time_ns"]) / 1e9
