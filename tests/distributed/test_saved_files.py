"""Files of earlier versions load into any world size, and training continues as it did then."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

from offload_adam import load_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.train.job import run_job
from tests.distributed.test_checkpoints import assert_same
from tests.saved import write
from tests.support.models import Model
from tests.support.ranks import RankPool

FOLDERS = sorted(write.HERE.glob("format_*/*-*"))
WAYS = ("checkpoint", "distributed", "state_dict", "full_state_dict")


def cases() -> Iterator[tuple[Path, str, int]]:
    """Yield what can be loaded: a folder, the way that it is read, and a world size."""
    for folder, way, world_size in itertools.product(FOLDERS, WAYS, (1, 2)):
        case, saved_world = folder.name.rsplit("-", 1)
        if case == "amsgrad" and world_size > 1:
            continue  # amsgrad is for one rank
        if way == "state_dict" and case != "adam" and world_size != int(saved_world):
            continue  # a rank's own part belongs to its world; beside the parameters it is whole
        yield folder, way, world_size


def load(way: str, folder: Path, rank: int, model: Model, optimizer: Any) -> None:
    """Load what one way of saving wrote; weights come with the first of them alone."""
    expected = torch.load(folder / "expected.pt")["saved"]
    if way == "checkpoint":
        extra = load_checkpoint(folder / "checkpoint", model=model, optimizer=optimizer)
        written = write.EXTRAS[folder.parent.name]
        assert extra == written
        assert repr(extra) == repr(written)  # and so of the same types
        return
    model.load_state_dict(expected["weights"])
    if way == "distributed":
        state = {"optimizer": OptimizerState(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / "distributed")
        return
    saved_world = int(folder.name.rsplit("-", 1)[1])
    own = torch.load(folder / f"rank-{rank % saved_world}.pt")
    if way == "full_state_dict":
        own = expected["full"]
    optimizer.load_state_dict(own)
    optimizer.num_steps = expected["num_steps"]


def load_and_go_on(
    rank: int, world_size: int, case: str, folder: str, way: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all values after loading into other weights, and after three steps more."""
    model, optimizer = write.make(case, seed=2 + rank)
    load(way, Path(folder), rank, model, optimizer)
    loaded = write.values(model, optimizer)
    write.train(model, optimizer, write.NUM_STEPS, 2 * write.NUM_STEPS)
    after = write.values(model, optimizer)
    optimizer.close()
    return loaded, after


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Compare what later steps give; another processor rounds a gradient otherwise."""
    if isinstance(expected, torch.Tensor):
        # A bf16 gradient is a sum of terms that are each rounded to 2**-9 of their size. Where they
        # cancel, the error is a few percent of the tensor's largest element.
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            found, expected, rtol=2e-2, atol=max(1e-5, 0.05 * largest), msg=where
        )
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert_close(dict(enumerate(found)), dict(enumerate(expected)), where)
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("folder", "way", "world_size"),
    cases(),
    ids=lambda value: "/".join(Path(str(value)).parts[-2:]),
)
def test_every_saved_file_loads_to_the_bit(
    ranks: RankPool, folder: Path, way: str, world_size: int
) -> None:
    case = folder.name.rsplit("-", 1)[0]
    loaded, after = ranks.run(load_and_go_on, world_size, case, str(folder), way)[0]
    expected = torch.load(folder / "expected.pt")
    assert_same(loaded, expected["saved"])
    assert_close(after, expected["after"])


@pytest.mark.parametrize("version", write.EXTRAS)
def test_a_training_run_resumes_from_a_saved_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The checkpoint after step 4 gives steps 5 to 8 the losses that they had."""
    shutil.copytree(write.HERE / version / "train", tmp_path / version / "train")
    shutil.copytree(write.HERE / "text", tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    metrics = tmp_path / version / "train" / "metrics.jsonl"
    before = [json.loads(line) for line in metrics.read_text().splitlines()]
    printed = io.StringIO()
    run_job(write.train_config(version), Console(file=printed))
    after = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in after] == list(range(1, 9))
    assert after[:4] == before[:4]
    for was, now in zip(before[4:], after[4:], strict=True):
        for name in ("loss", "lr", "grad_norm"):
            assert now[name] == pytest.approx(was[name], rel=1e-4), (was["step"], name)
