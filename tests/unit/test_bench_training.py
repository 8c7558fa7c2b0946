"""`bench train`: batches, and the whole report on a simulated machine."""

from __future__ import annotations

import functools
import gc
import json
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from offload_adam.bench import __main__ as bench_main
from offload_adam.bench.peers import MAX_GRAD_NORM
from offload_adam.bench.training import contenders as contenders_module
from offload_adam.bench.training import measure as measure_module
from offload_adam.bench.training import run as run_module
from offload_adam.bench.training.batches import choose_batches
from offload_adam.bench.training.contenders import (
    CONTENDERS,
    DEEPSPEED,
    FSDP2,
    LABELS,
    MODEL_ALONE,
    OVERLAPPED,
    PLAIN,
    SEQUENTIAL,
    TORCHAO,
)
from offload_adam.bench.training.measure import (
    OUT_OF_MEMORY,
    HostPeak,
    Measured,
    Steps,
    Task,
    in_own_process,
    measure,
)
from offload_adam.bench.training.model import Sizes, make_model, make_tokens
from offload_adam.bench.training.results import Results, failures, markdown
from offload_adam.bench.training.run import TrainBenchmarkError, measure_train
from offload_adam.cli.app import app
from tests.bench.conditions import evaluate, reached

TINY = Sizes(num_layers=1, width=8, num_heads=2, vocabulary=16, sequence_length=4)


def test_batches_are_interpolated_from_the_measured_times() -> None:
    forward_ms = {4: 10.0, 16: 34.0}  # 2 + 2 a sequence
    assert choose_batches(forward_ms, 20.0) == {0.25: 2, 0.5: 4, 1.0: 9, 2.0: 19, 4.0: 39}
    assert choose_batches(forward_ms, 20.0, largest=19) == {0.25: 2, 0.5: 4, 1.0: 9, 2.0: 19}
    assert choose_batches(forward_ms, 0.001) == dict.fromkeys([0.25, 0.5, 1.0, 2.0, 4.0], 1)
    # With a third point, the nearest two count.
    assert choose_batches({**forward_ms, 32: 130.0}, 41.0, [2.0]) == {2.0: 24}
    with pytest.raises(ValueError, match="two batches"):
        choose_batches({4: 1.0}, 1.0)


def test_equal_forward_times_lead_to_a_larger_batch() -> None:
    assert choose_batches({4: 10.0, 16: 10.0}, 20.0, [1.0]) == {1.0: 32}


class SimulatedMachine:
    """Computes all times from the batch: F = 2 ms for each sequence, U = 40 ms."""

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
            return Measured(reasons=dict.fromkeys(task.batches, "it broke"))
        batches = [batch for batch in task.batches if batch <= self.fits]
        if task.contender == MODEL_ALONE:
            alone = {
                b: Steps(steps_ms=(6.0 * b,), forward_ms=2.0 * b, peak_gpu_nbytes=2**29)
                for b in batches
            }
            return Measured(num_parameters=7, steps=alone)
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
            peak_host_nbytes=2**31,
        )


class SmallGpu(SimulatedMachine):
    """Batches above `fits` do not fit into its GPU."""

    def __call__(self, task: Task) -> Measured:
        found = super().__call__(task)
        return replace(found, reasons={b: OUT_OF_MEMORY for b in task.batches if b > self.fits})


def report_of(machine: SimulatedMachine, **options: Any) -> dict[str, Any]:
    return measure_train(TINY, "cpu", run=machine, **options)


def test_the_report_has_every_number_of_a_simulated_machine() -> None:
    machine = SimulatedMachine()
    report = report_of(machine)
    assert json.loads(json.dumps(report)) == report
    assert [point["num_sequences"] for point in report["points"]] == [5, 10, 20, 40, 80]
    assert [point["ratio"] for point in report["points"]] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert all(point["near_target"] for point in report["points"])
    assert report["machine"]["date"].startswith("20")
    assert {"commit", "versions"} <= set(report["machine"])
    third = report["points"][2]
    assert (third["forward_ms"], third["forward_backward_ms"], third["update_ms"]) == (40, 120, 40)
    assert third["bucket_ms"] == 25.0  # the larger of two buckets: 50 of 80 bytes of 40 ms
    assert third["contenders"][OVERLAPPED] == {
        "tokens_per_s": pytest.approx(20 * 4 / 0.145),
        "step_ms": 145.0,
        "exposed_ms": 25.0,
        "update_ms": 60.0,
        "peak_gpu_gib": 1.0,
        "peak_host_gib": 2.0,
        "steps_ms": [144.0, 145.0, 170.0],
    }
    assert third["contenders"][MODEL_ALONE] == {
        "tokens_per_s": pytest.approx(20 * 4 / 0.12),
        "step_ms": 120.0,
        "exposed_ms": 0.0,
        "update_ms": None,
        "peak_gpu_gib": 0.5,
        "peak_host_gib": 0.0,
        "steps_ms": [120.0],
    }
    assert set(third["contenders"]) == {MODEL_ALONE, *CONTENDERS}
    missing = {"reason": "not importable", "failed": False}
    assert third["contenders"][TORCHAO] == third["contenders"][DEEPSPEED] == missing
    assert list(failures(report)) == []
    conditions = reached([evaluate(point) for point in report["points"]])
    # 145 is more than 1.1 * 121, and 25 more than a quarter of 60.
    assert list(conditions.values()) == [True, False, None, None, False, True, None]
    everyone = [task for task in machine.tasks if task.contender == PLAIN]
    assert [task.batches for task in everyone] == [(5, 10, 20, 40, 80)]
    text = markdown(report)
    assert "20 x 4 tokens\n\nForward F: 40 ms. Update U: 40 ms. F/U: 1. One bucket b: 25" in text
    (row,) = {line for line in text.splitlines() if LABELS[TORCHAO] in line}
    assert "not importable" in row


def test_a_bucket_takes_its_share_of_the_updates_and_the_copy_of_its_gradients() -> None:
    steps = Steps(steps_ms=(1.0,), updates_only_ms=40.0)
    results = Results(
        sizes=TINY,
        device="cpu",
        num_steps=1,
        bus_down_gb_per_s=1e-5,
        machine={},
        batches=[(None, 1)],
        measured={SEQUENTIAL: Measured(buckets=(30, 50), steps={1: steps})},
    )
    (point,) = results.report()["points"]
    # 50 of 80 bytes of 40 ms, and 50 bytes at 10,000 a second.
    assert point["bucket_ms"] == pytest.approx(25.0 + 5.0)


def test_ratios_that_do_not_fit_are_not_tried() -> None:
    report = report_of(SimulatedMachine(fits=40))
    assert [point["target_ratio"] for point in report["points"]] == [0.25, 0.5, 1.0, 2.0]
    assert report["not_tried"] == [4.0]
    assert report_of(SimulatedMachine(), largest_batch=12)["not_tried"] == [1.0, 2.0, 4.0]


def test_a_batch_that_is_nearest_to_several_ratios_is_one_point() -> None:
    machine = SimulatedMachine()
    machine.UPDATE_MS = 2.0  # as much as the forward of one sequence
    report = report_of(machine)
    found = [(point["target_ratio"], point["num_sequences"]) for point in report["points"]]
    assert found == [(1.0, 1), (2.0, 2), (4.0, 4)]
    assert report["not_tried"] == [0.25, 0.5]


def test_of_ratios_with_one_batch_the_nearest_to_the_measured_one_is_kept() -> None:
    class SameForward(SimulatedMachine):
        """Every batch takes 21 ms, about half of the update, so that ratios share a batch."""

        def __call__(self, task: Task) -> Measured:
            found = super().__call__(task)
            if task.contender != MODEL_ALONE:
                return found
            return replace(
                found, steps={b: replace(s, forward_ms=21.0) for b, s in found.steps.items()}
            )

    report = report_of(SameForward())
    # 0.25 and 0.5 share one batch; 1, 2 and 4 share another.
    assert [point["target_ratio"] for point in report["points"]] == [0.5, 1.0]
    assert report["not_tried"] == [0.25, 2.0, 4.0]


@pytest.mark.parametrize("missing", [MODEL_ALONE, SEQUENTIAL])
def test_batches_cannot_be_chosen_without_the_contenders_for_it(missing: str) -> None:
    def run(task: Task) -> Measured:
        if task.contender == missing:
            return Measured(unavailable="not importable")
        return SimulatedMachine()(task)

    with pytest.raises(TrainBenchmarkError, match=f"{missing} failed.*: not importable"):
        measure_train(TINY, "cpu", run=run)


@pytest.mark.parametrize("broken", [FSDP2, OVERLAPPED])
def test_a_contender_that_breaks_has_the_reason_in_its_row(broken: str) -> None:
    report = report_of(SimulatedMachine(broken=broken))
    for point in report["points"]:
        assert point["contenders"][broken] == {"reason": "it broke", "failed": True}
        assert point["contenders"][PLAIN]["step_ms"] > 0
    assert next(failures(report)) == f"{broken} at 5 sequences: it broke"


@pytest.mark.parametrize("broken", [MODEL_ALONE, SEQUENTIAL])
def test_batches_cannot_be_chosen_without_forward_and_update(broken: str) -> None:
    with pytest.raises(TrainBenchmarkError, match=f"{broken} failed.*: it broke"):
        report_of(SimulatedMachine(broken=broken))


@pytest.mark.parametrize("fits", [3, 15])
def test_a_model_that_is_too_large_to_choose_batches_is_a_wrong_option(
    fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SmallGpu(fits=fits)
    measured = functools.partial(measure_train, run=machine)
    monkeypatch.setattr(bench_main, "measure_train", measured)
    result = CliRunner().invoke(app, ["bench", "train"])
    assert result.exit_code == 2
    assert "too little memory for 4 and 16 sequences" in result.output
    assert "--batches" in result.output
    assert report_of(machine, batches=[1])["points"][0]["num_sequences"] == 1


def test_the_model_alone_must_not_fail_at_one_of_two_batches() -> None:
    class Flaky(SimulatedMachine):
        def __call__(self, task: Task) -> Measured:
            found = super().__call__(task)
            return replace(found, reasons={b: "it broke" for b in task.batches if b > self.fits})

    with pytest.raises(TrainBenchmarkError, match=f"{MODEL_ALONE} failed.*: it broke"):
        report_of(Flaky(fits=4))


def test_given_batches_are_measured_and_the_report_is_kept_after_each_contender() -> None:
    kept: list[dict[str, Any]] = []
    machine = SimulatedMachine()
    names = [OVERLAPPED, TORCHAO, SEQUENTIAL]
    report = report_of(machine, batches=[30, 10, 30], contenders=names, keep=kept.append)
    assert [task.contender for task in machine.tasks] == [MODEL_ALONE, *names]
    assert {task.batches for task in machine.tasks} == {(10, 30)}
    assert [list(one["points"][0]["contenders"]) for one in kept] == [
        [MODEL_ALONE, *names[:n]] for n in range(len(names) + 1)
    ]
    # Conditions wait for U, which the sequential step tells.
    assert [bool(evaluate(one["points"][1])) for one in kept] == [False, False, False, True]
    assert kept[-1] == report
    point = report["points"][1]
    assert (point["num_sequences"], point["target_ratio"], point["ratio"]) == (30, None, 1.5)
    assert json.loads(json.dumps(report)) == report


def test_no_contender_gets_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    machine = SimulatedMachine()

    def hang(task: Task) -> Measured:
        machine.tasks.append(task)
        now_s[0] += task.time_limit_s
        return Measured(reasons=dict.fromkeys(task.batches, "it did not end"))

    names = [OVERLAPPED, PLAIN, FSDP2, SEQUENTIAL]
    report = measure_train(TINY, "cpu", batches=[1], contenders=names, time_limit_s=200.0, run=hang)
    limits = [task.time_limit_s for task in machine.tasks]
    # Twice the equal share of what is left: of five, four, three, two, and one.
    assert limits == pytest.approx([80.0, 60.0, 40.0, 20.0])
    reasons = {name: row["reason"] for name, row in report["points"][0]["contenders"].items()}
    assert reasons == dict.fromkeys([MODEL_ALONE, *names[:3]], "it did not end") | {
        SEQUENTIAL: "no time was left"
    }
    assert len(list(failures(report))) == 5


def test_a_batch_that_is_too_large_is_no_failure() -> None:
    report = report_of(SmallGpu(fits=5), batches=[5, 6], contenders=[PLAIN])
    row = report["points"][1]["contenders"][PLAIN]
    assert row == {"reason": OUT_OF_MEMORY, "failed": False}
    assert list(failures(report)) == []


@pytest.mark.parametrize("contender", [MODEL_ALONE, SEQUENTIAL, OVERLAPPED, PLAIN])
def test_a_real_task_on_a_cpu(contender: str) -> None:
    task = Task(contender=contender, sizes=TINY, device="cpu", batches=(2, 1), num_steps=2)
    reported: list[Measured] = []
    found = measure(task, reported.append)
    assert [len(one.steps) for one in reported] == [1, 2]
    assert reported[-1] == found
    block = 8 * (3 * 8 + 8 + 2 * 4 * 8) + 2 * 2 * 8
    assert found.num_parameters == 2 * 16 * 8 + block + 2 * 8
    assert set(found.steps) == {1, 2}
    for steps in found.steps.values():
        assert len(steps.steps_ms) == 2
        assert min(steps.steps_ms) > 0
        assert (steps.forward_ms or 0.0) > 0 or contender != MODEL_ALONE
        assert (steps.update_ms or 0.0) > 0 or contender == MODEL_ALONE
        assert steps.peak_gpu_nbytes is None
        assert (steps.updates_only_ms is None) == (contender in (PLAIN, MODEL_ALONE))
    assert bool(found.buckets) == (contender in (SEQUENTIAL, OVERLAPPED))


@pytest.mark.parametrize("contender", [TORCHAO, FSDP2, DEEPSPEED])
def test_peers_for_a_gpu_are_unavailable_on_a_cpu(contender: str) -> None:
    task = Task(contender=contender, sizes=TINY, device="cpu", batches=(1,), num_steps=1)
    assert measure(task) == Measured(unavailable="needs a GPU")


def fail_at(task: Task, tell: Any) -> Measured:
    """Stand in for `measure`: report the first batch, then fail as the contender's name says."""
    found = Measured(steps={1: Steps(steps_ms=(3.0,), forward_ms=1.0)})
    tell(found)
    if task.contender == "hang":
        time.sleep(100.0)
    if task.contender == "die":
        # The queue's thread needs a moment to send the first batch.
        time.sleep(0.5)
        os._exit(7)
    raise RuntimeError("out of luck\nmore")


@pytest.mark.parametrize(
    ("how", "limit_s", "reason"),
    [
        ("raise", 60.0, "RuntimeError: out of luck"),
        ("die", 60.0, "its process ended with 7"),
        ("hang", 2.0, "it did not end within 2 s"),
    ],
)
def test_the_batches_before_a_failure_count(
    how: str, limit_s: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A forked process inherits the patched function, and starts faster.
    monkeypatch.setattr(measure_module, "measure", fail_at)
    monkeypatch.setattr(measure_module, "START_METHOD", "fork")
    task = Task(
        contender=how,
        sizes=TINY,
        device="cpu",
        batches=(1, 2),
        num_steps=1,
        time_limit_s=limit_s,
    )
    found = in_own_process(task)
    assert set(found.steps) == {1}
    assert found.reasons == {2: reason}


def test_the_peak_of_host_memory_remains_after_the_memory_is_freed() -> None:
    gc.collect()  # garbage that is freed in the block would lower the growth
    nbytes = 256 * 2**20
    with HostPeak(torch.device("cpu")) as host:
        with mmap.mmap(-1, nbytes) as held:
            held[:: mmap.PAGESIZE] = bytes(nbytes // mmap.PAGESIZE)  # makes every page resident
            most = host.nbytes()
        assert host.nbytes() >= most >= nbytes // 2


def test_a_contender_clips_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 works on a CPU too, if it does not pin memory."""
    monkeypatch.setattr(contenders_module, "_require_gpu", lambda model: None)
    monkeypatch.setattr(
        contenders_module,
        "_init_process_group",
        lambda: dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1),
    )
    unpinned = functools.partial(fsdp.CPUOffloadPolicy, pin_memory=False)
    monkeypatch.setattr(fsdp, "CPUOffloadPolicy", unpinned)
    for name in (PLAIN, FSDP2):
        contender = CONTENDERS[name](make_model(TINY, torch.device("cpu")))
        try:
            contender.backward(make_tokens(TINY, 2, torch.device("cpu")))
            gradients = [p.grad for p in contender.model.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient.mul_(1000.0)
            contender.clip()
            shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
            norm = float(torch.stack([shard.float().norm() for shard in shards]).norm())
            assert norm == pytest.approx(MAX_GRAD_NORM, rel=0.02)
            contender.update()
        finally:
            contender.close()


def test_a_peer_that_is_not_installed_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "START_METHOD", "no such method")
    monkeypatch.setitem(contenders_module.PACKAGES, TORCHAO, "no_such_package")
    task = Task(contender=TORCHAO, sizes=TINY, device="cpu", batches=(1,), num_steps=1)
    assert in_own_process(task) == Measured(unavailable="not installed")


def test_an_error_in_the_contenders_process_is_the_reason() -> None:
    task = Task(contender="nobody", sizes=TINY, device="cpu", batches=(1,), num_steps=1)
    assert in_own_process(task) == Measured(reasons={1: "KeyError: 'nobody'"})


def test_it_needs_neither_pydantic_nor_typer_nor_rich() -> None:
    code = (
        "import sys\n"
        "for name in ('pydantic', 'typer', 'rich', 'yaml', 'vl_convert'):\n"
        "    sys.modules[name] = None\n"
        "import offload_adam.bench.__main__\n"
        "import offload_adam.doctor.bandwidth\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_the_command_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(SimulatedMachine(), batches=[3, 5])
    asked: list[Any] = []

    def measured(sizes: Sizes, device: str, **options: Any) -> dict[str, Any]:
        asked.append((sizes, options["batches"], options["contenders"]))
        options["keep"](report)
        return report

    monkeypatch.setattr(bench_main, "measure_train", measured)
    file = tmp_path / "report.json"
    arguments = ["--width=64", "--num-heads=4", "--vocabulary=50", "--num-layers=3"]
    chosen = ["--batches=3,5", f"--contenders={PLAIN},{FSDP2}", f"--json={file}"]
    result = CliRunner().invoke(app, ["bench", "train", *arguments, *chosen])
    assert result.exit_code == 0, result.output
    sizes = Sizes(width=64, num_heads=4, vocabulary=50, num_layers=3)
    assert asked == [(sizes, (3, 5), (PLAIN, FSDP2))]
    assert json.loads(file.read_text()) == report
    assert not list(tmp_path.glob("*.part"))
    assert "5 x 4 tokens" in result.output


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--num-heads=7", "num_heads (7) must divide width (1536)"),
        ("--num-layers=0", "num_layers must be at least 1, not 0"),
        ("--batches=3,x", "not x"),
        ("--batches=0", "not 0"),
        ("--contenders=nobody", "unknown contenders: nobody"),
        ("--dtype=int8", "int8"),
        ("--json=/", "/ cannot be written"),
    ],
)
def test_a_wrong_option_is_named(argument: str, said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "train", argument])
    assert result.exit_code == 2
    assert said in result.output


def test_a_failure_is_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(SimulatedMachine(broken=PLAIN), batches=[3])
    monkeypatch.setattr(bench_main, "measure_train", lambda *_, **__: report)
    result = CliRunner().invoke(app, ["bench", "train"])
    assert result.exit_code == 1
    assert "offload-adam: torch_fused at 3 sequences: it broke" in result.output


def test_every_contender_has_a_label_and_is_in_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(CONTENDERS) == {OVERLAPPED, SEQUENTIAL, PLAIN, TORCHAO, FSDP2, DEEPSPEED}
    assert set(LABELS) == {MODEL_ALONE, *CONTENDERS}
    result = CliRunner().invoke(app, ["bench", "train", "--help"])
    assert result.exit_code == 0
    # Without typer, the arguments come from the command line.
    monkeypatch.setattr(sys, "argv", ["bench", "train", "--help"])
    with pytest.raises(SystemExit, match="0"):
        bench_main.main()
    for text in (result.output, capsys.readouterr().out):
        assert all(name in text for name in CONTENDERS)
