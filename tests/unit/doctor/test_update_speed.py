"""The warning of a run whose updates get less than half of the memory bandwidth."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from offload_adam import OffloadAdam, OffloadPolicy
from offload_adam.doctor import bandwidth_cache
from offload_adam.errors import HostMemoryError
from offload_adam.kernels.threads import allowed_cores
from offload_adam.step.host_update import HostUpdate
from offload_adam.train import speeds
from offload_adam.train.records import StepRecord
from offload_adam.train.speeds import NUM_STEPS, NUM_WARMUP, UpdateSpeed
from tests.support.updates import running_first
from tests.unit.test_train_alone import SMALL, run


def record(update_ms: float, *, skipped: bool = False) -> StepRecord:
    return StepRecord(
        step=1,
        loss=1.0,
        lr=0.1,
        grad_norm=1.0,
        skipped=skipped,
        step_ms=100.0,
        tokens_per_s=1.0,
        timings_ms={"step": 90.0, "optimizer.update": update_ms},
    )


def warnings_after(speed: UpdateSpeed, log: pytest.LogCaptureFixture, *times_ms: float) -> int:
    log.clear()
    for update_ms in times_ms:
        speed.add(record(update_ms))
    return len([one for one in log.records if "less than half" in one.getMessage()])


def test_updates_below_half_of_the_limit_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    # 1e9 bytes at 40 GB/s take 25 ms: half of it is 50 ms.
    every = NUM_WARMUP + NUM_STEPS
    assert warnings_after(UpdateSpeed(10**9, 40.0), caplog, *[49.0] * every) == 0
    assert warnings_after(UpdateSpeed(10**9, 40.0), caplog, *[51.0] * 3 * every) == 1
    assert "moves 19.6 GB/s" in caplog.text
    assert "40.0 GB/s" in caplog.text


def test_updates_above_the_limit_say_that_it_was_measured_too_low(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # 1e9 bytes at 4 GB/s take 250 ms. An update of 28.4 ms moves 880% of that.
    every = NUM_WARMUP + NUM_STEPS
    assert warnings_after(UpdateSpeed(10**9, 4.0), caplog, *[28.4] * 3 * every) == 0
    (record,) = caplog.records
    assert record.getMessage() == (
        "The update moves 35.2 GB/s on this rank, more than the 4.0 GB/s that were measured as its "
        "share of this machine's memory bandwidth. The machine was busy during that measurement, "
        "or the state fits into the caches. Run offload-adam doctor again on an idle machine."
    )
    assert "%" not in record.getMessage()
    caplog.clear()
    warnings_after(UpdateSpeed(10**9, 4.0), caplog, *[230.0] * every)  # 4.3 GB/s: as good as 4
    assert caplog.text == ""


def test_slow_first_steps_and_single_ones_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    times_ms = [500.0] * NUM_WARMUP + [500.0] * (NUM_STEPS // 2 - 1) + [30.0] * NUM_STEPS
    assert warnings_after(UpdateSpeed(10**9, 40.0), caplog, *times_ms) == 0


def test_steps_without_an_update_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    speed = UpdateSpeed(10**9, 40.0)
    for _ in range(50):
        speed.add(record(0.0, skipped=True))
        speed.add(record(0.0))
    assert caplog.text == ""
    assert warnings_after(speed, caplog, *[500.0] * (NUM_WARMUP + NUM_STEPS)) == 1


def test_a_skipped_steps_record_may_hold_the_update_before_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    speed = UpdateSpeed(10**9, 40.0)
    for _ in range(NUM_WARMUP + NUM_STEPS):
        speed.add(record(500.0, skipped=True))
        speed.add(record(0.0))
    assert caplog.text.count("less than half") == 1


def overlapping(num_layers: int) -> tuple[torch.nn.Module, OffloadAdam]:
    layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(num_layers))
    model = torch.nn.Sequential(*layers)
    optimizer = OffloadAdam(
        model.parameters(),
        module=model,
        overlap=True,
        num_threads=1,
        offload=OffloadPolicy(bucket_nbytes=4 * 64 * 64),
    )
    return model, optimizer


def test_an_overlapped_update_is_timed_once_in_the_next_record_skipped_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slow down the update of each of three buckets by 20 ms; steps 3 and 4 are skipped."""
    slow = running_first(HostUpdate.prepare, lambda: time.sleep(0.02))
    monkeypatch.setattr(HostUpdate, "prepare", slow)
    model, optimizer = overlapping(3)
    found: list[tuple[bool, float]] = []
    for factor in (1.0, 1.0, float("inf"), float("inf"), 1.0, 1.0):
        (model(torch.randn(2, 64)).sum() * factor).backward()
        optimizer.step()
        report = optimizer.last_step
        assert report is not None
        found.append((report.skipped, report.timings.get("update", 0.0)))
    optimizer.close()
    assert [skipped for skipped, _ in found] == [False, False, True, True, False, False]
    # The record of the first step has no time yet, and a skipped step leaves none to the next.
    assert [spent_s > 0.0 for _, spent_s in found] == [False, True, True, False, False, True]
    for _, spent_s in found:
        assert spent_s == 0.0 or 0.06 <= spent_s < 6.0


def test_waiting_for_a_checkpoint_does_not_count_as_update_time() -> None:
    model, optimizer = overlapping(2)
    model(torch.randn(2, 64)).sum().backward()
    core = optimizer._alive()
    core.external_edits.lock_snapshot([0, 1])
    threading.Timer(0.3, core.snapshot_lock.finish_reading).start()
    optimizer.step()
    optimizer.synchronize()
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    report = optimizer.last_step
    assert report is not None
    optimizer.close()
    assert report.timings["checkpoint wait"] >= 0.2
    assert report.timings["update"] < 0.2


def test_updates_that_overlap_with_a_forward_on_the_same_cores_are_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(speeds, "LEAST_NBYTES", 1)
    monkeypatch.setattr(speeds, "_limit_gb_per_s", lambda num_threads: 1e6)
    run(tmp_path, optimizer={"overlap": True})
    assert "less than half" not in caplog.text


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge every run, however small, with an empty cache of bandwidths."""
    monkeypatch.setattr(speeds, "LEAST_NBYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("optimizer", [{}, {"streaming": False}], ids=["streaming", "drop-in"])
@pytest.mark.parametrize(("gb_per_s", "num_warnings"), [(1e6, 1), (1e-6, 0)])
def test_a_run_compares_itself_with_what_doctor_kept(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    optimizer: dict[str, object],
    gb_per_s: float,
    num_warnings: int,
) -> None:
    bandwidth_cache.keep(bandwidth_cache.Bandwidth({1: gb_per_s}))
    run(tmp_path, optimizer=optimizer)
    warned = [one for one in caplog.records if "less than half" in one.getMessage()]
    assert len(warned) == num_warnings


@pytest.mark.usefixtures("judged")
def test_without_doctor_a_run_measures_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(counts: list[int], *, numel: int) -> dict[int, float]:
        measured.extend(counts)
        return dict.fromkeys(counts, 30.0)

    monkeypatch.setattr(speeds, "measure_bandwidth", measure)
    assert speeds._limit_gb_per_s(1) == 30.0
    assert measured == [1]
    bandwidth_cache.keep(bandwidth_cache.Bandwidth({1: 20.0}))
    assert speeds._limit_gb_per_s(1) == 20.0
    assert speeds._limit_gb_per_s(allowed_cores() + 1) is None
    assert measured == [1]


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize(("saved", "limit"), [(20.0, 30.0), (40.0, 40.0), (900.0, 30.0)])
def test_what_a_busy_machine_saved_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, saved: float, limit: float
) -> None:
    monkeypatch.setattr(
        speeds, "measure_bandwidth", lambda counts, numel: dict.fromkeys(counts, 30.0)
    )
    bandwidth_cache.keep(bandwidth_cache.Bandwidth({1: saved}, busy=True))
    assert speeds._limit_gb_per_s(1) == limit


@pytest.mark.usefixtures("judged")
def test_a_measurement_that_does_not_fit_into_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lack(counts: list[int], *, numel: int) -> dict[int, float]:
        raise HostMemoryError("does not fit")

    monkeypatch.setattr(speeds, "measure_bandwidth", lack)
    assert speeds._limit_gb_per_s(1) is None


def test_small_models_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(num_threads: int) -> float:
        raise AssertionError("nothing must be measured")

    monkeypatch.setattr(speeds, "_limit_gb_per_s", fail)
    run(tmp_path, train=SMALL["train"] | {"num_steps": 2})
