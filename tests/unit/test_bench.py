"""The benchmarks' arithmetic on a clock that is told what to show, and their reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from offload_adam.bench import comparison, kernel, machine, planes, rows, step, tensors
from offload_adam.bench.comparison import Yardsticks, compare
from offload_adam.bench.interleave import WARMUP_ROUNDS, Turn, interleave
from offload_adam.bench.limit import LimitRefusedError, choose_limit, gb_per_s
from offload_adam.bench.peers import available_peers
from offload_adam.bench.report import print_report
from offload_adam.bench.results import BASELINE, median_ratio, pair_up
from offload_adam.bench.step_contenders import CLIPPED, SCALED
from offload_adam.cli.app import app
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores


class FakeClock:
    """Shows the seconds that turns say they have taken."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeContender:
    """Takes the given milliseconds, one after the other, the last one for ever."""

    memory = planes.HUGE_PAGES

    def __init__(
        self, name: str, clock: FakeClock, *times_ms: float, bytes_per_param: int = 28
    ) -> None:
        self.name = name
        self.bytes_per_param = bytes_per_param
        self._clock = clock
        self._times_ms = list(times_ms)

    def run(self) -> None:
        """Take the next time."""
        time_ms = self._times_ms.pop(0) if len(self._times_ms) > 1 else self._times_ms[0]
        self._clock.now_s += time_ms / 1e3


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do not rest between turns, and leave torch's threads as they were."""
    monkeypatch.setattr("offload_adam.bench.interleave.REST_S", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_turns_alternate_and_warmups_and_preparation_do_not_count() -> None:
    clock, order = FakeClock(), []

    def turn(name: str, seconds: float) -> Turn:
        def run() -> None:
            order.append(name)
            clock.now_s += seconds

        def prepare() -> None:
            clock.now_s += 100.0

        return Turn(name, run, prepare)

    timings = interleave([turn("a", 0.5), turn("b", 0.25)], 3, clock=clock)
    assert timings == {"a": [500.0] * 3, "b": [250.0] * 3}
    assert "".join(order) == "abbaabbaab"
    assert len(order) == 2 * (3 + WARMUP_ROUNDS)


def test_a_ratio_is_the_median_over_pairs() -> None:
    pairs = pair_up([10.0, 20.0, 40.0], [30.0, 20.0, 20.0])
    assert [pair.ratio for pair in pairs] == [3.0, 1.0, 0.5]
    assert median_ratio(pairs) == 1.0


def test_bandwidth_counts_bytes_in_powers_of_ten() -> None:
    assert gb_per_s(28, 64_000_000, 32.0) == pytest.approx(56.0)


def test_the_fastest_pass_is_the_limit() -> None:
    clock = FakeClock()
    slow, fast = FakeContender("slow", clock, 1.0), FakeContender("fast", clock, 1.0)
    copy = FakeContender("copy", clock, 1.0, bytes_per_param=8)
    timings = {"slow": [5.0, 6.0, 5.0], "fast": [3.0, 4.0, 90.0], "copy": [1.2, 1.2, 1.2]}
    limit = choose_limit(timings, [slow, fast], [copy], 10**6)
    assert (limit.name, limit.ms_median, limit.gb_per_s) == ("fast", 4.0, 7.0)
    assert limit.measured_gb_per_s["copy"] == pytest.approx(8 / 1.2)
    # 7 GB/s, against a copy at 8: under 0.9.
    with pytest.raises(LimitRefusedError, match=r"7\.0 GB/s, under 0\.9 of a plain copy's 8\.0"):
        choose_limit({**timings, "copy": [1.0] * 3}, [slow, fast], [copy], 10**6)


def contenders_and_yardsticks(
    clock: FakeClock, *limit_ms: float
) -> tuple[list[FakeContender], Yardsticks]:
    """Return this package at 10 ms, a peer at 25 ms, a copy at 3 ms and a limit as given."""
    contenders = [FakeContender(BASELINE, clock, 10.0), FakeContender("peer", clock, 25.0)]
    copy = FakeContender("copy", clock, 3.0, bytes_per_param=8)
    return contenders, Yardsticks([FakeContender("limit", clock, *limit_ms)], [copy])


def test_a_comparison_holds_every_pair() -> None:
    clock = FakeClock()
    contenders, measures = contenders_and_yardsticks(clock, 9.0)
    found = compare(contenders, measures, 10**6, 7, clock=clock)
    ours, peer = found.results
    assert found.limit_ratio == pytest.approx(0.9)
    assert (ours.name, peer.name) == (BASELINE, "peer")
    assert ours.ratio_to_this == pytest.approx(1.0)
    assert peer.ratio_to_this == pytest.approx(2.5)
    assert len(peer.pairs) == 7
    assert peer.pairs[0].this_ms == pytest.approx(10.0)
    assert peer.pairs[0].ms == pytest.approx(25.0)
    assert peer.ms_median == pytest.approx(25.0)
    assert peer.gb_per_s == pytest.approx(28 / 25)


def test_a_refused_limit_is_measured_again() -> None:
    clock = FakeClock()
    # 28 bytes in 40 ms, against 8 in 3 ms: refused, once.
    disturbed = [40.0] * (7 + WARMUP_ROUNDS)
    contenders, measures = contenders_and_yardsticks(clock, *disturbed, 9.0)
    assert compare(contenders, measures, 10**6, 7, clock=clock).limit.ms_median == pytest.approx(9)


def test_a_limit_that_is_always_refused_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "NUM_ATTEMPTS", 2)
    clock = FakeClock()
    contenders, measures = contenders_and_yardsticks(clock, 40.0)
    with pytest.raises(LimitRefusedError, match="something else used the machine"):
        compare(contenders, measures, 10**6, 7, clock=clock)


def test_an_overhead_is_what_comes_on_top_of_plain_backward() -> None:
    timings = {
        "many plain": [50.0, 60.0, 50.0],
        "many drop_in": [62.0, 72.0, 80.0],
        "one plain": [20.0, 20.0, 20.0],
        "one drop_in": [30.0, 30.0, 30.0],
    }
    found = tensors.overhead(timings, tensors.DROP_IN)
    assert (found.many_ms, found.one_ms) == (12.0, 10.0)
    assert found.ratio == pytest.approx(1.2)
    assert [pair.ratio for pair in found.pairs] == pytest.approx([1.2, 1.2, 3.0])
    with pytest.raises(tensors.MeasurementError, match="drop_in step took no longer"):
        tensors.overhead({**timings, "one plain": [20.0, 30.0, 20.0]}, tensors.DROP_IN)


def test_memory_is_asked_for_before_it_is_taken() -> None:
    with pytest.raises(HostMemoryError, match="measure fewer parameters"):
        planes.require_memory(1 << 60)


def test_a_peer_that_is_not_installed_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    optimizers, left_out = available_peers(planes.make_planes(128, planes.ORDINARY))
    assert optimizers == {}
    assert left_out["deepspeed_cpu_adam"].startswith("not importable")


def test_a_busy_machine_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison.use_threads(1)
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0, 1.0, 1.0))
    with pytest.warns(RuntimeWarning, match=r"busy \(load average 50\.00"):
        found = machine.describe_machine(1)
    assert found["busy"]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 1.0, 1.0))
    assert not machine.describe_machine(1)["busy"]


@pytest.mark.filterwarnings("ignore:the machine is busy")
@pytest.mark.parametrize("measure", [kernel.measure_kernel, step.measure_step])
def test_a_report_holds_what_was_measured_and_on_what(
    measure: Callable[[int, int, int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_adam.bench.limit.LEAST_SHARE_OF_COPY", 0.0)  # all in cache here
    monkeypatch.setattr("offload_adam.bench.peers.PEERS", {})
    report = json.loads(json.dumps(measure(3000, 1, 7)))
    results = {result["name"]: result for result in report["results"]}
    assert len(results) == len(report["results"])
    assert {"offload_adam", "torch_fused", "torch_fused_huge_pages"} <= set(results)
    assert report["limit"]["ms_median"] > 0
    assert report["limit"]["gb_per_s"] > 0
    assert len(report["limit"]["pairs_ms"]) == 7
    assert report["limit_ratio"] > 0
    for result in results.values():
        assert 0 < result["ms_min"] <= result["ms_median"]
        assert result["bytes_per_param"] > 0
        assert [pair["ratio"] for pair in result["pairs"]] == pytest.approx(
            [pair["ms"] / pair["this_ms"] for pair in result["pairs"]]
        )
        assert len(result["pairs"]) == 7
    for key in ("cpu", "cores_allowed", "num_threads", "threading_layer", "versions"):
        assert report["machine"][key]
    assert ("denormal_ratio" in report) == (report["benchmark"] == "kernel")
    assert ("bound" in report) == (report["benchmark"] == "step")


def test_the_bound_is_this_steps_bytes_at_the_limits_bandwidth() -> None:
    clock = FakeClock()
    ours = FakeContender(BASELINE, clock, 12.0, bytes_per_param=30)
    torchs = FakeContender(SCALED, clock, 20.0, bytes_per_param=48)
    _, measures = contenders_and_yardsticks(clock, 8.4)  # 28 bytes
    found = compare([ours, torchs], measures, 10**6, 7, clock=clock)
    bound = step.bandwidth_bound(found.limit, *found.results)
    assert bound.ms == pytest.approx(9.0)
    assert bound.ratio_to_torch_fused == pytest.approx(0.45)


def test_torchs_baseline_is_the_faster_of_its_ways_in_each_memory() -> None:
    clock = FakeClock()
    # The names of four real entries, with times of our own.
    names = {
        BASELINE: 10.0,
        CLIPPED: 30.0,
        SCALED: 20.0,
        f"{CLIPPED}_huge_pages": 15.0,
        f"{SCALED}_huge_pages": 18.0,
    }
    contenders = [FakeContender(name, clock, ms) for name, ms in names.items()]
    _, measures = contenders_and_yardsticks(clock, 9.0)
    results = step.with_torch_fused(compare(contenders, measures, 10**6, 7, clock=clock).results)
    assert [(one.name, one.variant) for one in results[:3]] == [
        (BASELINE, None),
        ("torch_fused", SCALED),
        ("torch_fused_huge_pages", f"{CLIPPED}_huge_pages"),
    ]
    assert results[1].ratio_to_this == pytest.approx(2.0)
    assert len(results) == len(names) + 2


@pytest.mark.filterwarnings("ignore:the machine is busy")
def test_the_report_on_tensors_holds_both_uses() -> None:
    # This thread's own time: what else runs on the machine does not turn a difference around.
    measured = tensors.measure_tensors(20, 256, torch.bfloat16, 1, 7, clock=time.thread_time)
    report = json.loads(json.dumps(measured))
    assert report["shapes"]["one"] == {"num_tensors": 1, "numel": 20 * 256}
    assert report["dtype"] == "bfloat16"
    for use in ("drop_in", "streaming"):
        found = report["uses"][use]
        assert found["ratio"] > 0
        assert len(found["pairs"]) == 7


def test_the_lazy_updates_ratio_is_the_median_over_the_pairs() -> None:
    found = rows.compare_rows({rows.LAZY: [10.0, 20.0, 90.0], rows.DENSE: [100.0, 50.0, 300.0]})
    assert (found["lazy_ms"], found["dense_ms"], found["ratio"]) == (2.0, 100.0, 0.03)
    assert found["pairs"][1] == {"lazy_ms": 2.0, "dense_ms": 50.0, "ratio": 0.04}


@pytest.mark.filterwarnings("ignore:the machine is busy")
def test_the_report_on_rows_is_complete_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(json.dumps(rows.measure_rows(500, 3, 20, 1, 7)))
    assert (report["num_rows"], report["width"], report["touched"]) == (500, 3, 20)
    assert len(report["pairs"]) == 7
    print_report(report, Console(width=100))
    assert "20 rows of 500 x 3" in capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Return what runs `offload-adam bench` and gives its exit code and all that it printed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that what the command sets is undone
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("offload_adam.bench.peers.PEERS", {})
    monkeypatch.setattr("offload_adam.bench.limit.LEAST_SHARE_OF_COPY", 0.0)

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
        (["tensors", "--dtype", "int8"], "int8"),
        (["tensors", "--json", "/proc/missing/a.json"], "there is no folder"),
        (["kernel", "--json", "/"], "cannot be written"),
        (["rows", "--num-rows", "10", "--touched", "11"], "11 is more than the 10 rows"),
    ],
)
def test_a_wrong_option_ends_with_2_before_anything_is_measured(
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    problem: str,
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured all the same")

    for module, name in ((kernel, "kernel"), (step, "step"), (tensors, "tensors"), (rows, "rows")):
        monkeypatch.setattr(module, f"measure_{name}", measured)
    code, output = run(*arguments)
    assert code == 2, output
    assert problem in output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LimitRefusedError("the limit was refused"), 1),
        (tensors.MeasurementError("took no longer"), 1),
        (HostMemoryError("needs 3 TiB"), 3),
    ],
)
def test_a_measurement_that_fails_says_why(
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(kernel, "measure_kernel", fail)
    found, output = run("kernel")
    assert (found, f"offload-adam: {error}\n") == (code, output)


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
