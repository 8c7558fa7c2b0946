"""SECURITY.md states the limits that hold, and the inputs of its table do what it says."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from offload_adam import OffloadAdam, encoding, save_checkpoint
from offload_adam.checkpoint import format, torch_import
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.config import ConfigError, load_config, mistakes, yaml_text
from offload_adam.config.declared import MAX_NBYTES
from offload_adam.config.load import _MAX_LEVELS
from offload_adam.dtypes import MAX_DIMS
from offload_adam.errors import CheckpointError
from offload_adam.integrations import model_config
from offload_adam.options import MAX_STEP_COUNT
from offload_adam.printable import MAX_MESSAGE_LENGTH

TEXT = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
MIB = 2**20


@pytest.mark.parametrize(
    "limit",
    [
        f"{yaml_text.MAX_NBYTES // MIB} MiB; {yaml_text.MAX_VALUES:,} values",
        f"{_MAX_LEVELS} levels",
        f"counts up to 2^{MAX_STEP_COUNT.bit_length() - 1}, "
        f"bytes up to 2^{MAX_NBYTES.bit_length()}",
        f"| a manifest | {format.MAX_MANIFEST_NBYTES // MIB} MiB |",
        f"{MAX_DIMS} dimensions, 2^63 bytes",
        f"| {model_config._MOST_NBYTES // MIB} MiB; {model_config._MOST_LAYERS:,} layers |",
        f"{encoding.MAX_TEXT_NBYTES // MIB} MiB as text, {encoding._MAX_DEPTH} levels; "
        f"{encoding.MAX_NBYTES // MIB} MiB for one tensor",
        f"{torch_import._MAX_GROWTH} times the file and "
        f"{torch_import._MIN_GROWTH_NBYTES // MIB} MiB",
        f"{mistakes.MAX_SHOWN} mistakes of {mistakes._MAX_LENGTH} characters; "
        f"{MAX_MESSAGE_LENGTH:,} characters",
    ],
)
def test_the_limits_are_those_of_the_code(limit: str) -> None:
    assert limit in TEXT


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_runs_no_code_and_what_does(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"model": Trap(sprung), "optimizer": Trap(sprung)}, tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="Code in a file is not run"):
        torch_import.import_torch_pickle(tmp_path / "t.pt", tmp_path / "c")
    (tmp_path / "c.yaml").write_text(f"run: !!python/object/apply:pathlib.Path.touch [{sprung}]")
    with pytest.raises(ConfigError, match="tag"):
        load_config(tmp_path / "c.yaml")
    model = nn.Linear(2, 2)
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(tmp_path / "d", model=model, optimizer=optimizer)
    (tmp_path / "d" / "manifest.json").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        verify_checkpoint(tmp_path / "d")
    assert not sprung.exists()
    state = {"optimizer": OptimizerState(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    with suppress(Exception, CheckpointException):  # after the code has run
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert sprung.exists()


def test_a_checksum_does_not_tell_who_wrote_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra={"epoch": 1})
    path = tmp_path / "c" / "manifest.json"
    values = json.loads(path.read_text())
    values["extra"] = {"epoch": 2}
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="its checksum is wrong"):
        verify_checkpoint(tmp_path / "c")
    del values["sha256"]
    path.write_text(format.sealed(values))
    assert verify_checkpoint(tmp_path / "c").decoded_extra() == {"epoch": 2}
