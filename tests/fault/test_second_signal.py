"""A second SIGTERM ends a run at once; one in a burst or after a failure is no second request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fault.runs import PATIENCE, ROOT, TINY, finish, processes_of, start, wait_for

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

SLOW = """
import time
import torch

class Slow(torch.nn.Embedding):
    num_forwards = 0

    def forward(self, tokens):
        self.num_forwards += self.training
        if self.num_forwards == 4:
            print("in its fourth forward", flush=True)
            time.sleep({pause_s})
        return super().forward(tokens)

def make():
    return Slow(256, 256)
"""


def start_alone(folder: Path, pause_s: float, *overrides: str) -> subprocess.Popen[str]:
    """Start a run of one process whose fourth forward takes so long; wait until it is there."""
    (folder / "slow_model.py").write_text(SLOW.format(pause_s=pause_s))
    command = [sys.executable, "-m", "offload_adam", "train", str(TINY), f"--run.dir={folder}"]
    command += ["--model.factory=slow_model:make", "--train.eval_every=0", *PATIENCE, *overrides]
    command += ["--train.gradient_accumulation_steps=1"]
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    wait_for(folder, "in its fourth forward", process)
    return process


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("every", [0, 2])
def test_a_second_sigterm_ends_a_run_that_hangs(
    tmp_path: Path, first: signal.Signals, every: int
) -> None:
    process = start_alone(tmp_path, 150, f"--checkpoint.every={every}")
    process.send_signal(first)
    wait_for(tmp_path, f"Received {first.name}, ending after this step", process)
    time.sleep(3.5)
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)  # neither the first request nor another one of the same kind
    process.send_signal(signal.SIGTERM)
    ended = finish(tmp_path, process)
    assert ended.code == 143
    assert ended.took_s < 5
    assert "Received SIGTERM again, exiting at once in " in ended.printed
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step-2"
    assert checkpoint.is_dir() == (every > 0)
    stands = f"the newest checkpoint is {checkpoint}: the steps after it are lost"
    assert (stands if every else "there is no checkpoint: all steps") in ended.printed
    assert [record["step"] for record in ended.records] == [1, 2, 3]


def test_signals_in_one_burst_are_one_request(tmp_path: Path) -> None:
    process = start_alone(tmp_path, 5.0)
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
    ended = finish(tmp_path, process)
    assert ended.code == 0, ended.printed
    assert "preempted: ended after step 4, with a checkpoint" in ended.printed


def test_the_sigterm_after_a_failure_is_no_second_request(tmp_path: Path) -> None:
    """Rank 1 hangs after the request and dies: the last message of the survivors names it."""
    patient = ("--coordinator.stuck_after=90", "--train.num_steps=100000")
    process = start(tmp_path, "hang@forward", *patient, ranks=3)
    wait_for(tmp_path, "fault on rank", process)
    of_rank = {one.environ().get("RANK"): one for one in processes_of(tmp_path)}
    of_rank["0"].send_signal(signal.SIGTERM)
    wait_for(tmp_path, "Received SIGTERM, ending after this step", process)
    time.sleep(3.5)
    of_rank["1"].kill()
    ended = finish(tmp_path, process)
    assert ended.code == 1
    assert "Rank 1 is dead" in ended.printed
    assert "Received SIGTERM again" not in ended.printed


def test_a_second_sigterm_ends_a_rank_and_the_others_name_it(tmp_path: Path) -> None:
    patient = ("--coordinator.stuck_after=90", "--train.num_steps=100000")
    process = start(tmp_path, "hang@forward", *patient, ranks=2)
    wait_for(tmp_path, "fault on rank", process)
    of_rank = {one.environ().get("RANK"): one for one in processes_of(tmp_path)}
    of_rank["1"].send_signal(signal.SIGTERM)
    wait_for(tmp_path, "Received a signal to another rank, ending after this step", process)
    time.sleep(3.5)
    of_rank["1"].send_signal(signal.SIGTERM)
    ended = finish(tmp_path, process)
    assert ended.code == 1
    assert ended.took_s < 30
    assert "rank 1: Received SIGTERM again, exiting at once in " in ended.printed
    assert "Rank 1 is dead" in ended.printed
