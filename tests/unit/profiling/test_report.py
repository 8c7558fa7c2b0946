"""The content of the trace and of the report, and that a browser draws the report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_adam.errors import MissingExtraError
from offload_adam.integrations.missing import how_to_install
from offload_adam.profiling.profile import RankProfile, write_trace
from offload_adam.profiling.report import ReportInputs, write_report
from tests.unit.profiling.chrome_trace import read_trace
from tests.unit.profiling.synthetic import MS, NUM_STEPS, PHASES, profile

PROFILES = [profile(0), profile(1, start_ms=2)]
RECORDS = [{"step": n, "loss": 5.0 / n, "skipped": n == 3} for n in range(1, 6)]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def inputs(**changes: Any) -> ReportInputs:
    values: dict[str, Any] = {
        "title": "Profile of <quickstart>",
        "profiles": PROFILES,
        "diagnosis": None,
        "records": RECORDS,
        "predicted": {"state": 9 * 2**20, "staging": 5},
        "update_gb_per_s": 15.0,
        "memory_gb_per_s": 30.0,
    }
    return ReportInputs(**{**values, **changes})


def test_the_trace_has_a_track_a_thread_and_a_counter_a_rank(tmp_path: Path) -> None:
    write_trace(PROFILES, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * NUM_STEPS * (len(PHASES) + 2)
    assert min(event["ts"] for event in spans) == 0.0
    reduce = next(e for e in spans if e["pid"] == 1 and e["name"] == "reduce #0")
    assert (reduce["ts"], reduce["dur"]) == ((2 + 1 + 8 + 11) * 1e3, 3e3)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "rank 0 on host", 1: "rank 1 on host"}
    counters = [event for event in events if event["ph"] == "C"]
    assert [e["args"]["state"] for e in counters if e["pid"] == 1] == [2**20 * i for i in range(10)]


def test_the_trace_is_one_that_the_format_allows(tmp_path: Path) -> None:
    early = replace(PROFILES[1], samples=[{**PROFILES[1].samples[0], "time_ns": -7 * MS}])
    write_trace([PROFILES[0], early], tmp_path / "trace.json")
    trace = read_trace(tmp_path / "trace.json")
    assert trace.threads == {(0, 0): "MainThread", (1, 0): "MainThread"}
    assert trace.counters[1, "memory, bytes"][0][0] == 0.0
    assert trace.spans[0, 0][0][0] == 7e3


@pytest.mark.parametrize(
    "event",
    [
        {"ph": "X", "name": "a", "cat": "a", "pid": 0, "tid": 0, "ts": 1.0, "dur": -0.5},
        {"ph": "X", "name": "a", "cat": "a", "pid": 0, "tid": 0, "ts": 500.0, "dur": 1e4},
        {"ph": "X", "name": "a", "cat": "a", "pid": 0, "tid": 7, "ts": 1.0, "dur": 1.0},
        {"ph": "B", "name": "a", "cat": "a", "pid": 0, "tid": 0, "ts": 1.0},
        {"ph": "C", "name": "memory, bytes", "pid": 0, "ts": 9e9, "args": {"rss": "5"}},
        {"ph": "C", "name": "memory, bytes", "pid": 0, "ts": 0.0, "args": {"rss": 5}},
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "again"}},
    ],
)
def test_the_reader_rejects_what_the_format_does_not_allow(
    tmp_path: Path, event: dict[str, Any]
) -> None:
    path = tmp_path / "trace.json"
    write_trace(PROFILES, path)
    values = json.loads(path.read_text())
    values["traceEvents"].append(event)
    path.write_text(json.dumps(values))
    with pytest.raises(AssertionError):
        read_trace(path)


def test_a_profile_reads_back_from_json_and_changes_its_clock() -> None:
    assert RankProfile.from_json(PROFILES[1].to_json()) == PROFILES[1]
    moved = PROFILES[1].on_clock(lambda time_ns: time_ns + 5 * MS)
    assert moved.spans[0].start_ns == PROFILES[1].spans[0].start_ns + 5 * MS
    assert moved.samples[3]["time_ns"] == PROFILES[1].samples[3]["time_ns"] + 5 * MS


def test_the_report_marks_what_differs_from_the_plan(tmp_path: Path) -> None:
    write_report(inputs(predicted={"state": int(9 * 2**20 / 1.03)}), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Profile of &lt;quickstart&gt;" in page
    assert re.search(r"<td>state</td>(<td>[^<]*</td>)*<td>differs by more than 2%</td></tr>", page)
    assert "50% of the 30.0 GB/s" in page
    write_report(inputs(predicted={"state": int(9 * 2**20 / 1.01)}), tmp_path / "report.html")
    assert "differs by more" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_report_says_what_used_the_most_memory(tmp_path: Path) -> None:
    write_report(inputs(buckets={0: {"state": 5 * 2**20}}), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", page)]
    # All samples have 1 GiB resident, so the first one counts, when the state was 0.
    assert ["the rest of the process", "1.00 GiB", "100.0%", "", "", ""] in cells
    assert ["state", "0 B", "0.0%", "9.00 MiB", "9.00 MiB", ""] in cells
    assert ["0", "5.00 MiB"] in cells
    assert "with 1.00 GiB resident on rank 0. Its largest parts: the rest of the process" in page


def test_the_peak_of_a_device_is_compared_on_its_own_rank(tmp_path: Path) -> None:
    profiles = []
    for rank, nbytes in enumerate([3 * 2**20, 4 * 2**20]):
        held = {f"state on cuda:{rank}": nbytes}
        sample = {**PROFILES[rank].samples[0], "device_allocated": nbytes, "ledger": held}
        profiles.append(replace(PROFILES[rank], samples=[sample], peaks=held))
    predicted = {"state on cuda:0": 3 * 2**20}
    write_report(inputs(profiles=profiles, predicted=predicted), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", page)]
    differs = "differs by more than 2%"
    assert ["state on cuda:1", "4.00 MiB", "100.0%", "4.00 MiB", "3.00 MiB", differs] in cells


def test_the_report_names_ranks_that_lost_spans(tmp_path: Path) -> None:
    profiles = [PROFILES[0], replace(PROFILES[1], num_dropped=7)]
    write_report(inputs(profiles=profiles), tmp_path / "report.html")
    assert "latest spans of rank(s) 1." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_text_that_is_no_utf_8_is_escaped(tmp_path: Path) -> None:
    name = "\udcff.yaml"  # how Python reads a file's name with the byte 0xFF
    held = {f"state {name}": 5}
    environment = {"Command": f"profile {name}", name: "x"}
    changes = {"environment": environment, "predicted": held, "buckets": {0: held}}
    profiles = [replace(one, peaks=held) for one in PROFILES]
    spans = [s._replace(name=name) if s.name == "gather" else s for s in PROFILES[0].spans]
    profiles[0] = replace(profiles[0], spans=spans)
    write_report(
        inputs(title=f"Profile of {name}", profiles=profiles, **changes), tmp_path / "report.html"
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = r"\udcff.yaml"
    for text in (f"<h1>Profile of {shown}</h1>", f"<dd>profile {shown}</dd>", f"<dt>{shown}</dt>"):
        assert text in page
    assert page.count(f"<td>state {shown}</td>") == 2  # of the peak, and of the buckets


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=re.escape(how_to_install("report"))):
        write_report(inputs(), tmp_path / "report.html")


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 500)])
def test_a_browser_draws_every_mark(tmp_path: Path, scheme: str, width: int) -> None:
    assert BROWSER is not None
    path = tmp_path / "report.html"
    write_report(inputs(), path)
    common = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'browser'}",
        f"--window-size={width},2400",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
    ]
    picture = tmp_path / f"report-{scheme}.png"
    dumped = subprocess.run(
        [*common, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    subprocess.run(
        [*common, f"--screenshot={picture}", path.as_uri()],
        capture_output=True,
        timeout=100,
        check=True,
    )
    assert picture.stat().st_size > 20_000
    assert "CONSOLE" not in dumped.stderr
    drawn = dumped.stdout
    parts = re.split(r'<div class="chart[^"]*" id="chart-([\w-]+)"', drawn)
    charts = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(charts) == {"gantt", "split", "memory-0", "loss"}
    num_bars = {key: part.count('aria-roledescription="bar"') for key, part in charts.items()}
    assert num_bars["split"] == 2 * (len(PHASES) + 2)
    assert num_bars["gantt"] > 2 * (len(PHASES) + 1)  # and the lines of exposed time
    assert charts["memory-0"].count('aria-roledescription="area mark"') == 2
    assert charts["loss"].count('aria-roledescription="line mark"') == 2
