"""The logic of the tests that need a GPU, without one."""

from __future__ import annotations

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
from offload_adam.spans import SpanRecorder
from tests.gpu.intervals import Interval, merged, shared, total, within
from tests.gpu.layers import assert_same_bits, bits, make, train
from tests.gpu.test_overlap import timeline
from tests.support.devices import HOST_AS_DEVICE

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
    class Offloading(OffloadAdam):
        _backend = HOST_AS_DEVICE

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
