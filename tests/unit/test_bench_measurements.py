"""The developers' measurements in tests/bench: their arithmetic on a fake clock, and reports."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload_adam.bench.harness import OURS, WARMUP_ROUNDS, Contender
from offload_adam.bench.planes import fill_with_noise, make_planes
from offload_adam.bench.step import CLIPPED, SCALED
from tests.bench import command, limit, rows, tensors
from tests.bench.command import DisturbedError
from tests.bench.limit import (
    choose_limit,
    compare,
    measure_limit,
    numba_pass,
    plain_copy,
    torch_pass,
)
from tests.unit.test_bench import FakeClock, taking


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do not rest between turns, and restore torch's threads."""
    monkeypatch.setattr("offload_adam.bench.harness.REST_S", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize(
    "make", [lambda name, planes: numba_pass(name, planes, num_threads=2), torch_pass, plain_copy]
)
def test_a_limit_changes_no_bit(huge_pages: bool, make: Callable[..., Contender]) -> None:
    planes = make_planes(5000, huge_pages)
    fill_with_noise(planes.exp_avg)
    every = (planes.gradient, planes.master_weight, planes.exp_avg, planes.exp_avg_sq)
    before = [stream.clone() for stream in every]
    make("limit", planes).run()
    for stream, expected in zip(every, before, strict=True):
        torch.testing.assert_close(stream, expected, rtol=0, atol=0)


def test_the_fastest_pass_is_the_limit() -> None:
    clock = FakeClock()
    slow, fast = taking("slow", clock, 1.0), taking("fast", clock, 1.0)
    copies = [taking(name, clock, 1.0, bytes_per_param=8) for name in ("copy", "slow copy")]
    timings = {
        "slow": [5.0, 6.0, 5.0],
        "fast": [3.0, 4.0, 90.0],
        "copy": [1.2, 1.2, 1.2],
        "slow copy": [8.0, 8.0, 8.0],
    }
    name, measured = choose_limit(timings, [slow, fast], copies, 10**6)
    assert (name, measured["fast"]) == ("fast", 7.0)
    assert measured["copy"] == pytest.approx(8 / 1.2)
    # 7 GB/s, against a copy at 8: under 0.9.
    with pytest.raises(DisturbedError, match=r"7\.0 GB/s, under 0\.9 of a plain copy's 8\.0"):
        choose_limit({**timings, "copy": [1.0] * 3}, [slow, fast], copies, 10**6)


def compared(*limit_ms: float, ours: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Compare contenders with a limit that takes the given times, and a copy at 3 ms."""
    clock = FakeClock()
    contenders = [taking(name, clock, ms) for name, ms in (ours or {OURS: 10.0, "b": 25.0}).items()]
    limit_pass = taking("limit", clock, *limit_ms)
    copy = taking("copy", clock, 3.0, bytes_per_param=8)
    return compare(contenders, [limit_pass], [copy], 10**6, 7, clock=clock)


def test_the_limits_ratio_and_bound() -> None:
    found = compared(9.0)
    assert (found["limit"], found["limit_ms"]) == ("limit", pytest.approx(9.0))
    assert found["limit_ratio"] == pytest.approx(0.9)
    clock = FakeClock()
    ours = taking(OURS, clock, 12.0, bytes_per_param=30)
    torchs = taking("torch_fused", clock, 20.0, bytes_per_param=48)
    limit_pass = taking("limit", clock, 8.4)  # 28 bytes
    copy = taking("copy", clock, 3.0, bytes_per_param=8)
    found = compare([ours, torchs], [limit_pass], [copy], 10**6, 7, clock=clock)
    assert found["bound_ms"] == pytest.approx(9.0)
    assert found["bound_ratio"] == pytest.approx(0.45)


def test_a_disturbed_limit_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # 28 bytes in 40 ms, against 8 in 3 ms: disturbed, once.
    disturbed = [40.0] * (7 + WARMUP_ROUNDS)
    assert compared(*disturbed, 9.0)["limit_ms"] == pytest.approx(9.0)
    monkeypatch.setattr(command, "NUM_ATTEMPTS", 2)
    with pytest.raises(DisturbedError, match="on a quiet machine"):
        compared(40.0)


def test_torchs_baseline_is_the_faster_of_its_ways_in_each_memory() -> None:
    times = {
        OURS: 10.0,
        CLIPPED: 30.0,
        SCALED: 20.0,
        f"{CLIPPED}_huge_pages": 15.0,
        f"{SCALED}_huge_pages": 18.0,
    }
    results = compared(9.0, ours=times)["results"]
    assert [(one["name"], one["variant"]) for one in results[:3]] == [
        (OURS, None),
        ("torch_fused", SCALED),
        ("torch_fused_huge_pages", f"{CLIPPED}_huge_pages"),
    ]
    assert results[1]["ratio_to_this"] == pytest.approx(2.0)
    assert len(results) == len(times) + 2


@pytest.mark.parametrize("work", ["kernel", "step"])
def test_the_report_on_the_limit_is_complete(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "LEAST_SHARE_OF_COPY", 0.0)  # so few bytes stay in the cache
    report = json.loads(json.dumps(measure_limit(work, 3000, 1, 7)))
    names = [result["name"] for result in report["results"]]
    assert names[:3] == [OURS, "torch_fused", "torch_fused_huge_pages"]
    assert len(set(names)) == len(names)
    assert min(report["limit_ms"], report["limit_ratio"], report["bound_ratio"]) > 0
    assert ("denormal_ratio" in report) == (work == "kernel")
    text = "\n".join(limit.show(report))
    assert f"bench limit {work}: 3,000 parameters" in text
    assert "limit (numba, huge pages)" in text
    with pytest.raises(ValueError, match='"kernel" or "step"'):
        measure_limit("other")


def test_an_overhead_is_the_time_on_top_of_plain_backward() -> None:
    timings = {
        "many plain": [50.0, 60.0, 50.0],
        "many drop_in": [62.0, 72.0, 80.0],
        "one plain": [20.0, 20.0, 20.0],
        "one drop_in": [30.0, 30.0, 30.0],
    }
    found = tensors.overhead(timings, tensors.DROP_IN)
    assert (found["many_ms"], found["one_ms"]) == (12.0, 10.0)
    assert found["ratio"] == pytest.approx(1.2)
    assert [pair["ratio"] for pair in found["pairs"]] == pytest.approx([1.2, 1.2, 3.0])
    with pytest.raises(DisturbedError, match="drop_in step took no longer"):
        tensors.overhead({**timings, "one plain": [20.0, 30.0, 20.0]}, tensors.DROP_IN)


def test_the_report_on_tensors_holds_both_uses() -> None:
    # Processor time of this thread: other processes then cannot make a difference negative.
    measured = tensors.measure_tensors(20, 256, "bfloat16", 1, 7, clock=time.thread_time)
    report = json.loads(json.dumps(measured))
    assert report["shapes"] == {"many": [20, 256], "one": [1, 20 * 256]}
    for use in ("drop_in", "streaming"):
        assert report["uses"][use]["ratio"] > 0
        assert len(report["uses"][use]["pairs"]) == 7
    assert "20 of 256 bfloat16 against one of 5,120" in "\n".join(tensors.show(report))


def test_the_lazy_updates_ratio_is_the_median_over_the_pairs() -> None:
    found = rows.compare_rows({rows.LAZY: [10.0, 20.0, 90.0], OURS: [100.0, 50.0, 300.0]})
    assert (found["lazy_ms"], found["dense_ms"], found["ratio"]) == (2.0, 100.0, 0.03)
    assert found["pairs"][1] == {"this_ms": 50.0, "ms": 2.0, "ratio": 0.04}


def test_the_lazy_update_changes_the_drawn_rows_alone() -> None:
    planes = make_planes(300, huge_pages=False)
    before = planes.master_weight.clone()
    lazy = rows.lazy_updates(planes, 3, 2, 1)
    assert lazy.prepare is not None
    lazy.prepare()
    lazy.run()
    changed = (planes.master_weight != before).reshape(100, 3).any(dim=1)
    assert 2 <= int(np.asarray(changed).sum()) <= 2 * rows.NUM_UPDATES


def test_a_measurement_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--num-rows=500", "--width=3", "--touched=20", "--num-threads=1"]
    monkeypatch.setattr(sys, "argv", ["rows", *arguments, f"--json={file}"])
    command.run(rows.measure_rows, rows.show)
    assert "20 rows of 500 x 3, 1 thread(s), 7 rounds" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert (report["num_rows"], report["width"], report["touched"]) == (500, 3, 20)
    assert len(report["pairs"]) == 7
    with pytest.raises(ValueError, match="more than the 10 rows"):
        rows.measure_rows(10, 3, 11)
