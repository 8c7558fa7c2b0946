"""The report as a page: one valid file that loads nothing, draws every chart, and stays small."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload_adam.layout.budget import Category
from offload_adam.profiling.glossary import GLOSSARY
from offload_adam.profiling.phases import COLORS, LATE
from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.report import MAX_BUCKETS, ReportInputs, write_report
from offload_adam.profiling.timelines import MAX_BARS, MAX_RANKS
from offload_adam.spans import RANGES, Span
from tests.support.report_page import Page, bars, drawn, read_page, values_of
from tests.unit.profiling.synthetic import MS, NUM_STEPS, PHASES, profile

pytest.importorskip("vl_convert")

MAX_NBYTES = 1_500_000
NAN = math.nan


def records(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": n, "loss": loss, "skipped": n == 3} for n, loss in enumerate(losses, 1)]


def written(folder: Path, profiles: list[RankProfile], **changes: Any) -> Page:
    """Write a report, and return it as a page."""
    changes.setdefault("records", records(5.0, 4.0, 4.5, 3.0, 3.5))
    inputs = ReportInputs("Profile of <quickstart>", profiles, None, **changes)
    write_report(inputs, folder / "report.html")
    return read_page(folder / "report.html")


def with_one_step(rank: int) -> RankProfile:
    whole = profile(rank)
    return replace(whole, spans=[s for s in whole.spans if s.end_ns <= sum(PHASES.values()) * MS])


CASES: dict[str, tuple[list[RankProfile], dict[str, Any], set[str]]] = {
    "one rank": ([profile(0)], {}, {"gantt", "split", "memory-0", "loss"}),
    "two ranks": ([profile(0), profile(1)], {}, {"gantt", "split", "memory-0", "loss"}),
    "one step": (
        [with_one_step(0), with_one_step(1)],
        {"records": records(5.0)},
        {"gantt", "split", "memory-0", "loss"},
    ),
    "NaN losses": (
        [profile(0)],
        {"records": records(NAN, 4.0, None, math.inf, 3.0)},
        {"gantt", "split", "memory-0", "loss"},
    ),
    "only NaN losses": (
        [profile(0)],
        {"records": records(NAN, NAN, NAN)},
        {"gantt", "split", "memory-0", "loss"},
    ),
    "no samples of memory": ([replace(profile(0), samples=[])], {}, {"gantt", "split", "loss"}),
    "one sample of memory": (
        [replace(profile(0), samples=profile(0).samples[:1])],
        {"predicted": {"state": 5}},
        {"gantt", "split", "memory-0", "loss"},
    ),
    "no spans": ([replace(profile(0), spans=[])], {"records": []}, {"memory-0"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, case: str) -> None:
    profiles, changes, keys = CASES[case]
    page = written(tmp_path, profiles, **changes)
    assert set(page.charts) == set(page.specs) == keys
    assert page.addresses == ["data:,"]
    assert not re.search(r"@import|url\(", page.code[0])
    assert [code for code in page.code if "window.vegaEmbed=" in code] == [page.code[1]]
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    for spec in page.specs.values():
        assert list(values_of(spec, "url")) == []
        titles = {
            title for axis in ("x", "y") for title in values_of([*values_of(spec, axis)], "title")
        }
        assert titles == titles & {
            *("rank", "rank: thread", "mean time of a step, ms", "step", "loss, nats"),
            *("memory, MiB", "memory, GiB", "time since the first sample, s"),
            *(f"time since step {n} began on rank 0, ms" for n in range(1, NUM_STEPS + 1)),
        }
        assert len(titles) == 2
        svg = drawn(spec)
        assert all(f">{title}</text>" in svg for title in titles)
        assert "NaN" not in svg


def test_a_step_is_drawn_on_every_rank_and_thread(tmp_path: Path) -> None:
    spans = profile(0).spans
    updates = [s._replace(name="update", thread="other") for s in spans if s.name == "forward"]
    first = replace(profile(0), spans=sorted([*spans, *updates], key=lambda span: span.start_ns))
    page = written(tmp_path, [first, profile(1, start_ms=2)])
    svg = drawn(page.specs["gantt"])
    for row in ("rank 0: training", "rank 0: other", "rank 1: training"):
        assert f">{row}</text>" in svg
    # Rank 1 is 2 ms later, so the last span of its step before is in the picture, too.
    assert bars(svg, COLORS["forward"]) == bars(svg, COLORS["gather"]) == 2
    assert bars(svg, COLORS["update"]) == 3
    exposed = page.specs["gantt"]["layer"][1]["data"]["values"]
    # data 1, forward 8, backward 14 with a reduce in its last 3 ms, update 9, gather 2.
    assert [(bar["row"], bar["start"], bar["end"]) for bar in exposed] == [
        ("rank 0: training", 20.0, 34.0),
        ("rank 1: training", 0.0, 2.0),
        ("rank 1: training", 22.0, 34.0),
    ]
    assert "(rank 0 14.0 ms, rank 1 14.0 ms)" in page.text


def test_spans_that_no_phase_names_have_the_color_of_others(tmp_path: Path) -> None:
    first = profile(0, {**PHASES, "evaluation": 5})
    svg = drawn(written(tmp_path, [first]).specs["gantt"])
    assert bars(svg, COLORS["other"]) == 1
    assert ">evaluation</text>" in svg


def test_the_loss_is_smoothed_by_a_weighted_mean_of_finite_losses(tmp_path: Path) -> None:
    losses = [5.0, NAN, 4.0, None, 3.0, 8.0]
    page = written(tmp_path, [profile(0)], records=records(*losses))
    rows = page.specs["loss"]["data"]["values"]
    assert [row["loss"] for row in rows] == [5.0, None, 4.0, None, 3.0, 8.0]
    finite = np.array([5.0, 4.0, 3.0, 8.0])
    expected = [
        np.average(finite[:n], weights=(2.0 / 3.0) ** np.arange(n)[::-1])
        for n in (1, 1, 2, 2, 3, 4)
    ]
    np.testing.assert_allclose([row["smoothed"] for row in rows], expected, rtol=1e-12)
    assert "1 of 6 steps were skipped" in page.text


def test_a_long_run_on_many_ranks_keeps_its_peak_and_stays_small(tmp_path: Path) -> None:
    num_spans, num_samples = 400, 20_000
    names = {f"category {i}" + " on cuda:0" * (i % 2): 2**20 * i for i in range(16)}
    samples = [
        {"time_ns": i * MS, "rss": 2**33, "device_allocated": 2**33, "ledger": names}
        for i in range(num_samples)
    ]
    samples[12_345] = {**samples[12_345], "rss": 2**34}
    many = []
    for rank in range(64):
        spans = [
            Span("update", i, "MainThread", i * MS, i * MS + MS // (1 + i % 7))
            for i in range(num_spans)
        ]
        whole = Span("train step", 1, "MainThread", 0, num_spans * MS)
        many.append(RankProfile(rank, f"host {rank}", [whole, *spans], samples[:num_samples]))
    page = written(tmp_path, many, records=records(*np.linspace(5.0, 3.0, 50_000)))
    assert (tmp_path / "report.html").stat().st_size < MAX_NBYTES
    assert "shortest spans are left out" in page.text
    drawn_spans = page.specs["gantt"]["layer"][0]["data"]["values"]
    # A seventh of the spans takes 1 ms each, more than there is room for; none of them is omitted
    # in favor of a shorter one.
    assert {round(bar["end"] - bar["start"], 3) for bar in drawn_spans} == {1.0}
    assert len(drawn_spans) == MAX_BARS
    held = page.specs["memory-0"]["datasets"]["areas"]
    at_the_peak = [point for point in held if point["s"] == 12.345]
    assert sum(point["held"] for point in at_the_peak) == pytest.approx(16.0, abs=1e-3)
    steps = [row["step"] for row in page.specs["loss"]["data"]["values"]]
    assert (len(steps), steps[-1]) == (1000, 50_000)
    assert "Every 50th step is drawn" in page.text


WRONG: dict[str, list[Any]] = {
    "loss": [10**400, "x", [], {}, True],
    "step": [10**400, "x", None, 1.5, True],
    "skipped": ["x", None],
}
DAMAGED: list[dict[str, Any]] = [
    *({**records(1.0)[0], key: value} for key, values in WRONG.items() for value in values),
    *({"loss": 1.0, "skipped": False}, {"step": 2, "skipped": False}, {"step": 2, "loss": 1.0}),
    {},
]


def test_damaged_records_are_skipped(tmp_path: Path) -> None:
    whole = records(5.0, 4.0, NAN, 3.0)
    mixed = [record for one in whole for record in (*DAMAGED, one)]
    page = written(tmp_path, [profile(0)], records=[*mixed, *DAMAGED])
    expected = written(tmp_path, [profile(0)], records=whole)
    assert page.specs["loss"] == expected.specs["loss"]
    assert "1 of 4 steps were skipped" in page.text
    assert "loss" not in written(tmp_path, [profile(0)], records=DAMAGED).charts


def test_many_ranks_and_buckets_are_cut_to_those_that_matter(tmp_path: Path) -> None:
    many = []
    for rank in range(1024):
        # All ranks but 999 wait for 9 ms; the step has the same length everywhere.
        waits, works = (0, 19) if rank == 999 else (9, 10)
        names = {"forward": works, LATE: waits, **{f"phase {i}": 1 for i in range(20)}}
        many.append(replace(profile(rank, names), samples=[]))
    columns = [f"category {i} on cuda:0" for i in range(8)]
    held = {number: dict.fromkeys(columns, 2**20 + number) for number in range(20_000)}
    page = written(tmp_path, many, buckets=held)
    assert (tmp_path / "report.html").stat().st_size < MAX_NBYTES
    rows = {bar["row"] for bar in page.specs["split"]["layer"][0]["data"]["values"]}
    assert rows == {"rank 999", *(f"rank {rank}" for rank in range(MAX_RANKS - 1))}
    assert "The 960 ranks that wait longest for late ranks are left out." in page.text
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"<tr><td>(\d+)</td>", text)]
    assert numbers == list(range(20_000 - MAX_BUCKETS, 20_000))
    assert "The 19,500 smallest buckets are left out." in page.text


def test_few_ranks_and_buckets_are_all_named(tmp_path: Path) -> None:
    ranks = [profile(rank) for rank in range(MAX_RANKS)]
    held = {number: {"state": 5} for number in range(MAX_BUCKETS)}
    page = written(tmp_path, ranks, buckets=held)
    rows = {bar["row"] for bar in page.specs["split"]["layer"][0]["data"]["values"]}
    assert len(rows) == MAX_RANKS
    assert "left out" not in page.specs["split"]["description"] + page.text


def test_a_name_cannot_end_its_script(tmp_path: Path) -> None:
    name = "</script><b>"
    spans = [s._replace(name=name) if s.name == "gather" else s for s in profile(0).spans]
    page = written(tmp_path, [replace(profile(0), spans=spans)])
    assert name in page.specs["gantt"]["layer"][0]["encoding"]["color"]["scale"]["domain"]


def test_every_name_is_explained(tmp_path: Path) -> None:
    assert COLORS.keys() | RANGES.keys() <= GLOSSARY.keys()
    categories = {value for name, value in vars(Category).items() if name.isupper()}
    assert categories <= GLOSSARY.keys()
    assert all(meaning.endswith(".") for meaning in GLOSSARY.values())
    page = written(tmp_path, [profile(0)], environment={"Command": "train <it>"})
    assert GLOSSARY[LATE] in page.text
    assert "Commandtrain <it>" in page.text
    assert GLOSSARY["forward"] in drawn(page.specs["gantt"])
