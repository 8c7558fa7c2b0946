"""`offload-adam train` with kept state: a killed run goes on as if nothing had happened."""

from __future__ import annotations

import io
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from offload_adam.checkpoint.format import read_manifest
from offload_adam.cli.app import app
from offload_adam.config import ConfigError, RunConfig
from offload_adam.kept.keeper_client import running_keepers
from offload_adam.train import loop
from offload_adam.train.job import run_job
from offload_adam.train.optimizer import keep_path, offload_policy
from tests.distributed.test_resume import bits, checksums, records, steps
from tests.support.jobs import run_on_ranks
from tests.support.keepers import kill_keeper
from tests.support.ranks import RankPool
from tests.support.torchrun import ROOT, run_two_ranks

NUM_STEPS = 12
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "OffloadAdam": {"lr": 0.01, "state_format": "int8"},
    "Adam": {
        "name": "Adam",
        "use_offload": True,
        "learning_rate": {
            "name": "CosineDecayLR",
            "min_lr": 0.0,
            "max_lr": 0.01,
            "decay_steps": NUM_STEPS,
        },
    },
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    folder = Path(tempfile.mkdtemp(prefix="offload_adam-test-", dir="/dev/shm"))
    yield folder
    if any(keeper.folder == folder for keeper in running_keepers()):
        kill_keeper(folder)
    shutil.rmtree(folder)


def values(
    folder: Path,
    memory: Path | None,
    optimizer: str = "OffloadAdam",
    kind: str = "shared",
    **sections: dict[str, Any],
) -> dict[str, Any]:
    train = {"num_steps": NUM_STEPS, "batch_size": 4, "sequence_length": 16, "eval_sequences": 8}
    keep = {} if memory is None else {"keep": kind, "keep_path": str(memory)}
    chosen: dict[str, Any] = {
        "run": {"name": "case", "dir": str(folder)},
        "model": {"factory": "tests.support.killed_train:make_model"},
        "train": train | {"eval_every": 5},
        "optimizer": OPTIMIZERS[optimizer] | {"num_threads": 1},
        "schedule": {"warmup_steps": 3} if optimizer == "OffloadAdam" else {},
        "memory": keep,
        "checkpoint": {"every": 5, "keep_last": 10},
    }
    return {name: section | sections.get(name, {}) for name, section in chosen.items()}


def run(folder: Path, memory: Path | None, **sections: Any) -> list[dict[str, Any]]:
    config = RunConfig.model_validate(values(folder, memory, **sections))
    run_job(config, Console(file=io.StringIO()))
    return records(folder)


def interrupted(
    folder: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, step: int, **sections: Any
) -> None:
    """Run until the forward after a step raises an error, without the checkpoint of the step."""
    accumulate = loop._accumulate_gradients

    def fail_after(job: loop.Job, current: int, *args: Any) -> torch.Tensor:
        if current > step:
            raise RuntimeError("a fault")
        return accumulate(job, current, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate_gradients", fail_after)
        with pytest.raises(RuntimeError, match="a fault"):
            run(folder, memory, **sections)


def assert_same_run(found: Path, expected: Path) -> None:
    assert bits(records(found)) == bits(records(expected))
    assert len(records(found)) == NUM_STEPS
    assert steps(found) == steps(expected) == [5, 10, 12]
    for step in steps(expected):
        assert checksums(found, step) == checksums(expected, step)
        states = [
            read_manifest(folder / "case" / "checkpoints" / f"step-{step}").decoded_extra()["train"]
            for folder in (found, expected)
        ]
        assert states[0] == states[1]  # the schedule and random states


def config_file(folder: Path, memory: Path, **sections: Any) -> str:
    path = folder / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values(folder, memory, **sections)))
    return str(path)


KILLS = [
    ("OffloadAdam", "decided", 7),
    ("OffloadAdam", "recorded", 10),  # its line is there, its checkpoint is not
    ("Adam", "decided", NUM_STEPS),
]


def test_a_killed_run_is_the_undisturbed_one(tmp_path: Path, memory: Path) -> None:
    module = [sys.executable, "-m", "tests.support.killed_train", "0"]
    places = [tmp_path / f"{name}-{place}" for name, place, _ in KILLS]
    killed = [
        subprocess.Popen(
            [
                *(*module, place, str(step), "train"),
                config_file(folder, memory / folder.name, optimizer=name),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for (name, place, step), folder in zip(KILLS, places, strict=True)
    ]
    for name in OPTIMIZERS:
        run(tmp_path / name, None, optimizer=name)
    for process in killed:
        assert process.wait(60) == -9
    for (name, place, step), folder in zip(KILLS, places, strict=True):
        file = memory / folder.name / "rank-00000"
        assert file.exists()
        found = run(folder, memory / folder.name, optimizer=name)
        assert_same_run(folder, tmp_path / name)
        # The time of a step that two processes have run is not known, unless it was recorded.
        assert (found[step - 1]["step_ms"] is None) == (place == "decided")
        assert not file.exists()  # the run is over


@pytest.mark.distributed
@pytest.mark.parametrize("keep", ["shared", "keeper"])
def test_torchrun_restarts_a_run_from_memory(
    ranks: RankPool, tmp_path: Path, memory: Path, keep: str
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["--max-restarts=1", "-m", "tests.support.killed_train", "1", "decided", "7"]
    # Without checkpoints before the end: only memory has these steps.
    train: dict[str, Any] = {"train": {"eval_every": 0}, "checkpoint": {"every": 12}}
    path = config_file(killed, memory, kind=keep, **train)
    run_two_ranks([*arguments, "train", path], ROOT, timeout_s=90)
    run_on_ranks(ranks, 2, values(whole, None, **train))
    assert bits(records(killed)) == bits(records(whole))
    assert checksums(killed, NUM_STEPS) == checksums(whole, NUM_STEPS)
    assert records(killed)[6]["step_ms"] is None  # it was resumed, not repeated
    assert not list(memory.glob("rank-0000?"))
    assert (memory / "keeper.sock").exists() == (keep == "keeper")  # until the keeper ends


def test_the_newer_of_memory_and_intact_checkpoint_wins(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole", None)
    checkpoints = tmp_path / "case" / "checkpoints"
    later = tmp_path / "whole" / "case" / "checkpoints" / "step-10"
    for is_intact in (True, False):
        interrupted(tmp_path, memory, monkeypatch, 7, checkpoint={"resume": "never"})
        shutil.rmtree(checkpoints / "step-10", ignore_errors=True)
        shutil.copytree(later, checkpoints / "step-10")
        if not is_intact:
            (checkpoints / "step-10" / "manifest.json").write_text("{}")
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(tmp_path, memory)
        assert bits(records(tmp_path))[-2:] == bits(records(tmp_path / "whole"))[-2:]
        assert len(records(tmp_path)) == (7 + 2 if is_intact else NUM_STEPS)
        for step in (10, NUM_STEPS):  # the damaged one was set aside
            assert checksums(tmp_path, step) == checksums(tmp_path / "whole", step)
        kept = f"Not resuming from kept state at step 7: {checkpoints / 'step-10'} is newer"
        assert (kept in caplog.text) == is_intact
        assert ("Resumed from kept state after step 7" in caplog.text) == (not is_intact)
        assert ("Skipping checkpoint step-10" in caplog.text) == (not is_intact)


def test_never_and_a_path_come_before_memory_but_not_in_a_restart(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", None)
    first = tmp_path / "whole" / "case" / "checkpoints" / "step-5"
    for resume, restarts, num_left in (("never", 0, 12), (str(first), 0, 7), ("never", 1, 4)):
        folder = tmp_path / f"{num_left}"
        interrupted(folder, memory, monkeypatch, 9)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        (folder / "case" / "metrics.jsonl").unlink()
        found = run(folder, memory, checkpoint={"resume": resume})
        assert bits(found) == bits(records(tmp_path / "whole")[-num_left:])
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")


@pytest.mark.distributed
def test_another_world_size_resumes_from_the_checkpoint(
    ranks: RankPool, tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, memory, monkeypatch, 7)
    shutil.copytree(tmp_path / "case", tmp_path / "without" / "case")
    run_on_ranks(ranks, 2, values(tmp_path / "without", None))
    run_on_ranks(ranks, 2, values(tmp_path, memory))
    assert bits(records(tmp_path)) == bits(records(tmp_path / "without"))
    assert len(records(tmp_path)) == NUM_STEPS


@pytest.mark.parametrize("part", ["header", "records"])
def test_damaged_kept_state_is_not_used(
    part: str,
    tmp_path: Path,
    memory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupted(tmp_path, memory, monkeypatch, 7)
    content = bytearray((memory / "rank-00000").read_bytes())
    # The identity, or all records up to the arena of less than 128 KiB.
    start, end = (100, 101) if part == "header" else (512, len(content) - 2**17)
    content[start:end] = bytes(end - start)
    (memory / "rank-00000").write_bytes(content)
    with caplog.at_level(logging.INFO):
        run(tmp_path, memory)
    run(tmp_path / "whole", None)
    assert_same_run(tmp_path, tmp_path / "whole")
    reason = "has a damaged header" if part == "header" else "no step was decided"
    assert reason in caplog.text
    assert f"Resuming from {tmp_path / 'case' / 'checkpoints' / 'step-5'} at step 5" in caplog.text


def test_a_changed_configuration_is_rejected(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, memory, monkeypatch, 7)
    with pytest.raises(ConfigError, match=r"train\.batch_size: was 4 in kept state and is 8 now"):
        run(tmp_path, memory, train={"batch_size": 8})
    # With this change the optimizer could not use the state, and would delete it.
    with pytest.raises(ConfigError, match=r"train\.dtype: was"):
        run(tmp_path, memory, train={"dtype": "bf16"})
    # Neither may another run use this folder, even one that resumes from nothing.
    for resume in ("auto", "never"):
        with pytest.raises(
            ConfigError, match=r"has the state of the run in .*case: choose another"
        ):
            run(tmp_path / "other", memory, checkpoint={"resume": resume})
    run(tmp_path, memory)  # the state is still there
    run(tmp_path / "whole", None)
    assert_same_run(tmp_path, tmp_path / "whole")


def test_state_in_use_ends_with_2_and_the_process(tmp_path: Path, memory: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from offload_adam.kept.lock import KeptLock;"
        "lock = KeptLock(Path(sys.argv[1])); lock.acquire(0); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(memory / "rank-00000")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            path = config_file(tmp_path, memory)
            result = CliRunner().invoke(app, ["train", path, "--memory.attach_timeout=0.2"])
        finally:
            holder.kill()
    assert result.exit_code == 2
    assert f"in use by process {holder.pid} on " in result.output


def test_a_preempted_run_resumes_from_memory(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accumulate = loop._accumulate_gradients

    def signal_in(job: loop.Job, step: int, *args: Any) -> torch.Tensor:
        if step == 7:
            signal.raise_signal(signal.SIGUSR1)
        return accumulate(job, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate_gradients", signal_in)
        run(tmp_path, memory)
    assert steps(tmp_path) == [5, 7]  # the last one is not newer than memory
    with caplog.at_level(logging.INFO):
        run(tmp_path, memory)
    assert "Resumed from kept state after step 7" in caplog.text
    shutil.rmtree(tmp_path / "case" / "checkpoints" / "step-7")
    run(tmp_path / "whole", None)
    assert_same_run(tmp_path, tmp_path / "whole")


def test_the_default_folder_is_of_the_user_and_the_run(tmp_path: Path) -> None:
    one, other = (
        RunConfig.model_validate(
            values(tmp_path / name, None) | {"memory": {"keep": "shared", "keep_path": None}}
        )
        for name in ("one", "other")
    )
    assert keep_path(one).startswith("/dev/shm/offload_adam-")
    assert Path(keep_path(one)).name.startswith("case-")
    assert keep_path(one) != keep_path(other)
    assert offload_policy(one).keep_path == keep_path(one)
