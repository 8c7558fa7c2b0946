"""The measured network speed: its value, the finding on it, and its use in a plan."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.coordinator.ranks import open_rank_group
from offload_adam.doctor import bandwidth_cache, network
from offload_adam.doctor.bandwidth_cache import Bandwidth, Ranks
from offload_adam.doctor.network import Network, measure_network, network_finding
from offload_adam.layout.ring import RingSpeed
from tests.support.ranks import RankPool
from tests.support.torchrun import run_two_ranks

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TWO = Ranks(2, 2, "gloo", "cpu")
SPEED = RingSpeed(0.5, 0.75, 0.25)


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measure(rank: int, world_size: int, clock_steps_s: list[float] | None) -> RingSpeed:
    """Measure small buckets.

    Args:
        clock_steps_s: seconds of a round on a faked clock, by rank; None for the real clock.
    """
    ranks = open_rank_group(None)
    if clock_steps_s is not None:
        each = itertools.accumulate(itertools.cycle([0.0, clock_steps_s[rank]]))
        fake: Any = SimpleNamespace(perf_counter=lambda: next(each), sleep=None)
        network.time = fake  # type: ignore[attr-defined]
    try:
        return measure_network(ranks, CPU, nbytes=6144)
    finally:
        network.time = time  # type: ignore[attr-defined]
        ranks.release()


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_measure_the_same_possible_speed(ranks: RankPool, world_size: int) -> None:
    speeds = ranks.run(measure, world_size, None)
    assert len(set(speeds)) == 1
    assert 0.0 < speeds[0].least < max(speeds[0].mean_32bit, speeds[0].gather, 1e3) < 1e4


def test_a_speed_is_the_bytes_sent_over_the_time_of_the_slowest_rank(ranks: RankPool) -> None:
    speeds = ranks.run(measure, 3, [1.0, 4.0, 2.0])
    # Of 6,144 bytes a rank sends two thirds in each pass: two passes for a mean, one for a gather.
    one_pass = network.NUM_IN_FLIGHT * 6144 * 2 / 3 / 4.0 / 1e9
    assert speeds == [RingSpeed(2 * one_pass, 2 * one_pass, one_pass)] * 3


def test_saving_a_network_speed_leaves_the_other_values(cache_home: Path) -> None:
    bandwidth_cache.keep(Bandwidth({1: 20.0}, 12.0))
    eight = Ranks(8, 4, "nccl", "cuda")
    bandwidth_cache.keep(Bandwidth(network={TWO: RingSpeed(1 / 3, 0.1 + 0.2, 2.0), eight: SPEED}))
    bandwidth_cache.keep(Bandwidth(network={TWO: SPEED}))
    known = Bandwidth({1: 20.0}, 12.0, {TWO: SPEED, eight: SPEED})
    assert bandwidth_cache.recall() == known
    bandwidth_cache.keep(Bandwidth({2: 30.0}))
    assert bandwidth_cache.recall() == replace(known, memory={2: 30.0})


def test_a_file_without_network_speeds_is_read_and_one_with_an_impossible_speed_is_not(
    cache_home: Path,
) -> None:
    impossible = {TWO: replace(SPEED, gather=float("nan"))}
    bandwidth_cache.keep(Bandwidth({1: 20.0}, network=impossible))
    assert bandwidth_cache.recall() == Bandwidth()
    path = bandwidth_cache.keep(Bandwidth({1: 20.0}))
    assert path is not None
    values = json.loads(path.read_text())
    del values["network_gb_per_s"]
    path.write_text(json.dumps(values))
    assert bandwidth_cache.recall() == Bandwidth({1: 20.0})


@pytest.mark.parametrize(
    ("ranks", "least"),
    [
        (TWO, 0.1),
        (Ranks(4, 2, "gloo", "cpu"), 0.5),
        (Ranks(8, 8, "nccl", "cuda"), 5.0),
        (Ranks(16, 8, "nccl", "cuda"), 1.0),
    ],
)
def test_a_slow_network_is_a_warning_with_what_to_do(ranks: Ranks, least: float) -> None:
    enough = RingSpeed.uniform(least)
    assert network_finding(Network(ranks, enough), Bandwidth(), 1).status == "ok"
    for name in ("mean_16bit", "mean_32bit", "gather"):
        slow = replace(enough, **{name: 0.99 * least})
        found = network_finding(Network(ranks, slow), Bandwidth(), 1)
        assert found.status == "warning"
        assert f"expected {least} GB/s or more" in found.found
        assert found.advice


def test_an_error_is_a_failure_and_without_peers_the_finding_says_how_to_measure() -> None:
    found = network_finding(Network(TWO, None, "connection refused"), Bandwidth(), 2)
    assert found.status == "failed"
    assert "connection refused" in found.found
    found = network_finding(None, Bandwidth(network={TWO: SPEED}), 1)
    assert found.status == "ok"
    assert found.found.startswith(
        "measured earlier: 2 ranks on 1 node(s), gloo on cpu: each rank sends 0.50 GB/s averaging "
    )
    assert "not measured" not in found.found
    assert "torchrun --nproc-per-node=2 -m offload_adam doctor" in found.found
    found = network_finding(None, Bandwidth(), 4)
    assert found.found.startswith("not measured. To measure it, start doctor")
    assert "torchrun --nproc-per-node=4 -m offload_adam doctor" in found.found


def planned(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    path = folder / "plan.json"
    result = CliRunner().invoke(app, ["plan", *arguments, f"--json={path}"])
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), " ".join(result.output.split())


def test_a_plan_uses_only_the_network_speed_of_its_own_ranks(
    tmp_path: Path, cache_home: Path
) -> None:
    bandwidth_cache.keep(Bandwidth({1: 20.0}, 10.0, {TWO: SPEED}))
    config = (str(ROOT / "configs" / "tiny.yaml"), "--train.dtype=bf16")
    values, _ = planned(tmp_path, *config, "--world-size=2")
    numel = -(-values["num_parameters"] // 256) * 256
    # Half of the model: twice to average it, once to gather it.
    expected_s = numel * 2 / 2 * (2 / 0.5 + 1 / 0.25) / 1e9
    assert values["seconds"]["network"] == pytest.approx(expected_s, rel=0.05)
    assert values["machine"]["sources"]["network"] == "measured by doctor"
    assert not any("given" in doubt for doubt in values["rough"])
    for other in (("--world-size=4",), ("--world-size=2", "--local-world-size=1")):
        values, output = planned(tmp_path, *config, *other)
        assert "network" not in values["seconds"]
        assert (
            "no bandwidth is known for the network, so its time is missing: run offload-adam "
            "doctor under"
        ) in output
    values, output = planned(tmp_path, *config, "--world-size=2", "--network-bandwidth=7GB/s")
    assert values["machine"]["network"] == {"mean_16bit": 7, "mean_32bit": 7, "gather": 7}
    assert "speeds were given, not measured: network" in output
    assert "7 GB/s, given" in output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_doctor_under_torchrun_saves_the_speed_that_a_plan_uses(
    tmp_path: Path, cache_home: Path
) -> None:
    path = tmp_path / "doctor.json"
    arguments = ["-m", "offload_adam", "doctor", f"--json={path}", f"--dir={tmp_path}"]
    printed = run_two_ranks(arguments, tmp_path, timeout_s=150)
    assert printed.count("Checks of this machine") == 1
    values = json.loads(path.read_text())
    ranks, speed = values["network"]["ranks"], RingSpeed(**values["network"]["speed"])
    assert ranks == {"world_size": 2, "local_world_size": 2, "backend": "gloo", "device": "cpu"}
    assert speed.least > 0.0
    assert values["step_gb_per_s"] > 0.0
    assert bandwidth_cache.recall().network == {TWO: speed}
    plan, _ = planned(tmp_path, str(ROOT / "configs" / "tiny.yaml"), "--world-size=2")
    assert plan["machine"]["network"] == values["network"]["speed"]
    assert {"update", "network"} <= plan["seconds"].keys()
