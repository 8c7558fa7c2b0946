"""Two jobs never write to one run's folder, and no dead process keeps a folder locked."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from offload_adam.config import ConfigError, RunConfig
from offload_adam.errors import RunFolderLostError
from offload_adam.train import run_folder
from offload_adam.train.run_folder import locked_run_folder

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys, time
from offload_adam.config import RunConfig
from offload_adam.train import run_folder
from offload_adam.train.run_folder import locked_run_folder

run_folder.LEASE_S = float(sys.argv[2])
with locked_run_folder(RunConfig.model_validate({"run": {"name": "case", "dir": sys.argv[1]}})):
    print("held", flush=True)
    time.sleep(100)
"""


def config(folder: Path) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "case", "dir": str(folder)}})


def start_holder(folder: Path, lease_s: float = 3.0) -> subprocess.Popen[str]:
    """Start a process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(lease_s)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LEASE_S", 3.0)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_job_is_rejected_and_a_dead_ones_lock_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEASE_S", 10.0)
    process = start_holder(tmp_path, 10.0)
    try:
        message = f"case is in use by process {process.pid} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=message), locked_run_folder(config(tmp_path)):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(30.0)
        began = time.monotonic()
        with locked_run_folder(config(tmp_path)) as require_held:
            assert time.monotonic() - began < 8.0  # less than the lease
            require_held()
    finally:
        process.kill()
        process.wait(30.0)
    assert not (tmp_path / "case").exists()


def test_the_command_ends_with_2_and_names_the_holder(tmp_path: Path) -> None:
    process = start_holder(tmp_path, 30.0)
    try:
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "offload_adam", "train", "configs/tiny.yaml"),
                *(f"--run.dir={tmp_path}", "--run.name=case"),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=100.0,
            check=False,
        )
    finally:
        process.kill()
        process.wait(30.0)
    assert ended.returncode == 2
    assert f"in use by process {process.pid} on {socket.gethostname()}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {path.name for path in (tmp_path / "case").iterdir()} == {"lock"}


def write_lock_of_another_host(folder: Path, lease_s: float) -> Path:
    """Write the lock of a process that cannot be looked for, in the form of the library."""
    with locked_run_folder(config(folder)):
        record = (folder / "case" / "lock").read_text(encoding="utf-8")
    lock = folder / "case" / "lock"
    lock.parent.mkdir()
    lock.write_text(record.replace(socket.gethostname(), "elsewhere"), encoding="utf-8")
    assert f"{lease_s!r}" in record
    return lock


def test_a_lock_of_another_host_is_taken_over_when_it_is_not_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEASE_S", 1.0)
    write_lock_of_another_host(tmp_path, 1.0)
    began = time.monotonic()
    with locked_run_folder(config(tmp_path)):
        assert 1.0 <= time.monotonic() - began < 10.0


def test_a_lock_of_another_host_is_respected_while_it_is_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LEASE_S", 2.0)
    lock = write_lock_of_another_host(tmp_path, 2.0)
    refresh = threading.Timer(0.5, lambda: os.utime(lock))
    refresh.start()
    with (
        pytest.raises(ConfigError, match=r"in use by process \d+ on elsewhere"),
        locked_run_folder(config(tmp_path)),
    ):
        pass
    refresh.join()
    assert "elsewhere" in lock.read_text(encoding="utf-8")


def test_a_job_whose_folder_was_taken_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stop that lasted longer than the lease, on another host."""
    monkeypatch.setattr(run_folder, "LEASE_S", 0.6)
    with locked_run_folder(config(tmp_path)) as require_held:
        lock = tmp_path / "case" / "lock"
        record = lock.read_text(encoding="utf-8")
        other = lock.with_name("other")
        record = re.sub(r"[0-9a-f]{32}", "0" * 32, record)  # a token for each owner
        other.write_text(record.replace(socket.gethostname(), "elsewhere"), encoding="utf-8")
        require_held()
        other.replace(lock)
        with pytest.raises(RunFolderLostError, match=r"taken over by process \d+ on elsewhere"):
            require_held()  # at once, not at the next refresh
    assert "elsewhere" in lock.read_text(encoding="utf-8")


def test_only_rank_0_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with locked_run_folder(config(tmp_path)) as require_held:
        require_held()
        assert not (tmp_path / "case").exists()


@pytest.mark.parametrize("rank", ["5", "-1", "x"])
def test_a_rank_without_a_launcher_does_not_count(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with locked_run_folder(config(tmp_path)):
        assert (tmp_path / "case" / "lock").is_file()


def test_a_lock_that_cannot_be_made_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "case" / "lock").mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match="lock cannot be created"),
        locked_run_folder(config(tmp_path)),
    ):
        pass
