"""The logic of the tests that need a GPU, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_adam import OffloadAdam
from offload_adam.bench.training.contenders import SEQUENTIAL
from offload_adam.bench.training.model import Sizes
from offload_adam.spans import SpanRecorder
from tests.gpu.intervals import Interval, merged, shared, total, within
from tests.gpu.layers import assert_same_bits, bits, make, train
from tests.gpu.probe import probe
from tests.gpu.test_overlap import timeline
from tests.gpu.test_two_ranks import train_rank
from tests.gpu.training import MODEL_ALONE, measure_all
from tests.support.ranks import RankPool
from tests.support.scenario import Offloading

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


def test_what_begins_in_a_window_is_within() -> None:
    found = within([Interval(0, 5), Interval(5, 6), Interval(9, 12)], [Interval(5, 10)])
    assert found == [Interval(5, 6), Interval(9, 12)]


def test_a_timeline_sorts_what_a_profiler_saw() -> None:
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
def test_the_model_of_the_bits_trains_alike_where_its_state_is_taken_away(overlap: bool) -> None:
    results = []
    for kind, overlapped in ((OffloadAdam, False), (Offloading, overlap)):
        model, optimizer = make("cpu", kind, overlap=overlapped)
        train(model, optimizer, range(3), "cpu")
        assert optimizer.last_step is not None
        assert optimizer.last_step.clip_factor < 1.0
        results.append(bits(model, optimizer))
        optimizer.close()
    assert_same_bits(*results)
    results[1][0]["exp_avg"][0, 0] += 1.0
    with pytest.raises(AssertionError):
        assert_same_bits(*results)


def test_two_ranks_have_the_bits_of_two_that_offload(ranks: RankPool) -> None:
    expected = ranks.run(train_rank, 2, "cpu", OffloadAdam, False)
    found = ranks.run(train_rank, 2, "cpu", Offloading, True)
    for mine, reference in zip(found, expected, strict=True):
        assert_same_bits(mine, reference)


def test_the_probe_measures_the_host_of_a_machine_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = probe(tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text()) == values
    assert values["commit_s_per_gib"] > 0
    rates = [value["gb_per_s"] for name, value in values.items() if name.startswith("update_")]
    assert rates
    assert min(rates) > 0


def test_the_measurement_writes_what_was_found_and_what_was_not(tmp_path: Path) -> None:
    tiny = Sizes(num_layers=1, width=8, num_heads=2, vocabulary=16, sequence_length=4)
    report = tmp_path / "training.json"
    rows = measure_all(
        report, 100.0, sizes=tiny, batches=(1,), num_steps=1, names=[MODEL_ALONE, "nobody"]
    )
    assert json.loads(report.read_text())["found"] == json.loads(json.dumps(rows))
    assert rows[0]["alone"][1]["forward_ms"] > 0
    assert "KeyError: 'nobody'" in rows[1]["error"]
    late = measure_all(report, 0.0, sizes=tiny, names=[SEQUENTIAL])
    assert late[0]["left_out"] == "no time is left"


def test_everything_for_a_gpu_is_imported_with_the_required_packages_alone() -> None:
    modules = sorted(f"tests.gpu.{file.stem}" for file in (ROOT / "tests" / "gpu").glob("*.py"))
    blocked = ("pydantic", "plotly", "rich", "typer", "yaml", "hypothesis", "safetensors")
    code = (
        "import sys, importlib\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        f"for name in {['tests.conftest', *modules]}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=110)


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_failed_step_of_a_part_does_not_stop_the_next_one(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", ROOT / "tests" / "gpu" / "run.sh", "--time-limit", "300", "part-1"],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=310,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    # The probe comes after tests that fail, because none of them ran.
    assert "FAILED: nccl side_stream two_ranks tests\n" in run.stdout, run.stdout + run.stderr
    assert json.loads((tmp_path / "probe.json").read_text())["commit_s_per_gib"] > 0


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
