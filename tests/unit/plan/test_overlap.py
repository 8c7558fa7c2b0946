"""The predicted time of the optimizer that forward and backward do not hide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.layout.flat import ParameterSpec
from offload_adam.layout.ring import RingSpeed
from offload_adam.layout.schedule import Operation
from offload_adam.options import OffloadPolicy
from offload_adam.plan.inputs import Machine, Training
from offload_adam.plan.timing import predict_overlap

NUMEL = 1_280_000
SPECS = [ParameterSpec(index, NUMEL, 2, "bf16") for index in range(50)]
NETWORK = RingSpeed.uniform(10.0)
MACHINE = Machine(host_gb_per_s=100.0, bus_gb_per_s=20.0, network=NETWORK, tera_flops=100.0)
# Enough tokens that backward takes longer than the copies beside it.
TRAINING = Training(offload=OffloadPolicy(bucket_nbytes=2 * NUMEL), num_tokens=3000)


def exposed(num_updated: int, num_tokens: int) -> float:
    """Return the exposed seconds if the host updates the first `num_updated` buckets."""
    # Of a bf16 parameter the norm reads 2 bytes; the update reads and writes 2 + 24 + 2.
    norm, update = 2 * NUMEL / 100e9, 28 * NUMEL / 100e9
    copy = 2 * NUMEL / 20e9
    forward = 2 * NUMEL * num_tokens / 100e12
    beyond = max(0.0, num_updated * (update - forward))
    return beyond + copy + norm + min(forward, update) + copy


@pytest.mark.parametrize("num_tokens", [3000, 7000, 14_000, 28_000, 56_000])
def test_one_rank_exposes_what_the_formula_says(num_tokens: int) -> None:
    timeline = predict_overlap(SPECS, replace(TRAINING, num_tokens=num_tokens), MACHINE)
    assert timeline is not None
    assert timeline.exposed_s == pytest.approx(exposed(50, num_tokens), rel=1e-9)
    assert timeline.model_s == pytest.approx(6 * 50 * NUMEL * num_tokens / 100e12, rel=1e-9)
    assert timeline.end_s == pytest.approx(timeline.model_s + timeline.exposed_s, rel=1e-9)


def test_ranks_divide_updates_and_copies_and_add_collectives() -> None:
    one = predict_overlap(SPECS, TRAINING, MACHINE)
    four = predict_overlap(SPECS, replace(TRAINING, world_size=4, local_world_size=2), MACHINE)
    assert one is not None
    assert four is not None
    seconds = [
        {i.task.operation: i.end_s - i.start_s for i in timeline.intervals}
        for timeline in (one, four)
    ]
    # Two ranks of a node share its memory, each with a quarter of the state.
    assert seconds[1][Operation.UPDATE] == pytest.approx(seconds[0][Operation.UPDATE] / 2)
    assert seconds[1][Operation.COPY_H2D] == pytest.approx(seconds[0][Operation.COPY_H2D] / 4)
    assert seconds[1][Operation.GATHER] == pytest.approx(0.75 * 2 * NUMEL / 10e9)
    assert seconds[1][Operation.REDUCE] == pytest.approx(0.75 * 2 * NUMEL / 10e9)
    assert Operation.GATHER not in seconds[0]


def test_state_that_stays_on_the_device_is_not_updated_on_the_host() -> None:
    # Updating half of the buckets takes longer than the forward of all.
    half = predict_overlap(SPECS, TRAINING.with_offload(offload_fraction=0.5), MACHINE)
    assert half is not None
    update, forward = 28 * NUMEL / 100e9, 2 * NUMEL * 3000 / 100e12
    copy = 2 * NUMEL / 20e9
    # The device updates the half that backward completes last and that the forward needs first. By
    # then the host has its gradients, and its updates end after the last forward but one.
    assert half.exposed_s == pytest.approx(25 * update + copy + forward - 50 * forward, rel=1e-9)


@pytest.mark.parametrize(
    ("training", "machine"),
    [
        (TRAINING, replace(MACHINE, tera_flops=None)),
        (TRAINING, replace(MACHINE, host_gb_per_s=None)),
        (TRAINING, replace(MACHINE, bus_gb_per_s=None)),
        (replace(TRAINING, world_size=2), replace(MACHINE, network=None)),
        (replace(TRAINING, num_tokens=None), MACHINE),
        (replace(TRAINING, on_device=False), MACHINE),
        (replace(TRAINING, streams=False), MACHINE),
        (replace(TRAINING, reduces=False), MACHINE),
        (replace(TRAINING, replicated=True), MACHINE),
        (replace(TRAINING, overlap=False), MACHINE),
    ],
)
def test_nothing_is_predicted_without_overlap_or_with_an_unknown_speed(
    training: Training, machine: Machine
) -> None:
    assert predict_overlap(SPECS, training, machine) is None


GIVEN = ("--params=1e9", "--gpu-memory=80GiB", "--host-memory=64GiB", "--host-bandwidth=100GB/s")
SPEEDS = ("--bus-bandwidth=20GB/s", "--tflops=100", "--tokens=4096")


def test_the_command_prints_what_is_exposed_and_draws_a_step(tmp_path: Path) -> None:
    drawn, written = tmp_path / "step.txt", tmp_path / "plan.json"
    files = (f"--timeline={drawn}", f"--json={written}")
    result = CliRunner().invoke(app, ["plan", *GIVEN, *SPEEDS, *files])
    assert result.exit_code == 0, result.output
    values = json.loads(written.read_text())
    assert values["seconds_overlapped"] == pytest.approx(
        values["seconds"]["compute"] + values["seconds_exposed"], rel=1e-9
    )
    assert f"{1e3 * values['seconds_exposed']:.4g} ms" in result.output
    lines = drawn.read_text().splitlines()
    names = ["compute", "D2H copy", "update", "H2D copy"]
    assert [line[:9].strip() for line in lines[:-1]] == names
    assert lines[-1].endswith(f"{values['seconds_overlapped']:.4g} s")


@pytest.mark.parametrize("missing", SPEEDS)
def test_a_timeline_that_cannot_be_drawn_is_rejected(tmp_path: Path, missing: str) -> None:
    speeds = [speed for speed in SPEEDS if speed != missing]
    drawn = tmp_path / "step.txt"
    result = CliRunner().invoke(app, ["plan", *GIVEN, *speeds, f"--timeline={drawn}"])
    assert result.exit_code == 2
    assert "--tokens" in result.output
    assert not drawn.exists()
