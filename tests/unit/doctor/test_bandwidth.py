"""Measured bandwidths, and the file in which they are saved."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from offload_adam.doctor import bandwidth, bandwidth_cache
from offload_adam.doctor.bandwidth_cache import Bandwidth, Ranks
from offload_adam.kernels.probe import pass_over
from offload_adam.layout.ring import RingSpeed
from offload_adam.options import StateFormat


def test_a_pass_does_not_change_its_arrays() -> None:
    generator = np.random.default_rng(0)
    streams = [generator.standard_normal(1001).astype(np.float32) for _ in range(4)]
    before = [stream.copy() for stream in streams]
    pass_over(streams[0], streams[1], streams[2], streams[3], 2)
    for stream, original in zip(streams, before, strict=True):
        np.testing.assert_array_equal(stream, original)


def test_bandwidth_is_bytes_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Passes of 9 s (compiling, not counted), 2 s, 1 s and 4 s.
    times = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    found = bandwidth.measure_bandwidth([1], numel=1000, num_passes=3)
    assert found == {1: pytest.approx(28 * 1000 / 2.0 / 1e9)}


@pytest.mark.parametrize(
    ("num_cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_thread_counts_reach_all_cores(num_cores: int, counts: list[int]) -> None:
    assert bandwidth.counts_to_try(num_cores) == counts


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_saved_bandwidths_read_back(cache_home: Path) -> None:
    assert bandwidth_cache.recall() == Bandwidth()
    path = bandwidth_cache.keep(Bandwidth({1: 0.1 + 0.2, 2: 40.0}, 1 / 3))
    assert path is not None
    assert path.parent == cache_home / "offload_adam"
    assert bandwidth_cache.recall() == Bandwidth({1: 0.1 + 0.2, 2: 40.0}, 1 / 3)
    assert [*path.parent.iterdir()] == [path]


def test_speeds_of_steps_are_kept_by_format(cache_home: Path) -> None:
    bandwidth_cache.keep(Bandwidth(step=40.0, low_precision_steps={"bf16": 36.0, "mixed": 31.0}))
    # Later measurements replace only what they measured.
    bandwidth_cache.keep(Bandwidth(bus=20.0))
    bandwidth_cache.keep(Bandwidth(low_precision_steps={"mixed": 32.0}))
    known = bandwidth_cache.recall()
    assert known == Bandwidth(
        step=40.0, bus=20.0, low_precision_steps={"bf16": 36.0, "mixed": 32.0}
    )
    formats: tuple[StateFormat, ...] = get_args(StateFormat)
    assert {one: known.step_in(one) for one in formats} == {
        "fp32": 40.0,
        "bf16": 36.0,
        "mixed": 32.0,
        "int8": None,
    }


def test_a_busy_machine_does_not_replace_greater_bandwidths(cache_home: Path) -> None:
    quiet = Bandwidth({1: 20.0, 2: 40.0}, 30.0, low_precision_steps={"bf16": 28.0, "int8": 9.0})
    bandwidth_cache.keep(quiet)
    bandwidth_cache.keep(
        Bandwidth(
            {1: 21.0, 2: 20.0}, 16.0, low_precision_steps={"bf16": 14.0, "int8": 10.0}, busy=True
        )
    )
    greater = {1: 21.0, 2: 40.0}
    steps: dict[StateFormat, float] = {"bf16": 28.0, "int8": 10.0}
    assert bandwidth_cache.recall() == Bandwidth(greater, 30.0, low_precision_steps=steps)
    # A quiet machine may have become slower.
    bandwidth_cache.keep(Bandwidth({1: 10.0, 2: 20.0}, 15.0))
    known = bandwidth_cache.recall()
    assert (known.memory, known.step, known.busy) == ({1: 10.0, 2: 20.0}, 15.0, False)


@pytest.mark.parametrize(
    "lower",
    [
        Bandwidth({1: 20.0, 2: 19.0}, 30.0, low_precision_steps={"bf16": 28.0}, busy=True),
        Bandwidth({1: 20.0, 2: 40.0}, 14.0, low_precision_steps={"bf16": 28.0}, busy=True),
        Bandwidth({1: 20.0, 2: 40.0}, 30.0, low_precision_steps={"bf16": 13.0}, busy=True),
    ],
)
def test_a_value_is_in_doubt_once_a_busy_machine_has_measured_less_than_half(
    cache_home: Path, lower: Bandwidth
) -> None:
    saved = Bandwidth({1: 20.0, 2: 40.0}, 30.0, low_precision_steps={"bf16": 28.0})
    bandwidth_cache.keep(saved)
    bandwidth_cache.keep(lower)
    assert bandwidth_cache.recall() == replace(saved, busy=True)
    quiet = replace(lower, busy=False)
    bandwidth_cache.keep(quiet)
    assert bandwidth_cache.recall() == quiet


def test_machines_with_one_home_keep_their_own_bandwidths(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def become(**changes: Any) -> None:
        machine = {"host": "a", "architecture": "x86_64", "allowed_cores": 8}
        machine |= {"memory_gib": 64, "cpu": "Fast 1"}
        monkeypatch.setattr(bandwidth_cache, "_machine", lambda: machine | changes)

    changes: list[dict[str, Any]] = [{}, {"host": "b"}, {"memory_gib": 128}, {"cpu": "Slow 2"}]
    for number, one in enumerate(changes):
        become(**one)
        assert bandwidth_cache.recall() == Bandwidth()
        bandwidth_cache.keep(Bandwidth({1: 20.0 + number}))
    for number, one in enumerate(changes):
        become(**one)
        assert bandwidth_cache.recall() == Bandwidth({1: 20.0 + number})
    # The oldest files are deleted.
    for age_s, path in enumerate((cache_home / "offload_adam").iterdir()):
        os.utime(path, (1000 - age_s, 1000 - age_s))
    monkeypatch.setattr(bandwidth_cache, "_MAX_FILES", 2)
    become(host="c")
    written = bandwidth_cache.keep(Bandwidth({1: 50.0}))
    assert len([*(cache_home / "offload_adam").iterdir()]) == 2
    assert written is not None
    assert written.exists()


def test_the_machine_is_described_by_its_memory_and_processor() -> None:
    machine = bandwidth_cache._machine()
    memory_kib = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0])
    assert machine["memory_gib"] == round(memory_kib / 2**20)
    assert machine["cpu"] in Path("/proc/cpuinfo").read_text()


def test_the_file_of_an_earlier_version_is_read(cache_home: Path) -> None:
    path = bandwidth_cache.keep(Bandwidth({1: 20.0}))
    assert path is not None
    values = json.loads(path.read_text())
    path.unlink()
    for key in ("memory_gib", "cpu"):
        del values["machine"][key]
    earlier = path.with_name("bandwidth.json")
    earlier.write_text(json.dumps(values))
    assert bandwidth_cache.recall() == Bandwidth({1: 20.0})
    assert bandwidth_cache.keep(Bandwidth(step=10.0)) == path
    assert bandwidth_cache.recall() == Bandwidth({1: 20.0}, 10.0)
    path.unlink()
    values["machine"]["host"] = "another"
    earlier.write_text(json.dumps(values))
    assert bandwidth_cache.recall() == Bandwidth()


def test_bandwidths_of_a_busy_machine_are_marked_until_a_quiet_one_is_measured(
    cache_home: Path,
) -> None:
    bandwidth_cache.keep(Bandwidth({1: 5.0}, 4.0, busy=True))
    assert bandwidth_cache.recall() == Bandwidth({1: 5.0}, 4.0, busy=True)
    bandwidth_cache.keep(Bandwidth({1: 6.0}, 3.0, busy=True))
    assert bandwidth_cache.recall() == Bandwidth({1: 6.0}, 4.0, busy=True)
    bandwidth_cache.keep(Bandwidth(bus=20.0))  # says nothing about the memory
    assert bandwidth_cache.recall() == Bandwidth({1: 6.0}, 4.0, bus=20.0, busy=True)
    bandwidth_cache.keep(Bandwidth({1: 5.5}, 3.5))
    assert bandwidth_cache.recall() == Bandwidth({1: 5.5}, 3.5, bus=20.0)


@pytest.mark.parametrize(("saved", "steps"), [(36.0, {"bf16": 36.0}), (None, {})])
def test_the_bf16_speed_of_an_earlier_version_is_kept(
    cache_home: Path, saved: float | None, steps: dict[StateFormat, float]
) -> None:
    path = bandwidth_cache.keep(Bandwidth(step=40.0))
    assert path is not None
    values = json.loads(path.read_text()) | {"step_bf16_gb_per_s": saved}
    del values["low_precision_step_gb_per_s"]
    path.write_text(json.dumps(values))
    assert bandwidth_cache.recall() == Bandwidth(step=40.0, low_precision_steps=steps)
    bandwidth_cache.keep(Bandwidth(bus=20.0))  # writes the new key alone
    assert json.loads(path.read_text())["low_precision_step_gb_per_s"] == steps
    assert "step_bf16_gb_per_s" not in path.read_text()
    assert bandwidth_cache.recall().low_precision_steps == steps


def test_the_bandwidth_of_another_machine_is_not_used(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bandwidth_cache.keep(Bandwidth({1: 20.0}))
    monkeypatch.setattr(bandwidth_cache, "allowed_cores", lambda: 12345)
    assert bandwidth_cache.recall() == Bandwidth()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"machine": 3}',
        "\x00",
        '{"machine": MACHINE, "memory_gb_per_s": [1]}',
    ],
)
def test_a_damaged_file_is_ignored(cache_home: Path, damage: str) -> None:
    path = bandwidth_cache.keep(Bandwidth({1: 20.0}))
    assert path is not None
    machine = json.dumps(json.loads(path.read_text())["machine"])
    path.write_text(damage.replace("MACHINE", machine))
    assert bandwidth_cache.recall() == Bandwidth()


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_file_with_an_impossible_value_is_ignored(cache_home: Path, value: float) -> None:
    bandwidth_cache.keep(Bandwidth({1: value, 4: 8.0}))
    assert bandwidth_cache.recall() == Bandwidth()


RANKS: dict[str, Any] = {"world_size": 2, "local_world_size": 2, "backend": "gloo", "device": "cpu"}
SPEED: dict[str, Any] = {"mean_16bit": 1.0, "mean_32bit": 2.0, "gather": 3.0}


def test_the_speeds_of_a_network_read_back(cache_home: Path) -> None:
    network = {Ranks(**RANKS): RingSpeed(**SPEED)}
    bandwidth_cache.keep(Bandwidth(network=network))
    assert bandwidth_cache.recall() == Bandwidth(network=network)


@pytest.mark.parametrize(
    "change",
    [
        {"step_gb_per_s": 10**400},
        {"step_gb_per_s": "1"},
        {"bus_gb_per_s": True},
        {"low_precision_step_gb_per_s": 5},
        {"low_precision_step_gb_per_s": ["bf16"]},
        {"low_precision_step_gb_per_s": {"mixed": 0}},
        {"memory_gb_per_s": {"1": 10**400}},
        {"memory_gb_per_s": {"-1": 1.0}},
        {"memory_gb_per_s": {"1" * 5000: 1.0}},
        {"network_gb_per_s": 5},
        {"network_gb_per_s": [RANKS | SPEED | {"local_world_size": 0}]},
        {"network_gb_per_s": [RANKS | SPEED | {"world_size": "x"}]},
        {"network_gb_per_s": [RANKS | SPEED | {"world_size": 10**400}]},
        {"network_gb_per_s": [RANKS | SPEED | {"backend": ["gloo"]}]},
        {"network_gb_per_s": [RANKS | SPEED | {"device": 5}]},
        {"network_gb_per_s": [RANKS | SPEED | {"gather": 10**400}]},
    ],
)
def test_a_file_with_an_invalid_value_is_ignored(cache_home: Path, change: dict[str, Any]) -> None:
    path = bandwidth_cache.keep(Bandwidth({1: 20.0}))
    assert path is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert bandwidth_cache.recall() == Bandwidth()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "device", "large", "deep"])
def test_a_file_that_could_be_read_without_end_is_ignored(cache_home: Path, kind: str) -> None:
    path = bandwidth_cache.keep(Bandwidth({1: 20.0}))
    assert path is not None
    saved = path.read_text()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(saved + " " * 2**20 if kind == "large" else "[" * 200_000)
    assert bandwidth_cache.recall() == Bandwidth()
    assert bandwidth_cache.keep(Bandwidth({1: 30.0})) == path
    assert bandwidth_cache.recall() == Bandwidth({1: 30.0})


def test_an_unwritable_folder_is_a_warning_in_the_log(
    cache_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache_home / "offload_adam").write_text("a file")
    assert bandwidth_cache.keep(Bandwidth({1: 20.0})) is None
    assert "Cannot save the measured bandwidth" in caplog.text
    assert bandwidth_cache.recall() == Bandwidth()


def test_without_a_home_folder_nothing_is_saved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # as expanduser returns it where there is none
    assert bandwidth_cache.keep(Bandwidth({1: 20.0})) is None
    assert "Cannot save the measured bandwidth" in caplog.text
    assert bandwidth_cache.recall() == Bandwidth()


def test_a_step_counts_every_byte_that_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_median_s", lambda *_, **__: 0.5)
    # 24 of state, 2 twice of gradient, 2 of parameter, for 8 times 1,024 elements.
    assert bandwidth.measure_step(1, numel=8192, num_steps=1) == pytest.approx(
        8192 * 30 / 0.5 / 1e9
    )


@pytest.mark.parametrize(
    ("state_format", "nbytes"),
    [
        # The gradient twice, and the parameter. Then what is both read and written: state, and the
        # parameter if it is a part of its master weight.
        ("fp32", 2 + 2 + 2 + 2 * (4 + 4 + 4)),
        ("bf16", 2 + 2 + 2 * (2 + 2 + 2 + 2)),
        ("mixed", 2 + 2 + 2 * (2 + 1 + 2 + 1 + 2 / 128)),
        ("int8", 2 + 2 + 2 * (2 + 1 + 1 + 1 + 2 / 128)),
    ],
)
def test_the_traffic_of_a_step(state_format: StateFormat, nbytes: float) -> None:
    assert bandwidth.step_nbytes_per_element(state_format) == nbytes
    assert bandwidth.step_nbytes(3, 1024, state_format) == 3 * 1024 * nbytes
    assert bandwidth.step_nbytes(2, 1000, state_format) == 2 * 1024 * nbytes  # padded to blocks


def test_a_step_is_measured() -> None:
    assert bandwidth.measure_step(1, numel=8192, num_steps=3) > 0.0
