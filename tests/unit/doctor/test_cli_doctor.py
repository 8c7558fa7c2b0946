"""`offload-adam doctor`: what it prints, writes and exits with."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.doctor import bandwidth_cache, examination
from offload_adam.doctor.bandwidth import measure_bandwidth, measure_step
from offload_adam.doctor.finding import Finding, findings_table, summary
from offload_adam.options import StateFormat

LOW_PRECISION_STEPS: dict[StateFormat, float] = {"bf16": 23.0, "mixed": 22.0, "int8": 21.0}


def doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def small_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        examination, "measure_bandwidth", lambda counts: measure_bandwidth(counts, numel=100_000)
    )

    def measure(num_threads: int, state_format: StateFormat = "fp32") -> float:
        return LOW_PRECISION_STEPS.get(state_format) or measure_step(num_threads, numel=9)

    monkeypatch.setattr(examination, "measure_step", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_everything_found_is_shown_and_written(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    code, output = doctor("--local-world-size=2", f"--dir={tmp_path}", f"--json={path}")
    values = json.loads(path.read_text())
    assert code == (1 if values["status"] == "failed" else 0), output
    topics = [finding["topic"] for finding in values["findings"]]
    found = {finding["topic"]: finding["found"] for finding in values["findings"]}
    statuses = {finding["topic"]: finding["status"] for finding in values["findings"]}
    assert found["local ranks"].startswith("2 rank(s) with ")
    for topic in topics:
        assert topic in output
    for finding in values["findings"]:
        assert (finding["status"] == "ok") == (finding["advice"] == "")
    measured = {int(count): value for count, value in values["bandwidth_gb_per_s"].items()}
    assert 1 in measured
    assert all(value > 0.0 for value in measured.values())
    assert bandwidth_cache.recall() == bandwidth_cache.Bandwidth(
        measured,
        values["step_gb_per_s"],
        low_precision_steps=LOW_PRECISION_STEPS,
        busy=statuses["load"] == "warning",
    )
    assert values["step_gb_per_s"] > 0.0
    low = "bandwidth of a step, {} state"
    assert {name: text for name, text in found.items() if name.endswith(" state")} == {
        low.format("bf16"): "23.0 GB/s; a step moves 20 bytes a parameter instead of 30",
        low.format("mixed"): "22.0 GB/s; a step moves 16 bytes a parameter instead of 30",
        low.format("int8"): "21.0 GB/s; a step moves 14 bytes a parameter instead of 30",
    }


def test_a_failed_check_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = doctor("--no-measure", f"--dir={tmp_path / 'file' / 'runs'}")
    assert code == 1
    assert re.fullmatch(r"\d+ ok, \d+ warnings?, 1 failed", output.splitlines()[0])
    assert bandwidth_cache.recall() == bandwidth_cache.Bandwidth()


@pytest.mark.parametrize(
    "arguments", [("--local-world-size=0",), ("--json=missing/folder/x.json",), ("--fast",)]
)
def test_a_wrong_option_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert doctor(*arguments)[0] == 2


@pytest.mark.parametrize("told", ["0", "two", "-1"])
def test_a_wrong_number_of_ranks_exits_with_2(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    code, output = doctor("--no-measure")
    assert code == 2
    assert "LOCAL_WORLD_SIZE" in output


def test_only_local_rank_0_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert doctor("--no-measure") == (0, "")


@pytest.mark.parametrize("local_rank", ["1", "x"])
def test_a_local_rank_without_a_launcher_does_not_count(
    local_rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert "local ranks" in doctor("--no-measure", f"--dir={tmp_path}")[1]


def test_an_environment_that_no_launcher_makes_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    code, output = doctor("--no-measure")
    assert code == 2
    assert "WORLD_SIZE='x' is not a whole number" in output


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_keeps_to_its_width_and_loses_no_word(width: int) -> None:
    findings = [
        Finding("huge pages", "set to [madvise]"),
        Finding("locked memory", "a limit " * 20, "raise it " * 20 + "last"),
        Finding("disk", "/a/very/long/path" * 8, "choose another", is_fatal=True),
    ]
    text = io.StringIO()
    Console(file=text, width=width).print(findings_table(findings))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "[madvise]" in text.getvalue()
    assert "last" in text.getvalue()
    assert summary(findings) == "1 ok, 1 warning, 1 failed"
    assert summary(findings[:1]) == "1 ok, 0 warnings, 0 failed"


def test_the_number_of_parameters_has_a_unit(tmp_path: Path) -> None:
    code, output = doctor(f"--dir={tmp_path}", "--no-measure", "--params=7B")
    assert code in (0, 1), output
    code, output = doctor(f"--dir={tmp_path}", "--params=seven")
    assert code == 2
    assert "--params 'seven' is not a number: write one such as 7B" in output
