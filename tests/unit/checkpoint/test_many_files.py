"""A checkpoint with more files than a process may open. Each block is read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from offload_adam import OffloadAdam, OffloadPolicy, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.commit import commit_files
from offload_adam.checkpoint.export import export_dcp, export_torch
from offload_adam.checkpoint.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    OptimizerEntry,
    RankEntry,
    sealed,
)
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.checkpoint.optimizer_access import ParameterNames, plain_state
from offload_adam.checkpoint.rank_file import Part, RankFile, rank_file_name
from offload_adam.checkpoint.reader import NUM_OPEN_FILES, VerifiedFile
from offload_adam.checkpoint.save import manifest_of, sharded_parts
from offload_adam.checkpoint.torch_file import write_torch_file
from offload_adam.encoding import encode
from offload_adam.errors import CheckpointError
from offload_adam.state.boxes import boxes_of_range

NUM_RANKS = 48


def make(seed: int) -> tuple[nn.Module, OffloadAdam]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(61, 40), nn.Linear(40, 33)).to(torch.bfloat16)
    return model, OffloadAdam(model.parameters(), lr=0.1, offload=OffloadPolicy(bucket_nbytes=2048))


def state_of(model: nn.Module, optimizer: OffloadAdam) -> list[torch.Tensor]:
    planes = ("master_weight", "exp_avg", "exp_avg_sq", "step")
    found = [optimizer.state[p][key] for p in model.parameters() for key in planes]
    return [*found, *(p.detach() for p in model.parameters())]


def cut(part: Part, rank: int) -> Part:
    """Return the range of a part that one of many ranks would own."""
    numel = part.data.numel()
    low, high = rank * numel // NUM_RANKS, (rank + 1) * numel // NUM_RANKS
    boxes = boxes_of_range([part.shape[dim] for dim in part.order], low, high)
    return replace(part, boxes=boxes, data=part.data[low:high])


def write_file(folder: Path, rank: int, parts: list[Part]) -> RankEntry:
    own = [cut(part, rank) for part in parts]
    own = [part for part in own if part.data.numel()]
    file = RankFile(folder, rank_file_name(rank, NUM_RANKS), own)
    file.write(own)
    return file.finish()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """Write a checkpoint as `NUM_RANKS` ranks would; return it and its tensors."""
    target = tmp_path_factory.mktemp("many") / "c"
    partial = target.with_name("c.partial")
    partial.mkdir()
    model, optimizer = make(seed=1)
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) + step
        optimizer.step()
    parts = list(sharded_parts(model, optimizer._settled()))
    entries = [write_file(partial, rank, parts) for rank in range(NUM_RANKS)]
    core = optimizer._settled()
    plain = encode(plain_state(optimizer, core, ParameterNames(model, core)), "optimizer")
    written = Manifest(
        format_version=FORMAT_VERSION,
        step=optimizer.num_steps,
        world_size=NUM_RANKS,
        tensors={},
        files={},
        optimizer=OptimizerEntry.model_validate(plain),
        tied={},
        values={},
        extra={},
    )
    commit_files(partial, target, manifest_of(entries, written))
    return target, [tensor.clone() for tensor in state_of(model, optimizer)]


class Watched:
    """Counts the blocks read from each file, and the files that are open at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[tuple[Path, int]] = []
        self.most_open = 0
        fill = VerifiedFile._fill

        def counted(file: VerifiedFile, view: memoryview, start: int) -> None:
            self.blocks.append((file._path, start))
            links = [os.readlink(f"/proc/self/fd/{n}") for n in _descriptors()]
            found = sum(link.endswith(".safetensors") for link in links)
            self.most_open = max(self.most_open, found)
            fill(file, view, start)

        monkeypatch.setattr(VerifiedFile, "_fill", counted)


def _descriptors() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if Path("/proc/self/fd", name).exists()]


def test_every_block_is_read_once_and_few_files_are_open(
    saved: tuple[Path, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved
    model, optimizer = make(seed=2)
    watched = Watched(monkeypatch)
    load_checkpoint(folder, model=model, optimizer=optimizer)
    assert all(map(torch.equal, state_of(model, optimizer), expected))
    assert len(watched.blocks) == len(set(watched.blocks)) == NUM_RANKS
    assert watched.most_open == NUM_OPEN_FILES


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_damage_of_any_file_is_found(saved: tuple[Path, list[torch.Tensor]], how: str) -> None:
    folder, _ = saved
    path = folder / rank_file_name(NUM_RANKS // 2, NUM_RANKS)
    content = path.read_bytes()
    model, optimizer = make(seed=2)
    before = [tensor.clone() for tensor in state_of(model, optimizer)]
    try:
        if how == "missing":
            path.unlink()
        else:
            damaged = content[:-1] if how == "truncated" else content[:-1] + b"\x7f"
            path.write_bytes(damaged)
        for action in (lambda: verify_checkpoint(folder), lambda: _load(folder, model, optimizer)):
            with pytest.raises(CheckpointError, match=path.name):
                action()
    finally:
        path.write_bytes(content)
    if how != "flipped":  # seen before anything is read
        assert all(map(torch.equal, state_of(model, optimizer), before))
    verify_checkpoint(folder)


def _load(folder: Path, model: Any, optimizer: Any) -> None:
    load_checkpoint(folder, model=model, optimizer=optimizer)


FEW = """
import os, resource, sys
from pathlib import Path
import torch
from offload_adam import load_checkpoint
from offload_adam.checkpoint.export import export_dcp, export_torch
from offload_adam.checkpoint.load import verify_checkpoint
from tests.unit.checkpoint.test_many_files import make, state_of

folder, out = map(Path, sys.argv[1:])
model, optimizer = make(seed=2)
most = max(int(name) for name in os.listdir("/proc/self/fd")) + 16
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
assert most < len(list(folder.glob("*.safetensors")))
verify_checkpoint(folder)
load_checkpoint(folder, model=model, optimizer=optimizer)
export_torch(folder, out / "t.pt")
export_dcp(folder, out / "dcp")
torch.save(state_of(model, optimizer), out / "loaded.pt")
"""


def test_a_process_may_open_fewer_files_than_there_are(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved
    done = subprocess.run(
        [sys.executable, "-c", FEW, str(folder), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(map(torch.equal, torch.load(tmp_path / "loaded.pt"), expected))
    exported = torch.load(tmp_path / "t.pt", weights_only=True)["model"]
    names = [name for name, _ in make(seed=2)[0].named_parameters()]
    assert all(torch.equal(exported[n], t) for n, t in zip(names, expected[-4:], strict=True))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_many_pieces_are_exported_in_linear_time(tmp_path: Path, num_rows: int) -> None:
    """Each of 4,000 columns is a piece: searching all of them for each one takes a minute."""
    model = nn.Linear(2, 2)
    table = torch.arange(4000 * num_rows, dtype=torch.int32).view(num_rows, 4000)
    model.register_buffer("table", table)
    save_checkpoint(tmp_path / "c", model=model, optimizer=OffloadAdam(model.parameters()))
    values = json.loads((tmp_path / "c" / MANIFEST_NAME).read_text())
    del values["sha256"]
    entry = values["tensors"]["model/table"]
    (piece,) = entry["pieces"]
    entry["pieces"] = [
        {
            **piece,
            "offsets": [0, column],
            "sizes": [num_rows, 1],
            "start": piece["start"] + 4 * num_rows * column,
        }
        for column in range(4000)
    ]
    (tmp_path / "c" / MANIFEST_NAME).write_text(sealed(values))
    began = time.monotonic()
    export_torch(tmp_path / "c", tmp_path / "t.pt")
    export_dcp(tmp_path / "c", tmp_path / "dcp")
    assert time.monotonic() - began < 20
    # The bytes of the file are now one column after the other.
    expected = table.view(-1).view(4000, num_rows).t()
    found = torch.load(tmp_path / "t.pt", weights_only=True)["model"]["table"]
    assert torch.equal(found, expected)
    target = {"model": {"table": torch.zeros_like(table)}}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(target["model"]["table"], expected)


def test_many_values_are_exported_at_once(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    numbers = {f"k{number}": number for number in range(3000)}
    extra = {"first": np.arange(3), **numbers, "last": np.arange(3)}
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)
    place = "offload_adam.checkpoint.export.write_torch_file"
    with mock.patch(place, wraps=write_torch_file) as written:
        described = export_torch(tmp_path / "c", tmp_path / "c.pt")
    assert written.call_count < 60
    assert "without extra['first'], extra['last']" in described
    found = torch.load(tmp_path / "c.pt", weights_only=True)["extra"]
    assert found == numbers
    assert list(found) == list(numbers)
