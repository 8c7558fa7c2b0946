"""`bench train`: its ratios, its conditions, and all of it on a machine that is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from offload_adam.bench.training import run as run_module
from offload_adam.bench.training.conditions import Condition, Point, Result, evaluate, reached
from offload_adam.bench.training.contenders import (
    CONTENDERS,
    DEEPSPEED,
    FSDP2,
    OVERLAPPED,
    PLAIN,
    SEQUENTIAL,
    TORCHAO,
)
from offload_adam.bench.training.measure import Alone, Measured, Steps, Task, measure
from offload_adam.bench.training.model import Sizes
from offload_adam.bench.training.ratios import choose_batches
from offload_adam.bench.training.report import summary
from offload_adam.bench.training.run import TrainBenchmarkError, in_own_process, measure_train
from offload_adam.cli.app import app

TINY = Sizes(num_layers=1, width=8, num_heads=2, vocabulary=16, sequence_length=4)


def test_batches_lie_on_the_line_through_what_was_measured() -> None:
    forward_ms = {4: 10.0, 16: 34.0}  # 2 + 2 a sequence
    assert choose_batches(forward_ms, 20.0) == {0.25: 2, 0.5: 4, 1.0: 9, 2.0: 19, 4.0: 39}
    assert choose_batches(forward_ms, 20.0, largest=19) == {0.25: 2, 0.5: 4, 1.0: 9, 2.0: 19}
    assert choose_batches(forward_ms, 0.001) == dict.fromkeys([0.25, 0.5, 1.0, 2.0, 4.0], 1)
    # With a third point, the nearest two count.
    assert choose_batches({**forward_ms, 32: 130.0}, 41.0, [2.0]) == {2.0: 24}
    with pytest.raises(ValueError, match="two batches"):
        choose_batches({4: 1.0}, 1.0)


def test_a_forward_that_does_not_grow_asks_for_more() -> None:
    assert choose_batches({4: 10.0, 16: 10.0}, 20.0, [1.0]) == {1.0: 32}


POINT = Point(
    forward_ms=100.0,
    update_ms=80.0,
    bucket_ms=10.0,
    results={
        OVERLAPPED: Result(step_ms=310.0, exposed_ms=11.0, update_ms=85.0, peak_gpu_nbytes=1000),
        PLAIN: Result(step_ms=305.0, exposed_ms=6.0, update_ms=6.0, peak_gpu_nbytes=3000),
        TORCHAO: Result(step_ms=400.0, exposed_ms=101.0, update_ms=110.0, peak_gpu_nbytes=1000),
        FSDP2: Result(step_ms=350.0, exposed_ms=51.0, update_ms=140.0, peak_gpu_nbytes=900),
    },
)
NAMES = (
    "exposed <= 1.15 * (max(0, U - F) + b)",
    "step <= 1.1 * plain AdamW's where F >= U",
    "exposed <= 0.25 * that of torchao_cpu_offload where F >= 0.75 * its update",
    "exposed <= that of torchao_cpu_offload",
    "exposed <= 0.25 * that of fsdp2_cpu_offload where F >= 0.75 * its update",
    "exposed <= that of fsdp2_cpu_offload",
    "peak GPU memory <= that of torchao_cpu_offload",
)


def judged(point: Point) -> dict[str, Condition]:
    found = evaluate(point)
    assert [condition.name for condition in found] == list(NAMES)
    return {condition.name: condition for condition in found}


def with_ours(**changes: Any) -> Point:
    ours = replace(POINT.results[OVERLAPPED], **changes)
    return replace(POINT, results={**POINT.results, OVERLAPPED: ours})


def test_every_condition_by_hand() -> None:
    found = judged(POINT)
    # 1.15 * (0 + 10); 1.1 * 305; 101 / 4; FSDP2's update takes 140, of which 105 is more than F.
    bounds = [11.5, 335.5, 25.25, 101.0, None, 51.0, 1000]
    assert [found[name].bound for name in NAMES] == pytest.approx(bounds)
    assert [found[name].holds for name in NAMES] == [True, True, True, True, None, True, True]
    slower = judged(replace(POINT, update_ms=130.0))
    assert slower[NAMES[0]].bound == pytest.approx(1.15 * (30.0 + 10.0))
    assert slower[NAMES[1]].holds is None
    assert slower[NAMES[1]].reason == "F < U"


@pytest.mark.parametrize(
    ("point", "failing"),
    [
        (with_ours(exposed_ms=11.6), [NAMES[0]]),
        (with_ours(step_ms=336.0), [NAMES[1]]),
        (with_ours(exposed_ms=25.3), [NAMES[0], NAMES[2]]),
        (with_ours(exposed_ms=51.1), [NAMES[0], NAMES[2], NAMES[5]]),
        (with_ours(exposed_ms=101.1), [NAMES[0], NAMES[2], NAMES[3], NAMES[5]]),
        (with_ours(peak_gpu_nbytes=1001), [NAMES[6]]),
    ],
)
def test_a_condition_fails_just_past_its_bound(point: Point, failing: list[str]) -> None:
    assert [name for name, one in judged(point).items() if one.holds is False] == failing


def test_what_was_not_measured_is_not_told() -> None:
    alone = replace(POINT, results={OVERLAPPED: POINT.results[OVERLAPPED]})
    found = judged(alone)
    assert [found[name].holds for name in NAMES] == [True, *[None] * 6]
    assert found[NAMES[3]].reason == f"{TORCHAO} was not measured"
    nobody = judged(replace(POINT, results={}))
    assert {one.holds for one in nobody.values()} == {None}


def test_a_condition_is_reached_where_it_holds_everywhere_it_can_be_told() -> None:
    good, bad = evaluate(POINT), evaluate(with_ours(exposed_ms=12.0))
    assert reached({"1": good, "2": good})[NAMES[0]] is True
    assert reached({"1": bad, "2": good})[NAMES[0]] is False
    assert reached({"1": good, "2": bad})[NAMES[0]] is False
    assert reached({"1": good})[NAMES[4]] is None


class MadeUp:
    """A machine on which all times follow from the batch: F = 2 ms a sequence, U = 40 ms."""

    UPDATE_MS = 40.0

    def __init__(self, fits: int = 10**9, broken: str | None = None) -> None:
        self.fits = fits
        self.broken = broken
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> Measured:
        self.tasks.append(task)
        if task.contender in (TORCHAO, DEEPSPEED):
            return Measured(unavailable="not importable")
        if self.broken is not None and task.contender == self.broken:
            raise TrainBenchmarkError("it broke")
        batches = [batch for batch in task.batches if batch <= self.fits]
        if task.contender is None:
            alone = {b: Alone(forward_ms=2.0 * b, forward_backward_ms=6.0 * b) for b in batches}
            return Measured(num_parameters=7, alone=alone)
        steps = {batch: self.steps(task.contender, batch) for batch in batches}
        return Measured(num_parameters=7, buckets=(30, 50), steps=steps)

    def steps(self, contender: str, batch: int) -> Steps:
        hidden = max(0.0, self.UPDATE_MS - 2.0 * batch) + 25.0
        exposed = {OVERLAPPED: hidden, PLAIN: 1.0}.get(contender, self.UPDATE_MS + 20.0)
        return Steps(
            steps_ms=(6.0 * batch + exposed - 1, 6.0 * batch + exposed, 6.0 * batch + 2 * exposed),
            update_ms=self.UPDATE_MS + 20.0,
            updates_only_ms=self.UPDATE_MS if contender != PLAIN else None,
            peak_gpu_nbytes=2**30,
            host_nbytes=2**31,
        )


def report_of(machine: MadeUp, **options: Any) -> dict[str, Any]:
    return measure_train(TINY, "cpu", run=machine, **options)


def test_the_report_has_every_number_of_a_made_up_machine() -> None:
    machine = MadeUp()
    report = report_of(machine)
    assert json.loads(json.dumps(report)) == report
    assert [point["num_sequences"] for point in report["points"]] == [5, 10, 20, 40, 80]
    assert [point["ratio"] for point in report["points"]] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert all(point["near_target"] for point in report["points"])
    third = report["points"][2]
    assert (third["forward_ms"], third["forward_backward_ms"], third["update_ms"]) == (40, 120, 40)
    assert third["bucket_ms"] == 25.0  # the larger of two buckets: 50 of 80 bytes of 40 ms
    assert third["contenders"][OVERLAPPED] == {
        "step_ms": 145.0,
        "exposed_ms": 25.0,
        "update_ms": 60.0,
        "peak_gpu_gib": 1.0,
        "host_gib": 2.0,
        "steps_ms": [144.0, 145.0, 170.0],
    }
    assert set(third["contenders"]) == {SEQUENTIAL, OVERLAPPED, PLAIN, FSDP2}
    assert report["left_out"] == {TORCHAO: "not importable", DEEPSPEED: "not importable"}
    assert report["reached"][NAMES[0]] is True
    assert report["reached"][NAMES[3]] is None
    # 145 is more than 1.1 * 121, and 25 more than a quarter of 60.
    assert report["reached"][NAMES[1]] is False
    assert report["reached"][NAMES[4]] is False
    assert report["reached"][NAMES[5]] is True
    everyone = [task for task in machine.tasks if task.contender == PLAIN]
    assert [task.batches for task in everyone] == [(5, 10, 20, 40, 80)]
    text = "\n".join(summary(report))
    assert "F/U 1.00 (20 sequences)" in text
    assert f"NO       {NAMES[1]}" in text
    assert "left out: torchao_cpu_offload (not importable)" in text


def test_ratios_that_do_not_fit_are_not_tried() -> None:
    report = report_of(MadeUp(fits=40))
    assert [point["target_ratio"] for point in report["points"]] == [0.25, 0.5, 1.0, 2.0]
    assert report["not_tried"] == [4.0]
    assert report_of(MadeUp(), largest_batch=12)["not_tried"] == [1.0, 2.0, 4.0]


def test_a_peer_that_breaks_is_left_out_and_this_package_is_not() -> None:
    assert report_of(MadeUp(broken=FSDP2))["left_out"][FSDP2] == "it broke"
    with pytest.raises(TrainBenchmarkError, match="it broke"):
        report_of(MadeUp(broken=OVERLAPPED))


@pytest.mark.parametrize("contender", [None, SEQUENTIAL, OVERLAPPED, PLAIN])
def test_a_real_task_on_a_cpu(contender: str | None) -> None:
    task = Task(contender=contender, sizes=TINY, device="cpu", batches=(2, 1), num_steps=2)
    found = measure(task)
    block = 8 * (3 * 8 + 8 + 2 * 4 * 8) + 2 * 2 * 8
    assert found.num_parameters == 2 * 16 * 8 + block + 2 * 8
    if contender is None:
        assert found.alone is not None
        assert set(found.alone) == {1, 2}
        assert all(one.forward_ms > 0 for one in found.alone.values())
        return
    assert found.steps is not None
    for steps in found.steps.values():
        assert len(steps.steps_ms) == 2
        assert min(steps.steps_ms) > 0
        assert steps.update_ms > 0
        assert steps.peak_gpu_nbytes is None
        assert (steps.updates_only_ms is None) == (contender == PLAIN)
    assert bool(found.buckets) == (contender != PLAIN)


@pytest.mark.parametrize("contender", [TORCHAO, FSDP2, DEEPSPEED])
def test_peers_of_the_gpu_say_so_on_a_cpu(contender: str) -> None:
    task = Task(contender=contender, sizes=TINY, device="cpu", batches=(1,), num_steps=1)
    assert measure(task) == Measured(unavailable="works on a GPU only")


def test_an_error_in_a_process_of_its_own_is_told() -> None:
    task = Task(contender="nobody", sizes=TINY, device="cpu", batches=(1,), num_steps=1)
    with pytest.raises(TrainBenchmarkError, match="KeyError: 'nobody'"):
        in_own_process(task)


def test_it_needs_neither_pydantic_nor_typer_nor_rich() -> None:
    code = (
        "import sys\n"
        "for name in ('pydantic', 'typer', 'rich', 'yaml', 'plotly'): sys.modules[name] = None\n"
        "import offload_adam.bench.training.__main__\n"
        "import offload_adam.doctor.devices\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_the_command_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(MadeUp())
    asked: list[Sizes] = []

    def measured(sizes: Sizes, device: str, **options: Any) -> dict[str, Any]:
        asked.append(sizes)
        return report

    monkeypatch.setattr(run_module, "measure_train", measured)
    file = tmp_path / "report.json"
    arguments = ["bench", "train", "--width=64", "--num-heads=4", f"--json={file}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert asked == [Sizes(width=64, num_heads=4)]
    assert json.loads(file.read_text()) == report
    assert "F/U 1.00" in result.output
    assert CliRunner().invoke(app, ["bench", "train", "--num-heads=7"]).exit_code == 2
    assert set(CONTENDERS) == {OVERLAPPED, SEQUENTIAL, PLAIN, TORCHAO, FSDP2, DEEPSPEED}
