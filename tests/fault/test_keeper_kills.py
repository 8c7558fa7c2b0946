"""`offload-adam train` under torchrun, with a keeper, while ranks are killed again and again."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from offload_adam.kept.keeper_client import RunningKeeper, running_keepers
from tests.distributed.test_resume import bits, checksums, records, steps
from tests.distributed.test_train_kept import values
from tests.support.jobs import run_on_ranks
from tests.support.ranks import RankPool
from tests.support.torchrun import ROOT

pytestmark = [pytest.mark.fault, pytest.mark.distributed]

START_S = 3.0
"""About the time from the start of a rank's process to its first step."""
RESUMED = re.compile(rb"Resumed from kept state after step (\d+)")


@pytest.fixture
def keeper_folder(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a keeper, which is stopped afterwards."""
    folder = tmp_path / "keeper"
    yield folder
    for keeper in keepers_of(folder):
        os.kill(keeper.pid, signal.SIGTERM)


def keepers_of(folder: Path) -> list[RunningKeeper]:
    return [keeper for keeper in running_keepers() if keeper.folder == folder]


class KilledRun:
    """A run under torchrun whose ranks get killed.

    Owns: torchrun and its ranks; `close` kills those that still run.
    """

    def __init__(self, folder: Path, sections: dict[str, Any], num_kills: int) -> None:
        folder.mkdir()
        self._metrics = folder / "case" / "metrics.jsonl"
        self._printed = folder / "printed"
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(sections))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # A kill may cost more than one restart, if it comes while others end.
        command += ["--nproc-per-node=2", f"--max-restarts={num_kills * 3 // 2}"]
        with self._printed.open("wb") as printed:
            self._torchrun = psutil.Popen(
                [*command, "-m", "offload_adam", "train", str(config)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        self._seen: set[psutil.Process] = set()

    @property
    def printed(self) -> bytes:
        return self._printed.read_bytes()

    @property
    def written(self) -> bytes:
        """The complete lines of metrics.jsonl."""
        content = self._metrics.read_bytes() if self._metrics.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    @property
    def num_steps(self) -> int:
        return self.written.count(b"\n")

    def wait_for_ranks(self) -> list[psutil.Process]:
        """Wait for the processes that torchrun starts next, and return them."""

        def new() -> list[psutil.Process]:
            return [one for one in self._torchrun.children() if one not in self._seen]

        self._wait_until(lambda: len(new()) == 2)
        self._seen.update(found := new())
        return found

    def wait_for_steps(self, num_steps: int) -> None:
        """Wait until so many further steps are in metrics.jsonl."""
        last = self.num_steps + num_steps
        self._wait_until(lambda: self.num_steps >= last)

    def _wait_until(self, is_reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_reached():
            assert self._torchrun.poll() is None, self.printed.decode()[-5000:]
            assert time.monotonic() < deadline_s, self.printed.decode()[-5000:]
            time.sleep(0.003)

    def finish(self) -> None:
        assert self._torchrun.wait(120) == 0, self.printed.decode()[-5000:]

    def close(self) -> None:
        if self._torchrun.is_running():
            ranks = self._torchrun.children()
            self._torchrun.kill()  # first, or it would start the ranks again
            for rank in ranks:
                if rank.is_running():
                    rank.kill()
            self._torchrun.wait(10)


def run_with_kills(
    ranks: RankPool, folder: Path, keeper_folder: Path, num_kills: int, num_steps: int, seed: int
) -> int:
    """Kill ranks at random moments, and compare the run with an undisturbed one.

    Returns:
        How often the run was resumed from kept state.
    """
    sections: dict[str, Any] = {
        "model": {"factory": "tests.support.slow_model:make_model"},
        "train": {"num_steps": num_steps, "eval_every": 0},
        "checkpoint": {"every": num_steps},  # before the end, only memory has the steps
    }
    memory = {"keep": "keeper", "keep_path": str(keeper_folder)}
    killed, whole = folder / "killed", folder / "whole"
    rng = random.Random(seed)
    moments: list[tuple[bytes, int]] = []
    run = KilledRun(killed, values(killed, None, **sections) | {"memory": memory}, num_kills)
    try:
        for number in range(num_kills):
            processes = run.wait_for_ranks()
            if number > 0 and rng.random() < 0.2:
                time.sleep(rng.uniform(0.0, START_S))
            else:
                run.wait_for_steps(rng.randint(1, 4))
                time.sleep(rng.uniform(0.0, 0.03))
            moments.append((run.written, len(run.printed)))
            for victim in rng.choice([[0], [1], [0, 1], [1, 0]]):
                processes[victim].kill()
        run.finish()
    finally:
        run.close()
    printed = run.printed
    resumed = [(found.start(), int(found[1])) for found in RESUMED.finditer(printed)]
    caught = [written.count(b"\n") for written, _ in moments]
    print(f"{num_kills} kills after steps {caught}, {len(resumed)} resumed: {resumed}")

    run_on_ranks(ranks, 2, values(whole, None, **sections))
    assert [record["step"] for record in records(killed)] == list(range(1, num_steps + 1))
    assert bits(records(killed)) == bits(records(whole))
    assert steps(killed) == [num_steps]
    assert checksums(killed, num_steps) == checksums(whole, num_steps)
    # A repeated step would have replaced its line, which has the times of its parts.
    for written, position in moments:
        assert run.written.startswith(written)
        later_starts = [step for start, step in resumed if start >= position]
        assert min(later_starts, default=num_steps) >= written.count(b"\n")
    assert b"Not resuming from kept state" not in printed
    assert not any(keeper.files for keeper in keepers_of(keeper_folder))  # the run is over
    return len(resumed)


def test_two_kills(ranks: RankPool, tmp_path: Path, keeper_folder: Path) -> None:
    assert run_with_kills(ranks, tmp_path, keeper_folder, 2, 40, seed=2) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_kills(ranks: RankPool, tmp_path: Path, keeper_folder: Path) -> None:
    assert run_with_kills(ranks, tmp_path, keeper_folder, 40, 400, seed=1) >= 30
