"""Peak memory of saving, loading and exporting a checkpoint, beyond the state.

Measured is by how much the peak resident memory of a process exceeds its memory before the call.
Files are not mapped into memory, so the page cache does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STATED_NBYTES = 4 * 2**22
"""Loading takes four blocks. Saving host state takes only the snapshot buffer, which exists."""
EXPORT_NBYTES = 5 * 2**22
"""Four blocks for reading and one for writing."""
SLACK_NBYTES = 4 * 2**20
"""Python objects, and memory that the allocator keeps."""
ALLOCATOR_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed memory returns to the system: otherwise its reuse would hide an allocation."""

MEASURE = """
import json, sys
from pathlib import Path
import torch
from offload_adam import (
    OffloadAdam,
    OffloadPolicy,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.export import export_torch

folder = Path(sys.argv[1])


def resident(key):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(4096, 2048, bias=False) for _ in range(2)])
model = model.to(torch.bfloat16)
optimizer = OffloadAdam(
    model.parameters(),
    offload=OffloadPolicy(bucket_nbytes=8 * 2**20, snapshot_buffer_nbytes=64 * 2**20),
)
of = {"model": model, "optimizer": optimizer}


def step():
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


step()
save_checkpoint(folder / "first", **of)  # warm-up: imports and caches
load_checkpoint(folder / "first", **of)
export_torch(folder / "first", folder / "first.pt")
pending = []


def in_background():
    pending.append(begin_checkpoint(folder / "background", **of))
    optimizer._alive().external_edits.wait_for_snapshot()
    pending[0].wait()


found = {
    "sync": peak(lambda: save_checkpoint(folder / "sync", **of)),
    "async": peak(in_background),
    "load": peak(lambda: load_checkpoint(folder / "sync", **of)),
    "export": peak(lambda: export_torch(folder / "sync", folder / "t.pt")),
    "a tensor's copy": peak(lambda: optimizer.state[next(model.parameters())]["exp_avg"].clone()),
}
print(json.dumps({"peaks": found, "state": optimizer.host_nbytes["state"]}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_copy_of_the_state_is_made(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])} | ALLOCATOR_SETTINGS,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] > 8 * (STATED_NBYTES + SLACK_NBYTES)
    peaks = found["peaks"]
    assert peaks["a tensor's copy"] > STATED_NBYTES + SLACK_NBYTES  # a copy would be noticed
    assert peaks["sync"] < SLACK_NBYTES, peaks
    assert peaks["async"] < SLACK_NBYTES, peaks
    assert peaks["load"] < STATED_NBYTES + SLACK_NBYTES, peaks
    assert peaks["export"] < EXPORT_NBYTES + SLACK_NBYTES, peaks
    assert (tmp_path / "t.pt").stat().st_size > 8 * (EXPORT_NBYTES + SLACK_NBYTES)
