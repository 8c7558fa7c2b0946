"""A process that is killed while it saves: what was committed before stays whole and is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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
from offload_adam.checkpoint import files, save

where, folder = sys.argv[1:]

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "in the middle of the file":
    write, count = files._SummedFile.write, [0]
    def some(self, data):
        count[0] += 1
        killed() if count[0] == 4 else write(self, data)
    files._SummedFile.write = some
elif where == "before the manifest":
    save.commit_files = killed
elif where == "before the rename":
    Path.rename = killed
elif where == "after the rename":
    rename, flush = Path.rename, save.flush_folder
    save.flush_folder = lambda path: flush(path) if path.suffix else killed()
model = torch.nn.Linear(40, 30)
optimizer = OffloadAdam(model.parameters(), lr=0.1)
model(torch.ones(2, 40)).sum().backward()
optimizer.step()
save_checkpoint(Path(folder) / "step-8", model=model, optimizer=optimizer)
"""


@pytest.mark.parametrize(
    ("where", "newest"),
    [
        ("in the middle of the file", 4),
        ("before the manifest", 4),
        ("before the rename", 4),
        ("after the rename", 8),
    ],
)
def test_a_kill_leaves_the_newest_whole_checkpoint(tmp_path: Path, where: str, newest: int) -> None:
    folder = tmp_path / "case" / "checkpoints"
    model = torch.nn.Linear(40, 30)
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(folder / "step-4", model=model, optimizer=optimizer)
    before = {path.name: path.read_bytes() for path in (folder / "step-4").iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", SAVE, where, str(folder)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    config = RunConfig.model_validate({"run": {"name": "case", "dir": str(tmp_path)}})
    found = find_checkpoint(config)
    assert found == folder / f"step-{newest}"
    assert {path.name: path.read_bytes() for path in (folder / "step-4").iterdir()} == before
    load_checkpoint(found, model=model, optimizer=optimizer)
    assert optimizer.num_steps == (1 if newest == 8 else 0)
    # What the killed process has left is in nobody's way.
    save_checkpoint(folder / "step-9", model=model, optimizer=optimizer)
    if newest == 4:
        save_checkpoint(folder / "step-8", model=model, optimizer=optimizer)
    assert verify_checkpoint(folder / "step-8").world_size == 1
    assert not list(folder.glob("*.partial"))
