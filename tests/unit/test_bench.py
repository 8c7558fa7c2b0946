"""`bench kernel` and `bench step`: the arithmetic on a fake clock, reports and commands."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from offload_adam.bench import __main__ as bench_main
from offload_adam.bench import kernel, machine, step
from offload_adam.bench.fsdp2 import Fsdp2BenchmarkError
from offload_adam.bench.harness import (
    OURS,
    WARMUP_ROUNDS,
    Contender,
    best_of,
    gb_per_s,
    interleave,
    median_ratio,
    pair_up,
    prepare_machine,
    summarize,
)
from offload_adam.bench.peers import available_peers
from offload_adam.bench.planes import make_planes
from offload_adam.bench.report import comparison, machine_line, table
from offload_adam.cli.app import app
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores
from offload_adam.options import StateFormat
from offload_adam.version import __version__


class FakeClock:
    """A clock that contenders advance."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def taking(name: str, clock: FakeClock, *times_ms: float, bytes_per_param: int = 28) -> Contender:
    """Return a contender that takes the given milliseconds in turn, then always the last one."""
    left = list(times_ms)

    def run() -> None:
        clock.now_s += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

    return Contender(name, run, bytes_per_param)


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do not rest between turns, and restore torch's threads."""
    monkeypatch.setattr("offload_adam.bench.harness.REST_S", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_turns_alternate_and_warmups_and_preparation_do_not_count() -> None:
    clock, order = FakeClock(), []

    def contender(name: str, seconds: float) -> Contender:
        def run() -> None:
            order.append(name)
            clock.now_s += seconds

        def prepare() -> None:
            clock.now_s += 100.0

        return Contender(name, run, prepare=prepare)

    timings = interleave([contender("a", 0.5), contender("b", 0.25)], 3, clock=clock)
    assert timings == {"a": [500.0] * 3, "b": [250.0] * 3}
    assert "".join(order) == "abbaabbaab"
    assert len(order) == 2 * (3 + WARMUP_ROUNDS)


def test_a_ratio_is_the_median_over_pairs() -> None:
    pairs = pair_up([10.0, 20.0, 40.0], [30.0, 20.0, 20.0])
    assert [pair["ratio"] for pair in pairs] == [3.0, 1.0, 0.5]
    assert median_ratio(pairs) == 1.0


def test_bandwidth_counts_bytes_in_powers_of_ten() -> None:
    assert gb_per_s(28, 64_000_000, 32.0) == pytest.approx(56.0)


def test_results_hold_every_pair() -> None:
    clock = FakeClock()
    contenders = [taking(OURS, clock, 10.0), taking("peer", clock, 30.0, 30.0, 20.0, 25.0)]
    results = summarize(interleave(contenders, 7, clock=clock), contenders, 10**6)
    ours, peer = results
    assert (ours["name"], peer["name"]) == (OURS, "peer")
    assert ours["ratio_to_this"] == pytest.approx(1.0)
    assert peer["ratio_to_this"] == pytest.approx(2.5)
    assert len(peer["pairs"]) == 7
    assert peer["pairs"][0]["this_ms"] == pytest.approx(10.0)
    assert peer["pairs"][0]["ms"] == peer["ms_min"] == pytest.approx(20.0)
    assert peer["ms_median"] == pytest.approx(25.0)
    assert peer["gb_per_s"] == pytest.approx(28 / 25)
    best = best_of("best", ("peer", OURS), results)
    assert best == {**ours, "name": "best", "variant": OURS}


def test_memory_is_checked_before_it_is_allocated() -> None:
    with pytest.raises(HostMemoryError, match="Measure fewer parameters"):
        prepare_machine(1 << 60, 1)


def test_a_peer_that_is_not_installed_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    optimizers, left_out = available_peers(make_planes(128, huge_pages=False))
    assert optimizers == {}
    assert left_out["deepspeed_cpu_adam"].startswith("not importable")


def test_a_busy_machine_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_machine(0, 1)
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0, 1.0, 1.0))
    caplog.clear()
    assert machine.describe_machine(1)["busy"]
    assert "busy (load average 50.00" in caplog.text
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 1.0, 1.0))
    assert not machine.describe_machine(1)["busy"]


@pytest.mark.parametrize("measure", [kernel.measure_kernel, step.measure_step])
def test_a_report_has_results_and_the_machine(
    measure: Callable[[int, int, int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_adam.bench.peers.PEERS", {})
    report = json.loads(json.dumps(measure(3000, 1, 7)))
    results = {result["name"]: result for result in report["results"]}
    assert len(results) == len(report["results"])
    assert list(results)[:2] == ["offload_adam", "torch_fused"]
    assert ("torch_grad_scale" in results) == (report["benchmark"] == "step")
    for result in results.values():
        assert 0 < result["ms_min"] <= result["ms_median"]
        assert result["bytes_per_param"] > 0
        assert [pair["ratio"] for pair in result["pairs"]] == pytest.approx(
            [pair["ms"] / pair["this_ms"] for pair in result["pairs"]]
        )
        assert len(result["pairs"]) == 7
    for key in ("cpu", "cores_allowed", "num_threads", "threading_layer", "versions"):
        assert report["machine"][key]
    assert set(report["definitions"]) >= {"torch_fused", "ms_median", "ratio_to_this"}


@pytest.mark.parametrize(
    ("state_format", "nbytes", "cell"),
    [
        ("fp32", 2 + 2 + 2 + 2 * (4 + 4 + 4), "30"),
        ("bf16", 2 + 2 + 2 * (2 + 2 + 2 + 2), "20"),
        ("mixed", 2 + 2 + 2 * (2 + 1 + 2 + 1 + 2 / 128), "16.03"),
        ("int8", 2 + 2 + 2 * (2 + 1 + 1 + 1 + 2 / 128), "14.03"),
    ],
)
def test_bench_step_reports_bytes_and_arithmetic_of_each_format(
    state_format: StateFormat, nbytes: float, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"fp32": 4e9, "bf16": 3e9, "mixed": 2e9, "int8": 1e9}
    made = []

    def optimizer(tensors: object, num_threads: int, stored: str) -> SimpleNamespace:
        made.append(stored)
        return SimpleNamespace(step=lambda: None)

    monkeypatch.setattr("offload_adam.bench.peers.PEERS", {})
    monkeypatch.setattr(step, "offload_adam", optimizer)
    monkeypatch.setattr(step, "updates_per_s", rates.__getitem__)
    report = step.measure_step(3000, 1, 7, state_format)
    results = {result["name"]: result for result in report["results"]}
    assert results["offload_adam"]["bytes_per_param"] == nbytes
    assert ("offload_adam_fp32_state" in results) == (state_format != "fp32")
    text = "\n".join(comparison(report))
    row = next(line for line in text.splitlines() if line.startswith("| offload_adam "))
    assert row.split("|")[-3].strip() == cell
    assert f"offload_adam: one core updates {rates[state_format] / 1e9:.2f} G parameters/s" in text
    if state_format != "fp32":
        assert results["offload_adam_fp32_state"]["bytes_per_param"] == 30
        assert "offload_adam_fp32_state: one core updates 4.00 G parameters/s" in text
    assert made == list(dict.fromkeys([state_format, "fp32"]))


def test_bench_step_times_a_kept_step_and_deletes_its_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("offload_adam.bench.peers.PEERS", {})
    monkeypatch.setattr(step, "updates_per_s", lambda stored: 1e9)
    monkeypatch.setattr(step, "SHARED_MEMORY", str(tmp_path))
    with pytest.warns(UserWarning, match="is not in memory"):
        report = step.measure_step(3000, 1, 7, "bf16", keeps=True)
    results = {result["name"]: result for result in report["results"]}
    bytes_per_param = results["offload_adam"]["bytes_per_param"]
    assert results["offload_adam_kept"]["bytes_per_param"] == bytes_per_param + 2
    assert results["offload_adam_kept"]["ms_median"] > 0
    assert not list(tmp_path.iterdir())


def test_tables_are_aligned_and_long_cells_do_not_widen_them() -> None:
    lines = table(("a", "long header"), [("x|y", "1"), ("z", "a" * 60)])
    assert lines == [
        "| a    | long header |",
        "| ---- | ----------: |",
        "| x\\|y |           1 |",
        f"| z    | {'a' * 60} |",
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `offload-adam bench` and returns its exit code and output."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the command sets it; monkeypatch restores it
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("offload_adam.bench.peers.PEERS", {})

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bench", *arguments])
        return result.exit_code, result.output

    return invoke


def test_the_command_prints_a_table_and_writes_a_file(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = tmp_path / "kernel.json"
    code, output = run("kernel", "--numel", "2000", "--threads", "1", "--json", str(path))
    assert code == 0, output
    assert "offload_adam" in output
    assert "torch_fused" in output
    assert "1 thread(s)" in output
    assert json.loads(path.read_text())["numel"] == 2000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["kernel", "--pairs", "6"], "--pairs"),
        (["kernel", "--numel", "0"], "--numel"),
        (["step", "--threads", "0"], "--threads"),
        (["step", "--threads", str(allowed_cores() + 1)], "more than the"),
        (["fsdp2", "--threads", str(allowed_cores() + 1)], "more than the"),
        (["step", "--json", "/proc/missing/a.json"], "there is no folder"),
        (["kernel", "--json", "/"], "cannot be written"),
        (["kernel", "--json", "/dev/full"], "cannot be written"),
        (["kernel", "--json", 5000 * "x"], "cannot be written: File name too long"),
        (["step", "--json", 5000 * "x" + "/x"], "there is no folder"),
        (["kernel", "--numel", 5000 * "1"], "--numel: must be a number of at least 1"),
        (["kernel", "--numel", "1" + 400 * "0"], "--numel: must be a number of at least 1"),
        (["fsdp2", "--dtype", "fp16"], "--dtype"),
    ],
)
def test_a_wrong_option_ends_with_2_before_anything_is_measured(
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    problem: str,
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured in spite of a wrong option")

    for name in ("kernel", "step", "fsdp2"):
        monkeypatch.setattr(bench_main, f"measure_{name}", measured)
    code, output = run(*arguments)
    assert code == 2, output
    assert problem in output


def test_a_measurement_that_does_not_fit_says_so(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise HostMemoryError("needs 3 TiB")

    monkeypatch.setattr(bench_main, "measure_kernel", fail)
    assert run("kernel") == (3, "offload-adam: needs 3 TiB\n")


def test_a_report_that_cannot_be_written_ends_with_1(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bench_main, "write_json", fail)
    path = tmp_path / "x.json"
    code, output = run("kernel", "--numel", "2000", "--threads", "1", "--json", str(path))
    assert code == 1, output
    assert f"{path} cannot be written: No space left on device" in output
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_ends_the_command_with_1(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Fsdp2BenchmarkError("rank 1 failed")

    monkeypatch.setattr(bench_main, "measure_fsdp2", fail)
    assert run("fsdp2") == (1, "offload-adam: rank 1 failed\n")


def test_an_installed_package_has_a_version_but_no_commit() -> None:
    line = machine_line({**machine.describe_machine(1), "commit": None})
    assert "commit" not in line
    assert f"offload_adam {__version__}, torch {torch.__version__}" in line


def test_results_name_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert machine._commit(tmp_path) is None
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    assert machine._commit(tmp_path) == "0123abc"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@localhost"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    file = tmp_path / "file"
    file.write_text("as committed")
    git("add", "file")
    git("commit", "-q", "-m", "A file")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert machine._commit(tmp_path) == commit
    file.write_text("changed")
    assert machine._commit(tmp_path) == f"{commit}+"
