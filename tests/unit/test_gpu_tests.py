"""The logic of the GPU tests and of their script, tested without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_adam import OffloadAdam
from offload_adam.bench.training.contenders import OVERLAPPED, SEQUENTIAL, TORCHAO
from offload_adam.bench.training.measure import Steps
from offload_adam.bench.training.model import Sizes
from offload_adam.spans import SpanRecorder
from tests.gpu.batches import RATIO, NoBatchError, choose_batch, measure_and_choose
from tests.gpu.intervals import Interval, merged, shared, total, within
from tests.gpu.layers import assert_same_bits, bits, make, train
from tests.gpu.probe import PROBES, Report
from tests.gpu.test_overlap import timeline
from tests.gpu.test_two_ranks import train_rank
from tests.support.ranks import RankPool
from tests.support.scenario import Offloading

pytest_plugins = ("pytester",)

ROOT = Path(__file__).parents[2]

spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda x: Interval(x[0], x[0] + x[1])),
    max_size=8,
)


def units_of(intervals: list[Interval]) -> set[int]:
    """Return the unit steps that a union covers, one by one."""
    return {unit for start, end in intervals for unit in range(int(start), int(end))}


@given(one=spans, other=spans)
def test_intervals_are_counted_as_their_units_are(
    one: list[Interval], other: list[Interval]
) -> None:
    assert total(one) == len(units_of(one))
    assert shared(one, other) == shared(other, one) == len(units_of(one) & units_of(other))
    union = merged(one)
    assert all(left.end < right.start for left, right in pairwise(union))


def test_intervals_that_begin_in_a_window_are_within_it() -> None:
    found = within([Interval(0, 5), Interval(5, 6), Interval(9, 12)], [Interval(5, 10)])
    assert found == [Interval(5, 6), Interval(9, 12)]


def test_a_timeline_sorts_the_events_of_a_profiler() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, start: float, end: float, device: Any = cuda) -> Any:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=time_range, device_type=device)

    recorder = SpanRecorder()
    recorder.add("update", 0, 2_005_000, 2_007_000)
    recorder.add("norm", 0, 2_001_000, 2_002_000)
    found = timeline(
        [
            event("clock", 100.0, 101.0, cpu),
            event("at::cuda::spin_kernel(long)", 110.0, 110.5),
            event("at::cuda::spin_kernel(long)", 101.0, 102.0),
            event("at::cuda::spin_kernel(long)", 130.0, 131.0),
            event("ampere_gemm", 103.0, 106.0),
            event("ampere_gemm", 140.0, 141.0),
            event("ampere_gemm", 112.0, 128.0),
            event("Memcpy HtoD (Pinned -> Device)", 104.0, 105.0),
            event("Memcpy DtoH (Device -> Pinned)", 120.0, 121.0),
            event("Memset (Device)", 107.0, 108.0),
            event("aten::add", 103.0, 104.0, cpu),
        ],
        recorder,
        clock_us=2000.0,
    )
    assert found.forwards == [Interval(103.0, 106.0)]
    assert found.backwards == [Interval(112.0, 128.0)]
    assert found.up == [Interval(104.0, 105.0)]
    assert found.down == [Interval(120.0, 121.0)]
    # 5 microseconds after the moment at which the profiler's clock was 100.
    assert found.updates == [Interval(105.0, 107.0)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
def test_simulated_offloading_gives_the_bits_of_plain_steps(
    overlap: bool, state_format: str
) -> None:
    results = []
    for kind, overlapped in ((OffloadAdam, False), (Offloading, overlap)):
        model, optimizer = make("cpu", kind, overlap=overlapped, state_format=state_format)
        train(model, optimizer, range(3), "cpu")
        assert optimizer.last_step is not None
        assert optimizer.last_step.clip_factor < 1.0
        results.append(bits(model, optimizer))
        optimizer.close()
    assert_same_bits(*results)
    results[1][0]["exp_avg"][0, 0] += 1.0
    with pytest.raises(AssertionError):
        assert_same_bits(*results)


def test_two_ranks_with_simulated_offloading_give_the_bits_of_plain_steps(ranks: RankPool) -> None:
    expected = ranks.run(train_rank, 2, "cpu", OffloadAdam, False)
    found = ranks.run(train_rank, 2, "cpu", Offloading, True)
    for mine, reference in zip(found, expected, strict=True):
        assert_same_bits(mine, reference)


@pytest.mark.parametrize("name", PROBES)
def test_the_probe_measures_the_host_without_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "probe.json"
    report = Report(file)
    PROBES[name](report)
    values = json.loads(file.read_text())
    assert values == report.values
    assert report.failed == []
    if name == "bus":
        assert values["commit_s_per_gib"] > 0
        assert values["machine"]["versions"]["torch"]
        return
    rates = [value["gb_per_s"] for name, value in values.items() if name.startswith("update_")]
    assert rates
    assert min(rates) > 0


def test_a_measurement_that_fails_does_not_stop_the_next_one(tmp_path: Path) -> None:
    report = Report(tmp_path / "probe.json")

    def fail() -> None:
        report.note("before", 1)
        raise RuntimeError("refused")

    report.attempt("pinning", fail)
    report.attempt("update", lambda: report.note("after", 2))
    found = {"before": 1, "pinning_failed": "RuntimeError: refused", "after": 2}
    assert json.loads((tmp_path / "probe.json").read_text()) == report.values == found
    assert report.failed == ["pinning"]


def alone(forward_ms: dict[int, float], gib: float = 0.1) -> dict[int, Steps]:
    """Return times of the model alone; `gib` is the memory of a sequence."""
    return {
        batch: Steps(
            steps_ms=(4 * ms,),
            forward_ms=ms,
            peak_gpu_nbytes=int((1.0 + gib * batch) * 2**30),
        )
        for batch, ms in forward_ms.items()
    }


def test_the_batch_of_the_overlap_has_a_forward_longer_than_the_update() -> None:
    # An H100: 64 sequences take 15 ms, and the update 25. 1.5 times as much are 37.5 ms.
    forward_ms = {8: 2.2, 64: 15.08}  # 0.36 + 0.23 a sequence
    batch = choose_batch(alone(forward_ms), 25.0, 80 * 2**30)
    assert batch == 161
    assert pytest.approx(0.36 + 0.23 * batch, rel=0.01) == RATIO * 25.0
    assert choose_batch(alone(forward_ms, gib=9.0), 25.0, None) == 161


@pytest.mark.parametrize(
    ("times", "update_ms", "gib", "reason"),
    [
        ({8: 2.2, 64: 15.08}, 25.0, 0.5, "161 sequences would take 81.5 GiB of 80.0 GiB free"),
        ({8: 2.2, 64: 15.08}, 300.0, 0.1, "F would be longer than 400 ms"),
        ({8: 2.2}, 25.0, 0.1, "fewer than two batches fit into the GPU"),
    ],
)
def test_the_error_without_a_suitable_batch_has_the_measured_times(
    times: dict[int, float], update_ms: float, gib: float, reason: str
) -> None:
    with pytest.raises(NoBatchError, match=reason) as raised:
        choose_batch(alone(times, gib), update_ms, 80 * 2**30)
    assert f"F = {times} ms by number of sequences, U = {update_ms} ms" in str(raised.value)


def test_a_batch_is_measured_and_chosen_on_a_cpu() -> None:
    tiny = Sizes(num_layers=1, width=8, num_heads=2, vocabulary=16, sequence_length=4)
    try:
        assert measure_and_choose(tiny, torch.device("cpu")) >= 1
    except NoBatchError as error:
        assert "U = " in str(error)  # noqa: PT017 - how fast a busy CPU is decides


def test_everything_for_a_gpu_is_imported_with_the_required_packages_alone() -> None:
    files = [*ROOT.glob("tests/gpu/*.py"), *ROOT.glob("offload_adam/bench/**/*.py")]
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in sorted(files)]
    assert "offload_adam.bench.training.measure" in modules
    # Blocks all packages except the required ones and their own requirements.
    code = f"""
import importlib, importlib.metadata, re, sys

allowed, unseen = set(), ["torch", "numba", "numpy", "psutil", "pytest"]
while unseen:
    name = re.sub("[-_.]+", "-", unseen.pop()).lower()
    if name not in allowed:
        allowed.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        unseen += [re.match("[A-Za-z0-9._-]+", r)[0] for r in required if "extra ==" not in r]
blocked = {{
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not any(re.sub("[-_.]+", "-", owner).lower() in allowed for owner in owners)
}} - {{"offload_adam", "tests"}}
blocked |= {{"pydantic", "rich", "typer", "vl_convert", "yaml", "hypothesis", "pytest_timeout"}}
sys.modules.update(dict.fromkeys(blocked))
for name in {["tests.conftest", *modules]}: importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=110)


STAND_IN = """#!/usr/bin/env bash
# Replaces Python: logs its arguments, and fails or hangs for some of them.
arguments="$*"
[[ "$arguments" != *"import pytest_timeout"* ]] || exit 1
echo "$arguments" >>"$OUT/asked"
[[ "$arguments" != *warm_up* ]] || sleep 1
[[ "$arguments" != *test_nccl.py* ]] || { echo "a test failed"; exit 1; }
[[ "$arguments" != "-m pytest tests/gpu "* ]] || exit 3
# A grandchild in a group of its own outlives its parent, and keeps the output open.
[[ "$arguments" != *test_two_ranks.py* ]] || { setsid sleep 50 & exec sleep 50; }
"""


def run_script(folder: Path, *arguments: str, stand_in: str = STAND_IN) -> Any:
    python = folder / "python"
    python.write_text(stand_in)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(folder / "out")}
    (folder / "out").mkdir()
    return subprocess.run(
        ["bash", ROOT / "tests" / "gpu" / "run.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


WARM_UP = "-m tests.gpu.warm_up"


def asked_in_turn(out: Path) -> list[str]:
    """Return the logged arguments in order, without the warm-up, which runs in parallel."""
    asked = (out / "asked").read_text().splitlines()
    return [line for line in asked if line != WARM_UP]


def test_a_part_continues_after_a_step_that_fails_or_hangs(tmp_path: Path) -> None:
    start_s = time.monotonic()
    run = run_script(tmp_path, "--time-limit", "24", "part-1")
    assert time.monotonic() - start_s < 45.0
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.endswith("FAILED: nccl two_ranks\n"), run.stdout + run.stderr
    out = tmp_path / "out"
    assert WARM_UP in (out / "asked").read_text().splitlines()
    asked = asked_in_turn(out)
    assert asked[1] == f"-m tests.gpu.probe bus {out}/bus.json"
    assert asked[-1] == f"-m tests.gpu.probe update {out}/update.json"
    log = (out / "part-1.log").read_text()
    assert re.search(r"a test failed\n== nccl ended with 1 after \d+ s", log)
    assert "== two_ranks ended with 124 after" in log
    assert "== update ended with 0 after" in log
    tests = [line for line in asked if line.startswith("-m pytest ")]
    assert all(f"--results={out}/part-1.jsonl" in line for line in tests)
    assert not any("--timeout" in line for line in tests)
    files = {file.name for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    named = [word for line in tests for word in line.split() if word.startswith("tests/gpu/")]
    assert sorted(named) == sorted(f"tests/gpu/{name}" for name in files)


def test_tests_that_fail_do_not_prevent_the_measurement(tmp_path: Path) -> None:
    run = run_script(tmp_path)
    assert run.returncode == 3, run.stdout + run.stderr
    asked = (tmp_path / "out" / "asked").read_text().splitlines()
    assert asked[0].startswith("-m pytest tests/gpu ")
    assert asked[-1].startswith("-m offload_adam.bench train --json ")


def test_the_measurement_takes_options_and_a_time_limit(tmp_path: Path) -> None:
    run = run_script(tmp_path, "--time-limit", "100", "part-2", "--batches", "3", "--width=64")
    assert run.returncode == 0, run.stdout + run.stderr
    (asked,) = asked_in_turn(tmp_path / "out")
    assert asked.startswith("-m offload_adam.bench train --json")
    assert re.search(r"--batches 48,144 .*--time-limit [678]\d --batches 3 --width=64$", asked)


def test_results_are_kept_as_soon_as_a_test_ends(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = gpu")
    pytester.makepyfile(
        """
        import os, pytest, torch
        torch.cuda.is_available = lambda: True
        def test_that_passes(): pass
        def test_that_fails(): assert 1 == 2
        def test_that_is_skipped(): pytest.skip("too small")
        @pytest.fixture
        def broken(): raise RuntimeError("no device")
        def test_that_has_an_error(broken): pass
        def test_that_crashes(): os._exit(3)
        """
    )
    file = pytester.path / "results.jsonl"
    pytester.runpytest_subprocess(f"--results={file}", "-p", "no:cacheprovider")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    outcomes = [(one["test"].rpartition("_")[2], one["outcome"]) for one in found]
    assert outcomes == [
        ("passes", "passed"),
        ("fails", "failed"),
        ("skipped", "skipped"),
        ("error", "failed"),
    ]
    texts = [one.get("text", "") for one in found]
    for text, said in zip(texts, ["", "assert 1 == 2", "too small", "no device"], strict=True):
        assert said in text


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_parts_run_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}

    def run(*arguments: str) -> Any:
        return subprocess.run(
            ["bash", ROOT / "tests" / "gpu" / "run.sh", "--time-limit", "150", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=160,
        )

    tests = run("part-1")
    assert tests.returncode == 1, tests.stdout + tests.stderr
    # No test ran, and both probes did.
    failed = "FAILED: nccl two_ranks streams bits use overlap\n"
    assert tests.stdout.endswith(failed), tests.stdout + tests.stderr
    assert json.loads((tmp_path / "bus.json").read_text())["commit_s_per_gib"] > 0
    assert json.loads((tmp_path / "update.json").read_text())["construct"]["numel"] > 0
    lines = (tmp_path / "part-1.jsonl").read_text().splitlines()
    assert {json.loads(line)["outcome"] for line in lines} == {"skipped"}
    sizes = ["--num-layers=1", "--width=8", "--num-heads=2", "--vocabulary=16"]
    names = f"--contenders={OVERLAPPED},{SEQUENTIAL},{TORCHAO}"
    training = run("part-2", *sizes, "--sequence-length=4", "--batches=1", names)
    assert training.returncode == 0, training.stdout + training.stderr
    (point,) = json.loads((tmp_path / "training.json").read_text())["points"]
    assert point["contenders"][OVERLAPPED]["step_ms"] > 0
    assert point["bucket_ms"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_fails_where_no_test_ran() -> None:
    script = ROOT / "tests" / "gpu" / "run.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", script, "tests", "-q", "-p", "no:cacheprovider"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode != 0
    assert "no gpu test passed" in run.stdout, run.stdout + run.stderr
    run = subprocess.run(
        ["bash", script, "bench"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0
    assert "there is no GPU to measure" in run.stderr
