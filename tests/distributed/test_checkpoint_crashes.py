"""A process that is killed while it saves: what was committed before stays whole and is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from offload_adam import OffloadAdam, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.config import RunConfig
from offload_adam.train.saving import find_checkpoint

SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from offload_adam import OffloadAdam, save_checkpoint
from offload_adam.checkpoint import commit, rank_file, save

where, folder = sys.argv[1:]

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "in the middle of the file":
    write, count = rank_file._SummedFile.write, [0]
    def some(self, data):
        count[0] += 1
        killed() if count[0] == 4 else write(self, data)
    rank_file._SummedFile.write = some
elif where == "before the manifest":
    save.commit_files = killed
elif where == "before the rename":
    Path.rename = killed
elif where == "after the rename":
    flush = commit.flush
    commit.flush = lambda path: flush(path) if path.suffix else killed()
model = torch.nn.Linear(40, 30)
optimizer = OffloadAdam(model.parameters(), lr=0.1)
model(torch.ones(2, 40)).sum().backward()
optimizer.step()
save_checkpoint(Path(folder) / "step-8", model=model, optimizer=optimizer)
"""


NEWEST = {
    "in the middle of the file": 4,
    "before the manifest": 4,
    "before the rename": 4,
    "after the rename": 8,
}
"""By the place of the kill: the step of the newest checkpoint afterwards."""


def make() -> tuple[torch.nn.Module, OffloadAdam]:
    model = torch.nn.Linear(40, 30)
    return model, OffloadAdam(model.parameters())


def saved(folder: Path) -> dict[str, bytes]:
    """Return the content of the files of step 4."""
    return {path.name: path.read_bytes() for path in (folder / "step-4").iterdir()}


class Killed(NamedTuple):
    """A run that was killed: its folder, and what step 4 held before."""

    folder: Path
    before: dict[str, bytes]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    """Return the runs by the place of the kill; their processes run at the same time."""
    runs, processes = {}, []
    for where in NEWEST:
        root = tmp_path_factory.mktemp("run")
        folder = root / "case" / "checkpoints"
        model, optimizer = make()
        save_checkpoint(folder / "step-4", model=model, optimizer=optimizer)
        runs[where] = Killed(root, saved(folder))
        command = [sys.executable, "-c", SAVE, where, str(folder)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        processes.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(100) for process in processes] == [-signal.SIGKILL] * len(NEWEST)
    finally:
        for process in processes:
            process.kill()
    return runs


@pytest.mark.parametrize("where", NEWEST)
def test_a_kill_leaves_the_newest_whole_checkpoint(killed: dict[str, Killed], where: str) -> None:
    (root, before), newest = killed[where], NEWEST[where]
    folder = root / "case" / "checkpoints"
    model, optimizer = make()
    config = RunConfig.model_validate({"run": {"name": "case", "dir": str(root)}})
    found = find_checkpoint(config)
    assert found == folder / f"step-{newest}"
    assert saved(folder) == before
    load_checkpoint(found, model=model, optimizer=optimizer)
    assert optimizer.num_steps == (1 if newest == 8 else 0)
    # What the killed process has left is in nobody's way.
    save_checkpoint(folder / "step-9", model=model, optimizer=optimizer)
    if newest == 4:
        save_checkpoint(folder / "step-8", model=model, optimizer=optimizer)
    assert verify_checkpoint(folder / "step-8").world_size == 1
    assert not list(folder.glob("*.partial"))
