"""A run rejects the invalid state of a checkpoint before it modifies anything."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from offload_adam.checkpoint.format import MANIFEST_NAME, sealed
from offload_adam.config import ConfigError, RunConfig
from offload_adam.encoding import encode
from offload_adam.errors import CheckpointError
from offload_adam.train import saving
from offload_adam.train.job import run_job
from tests.unit.test_train_alone import SMALL


def run(folder: Path, num_steps: int, **checkpoint: Any) -> None:
    values = {
        "run": {"name": "case", "dir": str(folder)},
        "model": SMALL["model"],
        "train": SMALL["train"] | {"num_steps": num_steps},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 3},
        "checkpoint": {"every": 2} | checkpoint,
    }
    run_job(RunConfig.model_validate(values), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a run after step 2."""
    folder = tmp_path_factory.mktemp("source")
    run(folder, 2)
    return folder / "case" / "checkpoints" / "step-2"


def changed(source: Path, folder: Path, key: str, value: Any) -> Path:
    """Return a copy of a checkpoint with another value in its `extra`, and a correct checksum.

    Args:
        key: the dotted path of the value. A name of digits is an index of a list.
    """
    copy = folder / "changed"
    shutil.copytree(source, copy)
    manifest = json.loads((copy / MANIFEST_NAME).read_text(encoding="utf-8"))
    del manifest["sha256"]
    inner: Any = manifest["extra"]
    *path, last = (int(name) if name.isdecimal() else name for name in key.split("."))
    for name in path:
        inner = inner[name]
    inner[last] = encode(value, key)
    (copy / MANIFEST_NAME).write_text(sealed(manifest), encoding="utf-8")
    return copy


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


INVALID: dict[str, list[Any]] = {
    "step": [-5, 0, 1.5, "x", True, None, 10**400, 2**24 + 1],
    "samples": [-5, 1.5, "x", None, 2**63],
    "config": [5, ["a"], {"train": 5}, {"train": {"x": b"bytes"}}],
    "train": [5, [], {"schedule": None}, {"random": []}],
    "train.random": [5, [], ["!!"], ["AAAA"], [""], [5], ["é"]],
    "train.random.0": [text_of(bytes(len(torch.get_rng_state())))],
    "train.schedule": [None, 5, {}, {"x": 1}, {"last_epoch": 1.5}],
    "train.schedule.last_epoch": [-1, 10**400],
    "train.schedule._schedulers": [[]],
    "train.schedule._schedulers.0.total_iters": [0],
    "train.schedule._schedulers.1.T_max": [0],
    "train.schedule._schedulers.1.eta_min": [math.inf],
    "train.schedule._schedulers.1.base_lrs": [["x"]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in INVALID.items() for value in values]
)
def test_an_invalid_state_is_rejected_and_nothing_is_modified(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded in spite of an invalid state")

    monkeypatch.setattr(saving, "load_checkpoint", load)
    path = changed(source, tmp_path, key, value)
    place = ".".join(key.split(".")[:2])
    with pytest.raises(CheckpointError, match=rf"extra\.{place}.*Load another") as error:
        run(tmp_path, 4, resume=str(path))
    assert re.match(rf"{path}: extra\.", str(error.value))
    assert len(str(error.value)) < 500
    assert not (tmp_path / "case").exists()


def test_unknown_entries_of_a_schedule_are_skipped(source: Path, tmp_path: Path) -> None:
    """`step` would replace the schedule's method."""
    path = changed(source, tmp_path, "train.schedule.step", 1)
    run(tmp_path, 4, resume=str(path))
    resumed = saving.steps_in(tmp_path / "case" / "checkpoints")
    assert resumed == [4]


def test_a_checkpoint_of_another_loop_is_rejected(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "foreign"
    shutil.copytree(source, copy)
    manifest = json.loads((copy / MANIFEST_NAME).read_text(encoding="utf-8"))
    del manifest["sha256"], manifest["extra"]["samples"]
    (copy / MANIFEST_NAME).write_text(sealed(manifest), encoding="utf-8")
    with pytest.raises(ConfigError, match="was not written by offload-adam train"):
        run(tmp_path, 4, resume=str(copy))


def test_only_names_that_a_run_gives_are_checkpoints(tmp_path: Path) -> None:
    names = ["step-1", "step-16777216", "step-01", "step-0", "step-٣", "step-²", "step-1\n"]
    for name in [*names, "step-16777217", f"step-{10**30}", "step-+5", "step-5.partial", "x"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").touch()
    assert saving.steps_in(tmp_path) == [1, 16777216]
