"""`offload-adam checkpoint verify` and `inspect`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from offload_adam import OffloadAdam, save_checkpoint
from offload_adam.cli.app import app


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = torch.nn.Linear(4, 3)
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    return tmp_path / "c"


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *arguments])
    return result.exit_code, result.output


def test_inspect_lists_the_contents(saved: Path) -> None:
    code, output = command("inspect", str(saved))
    assert code == 0
    assert "saved by 1 rank(s)" in output
    for words in ("model/weight", "optimizer/bias/exp_avg", "3 x 4", "48 B"):
        assert words in output


def test_verify_names_the_damaged_bytes(saved: Path) -> None:
    code, output = command("verify", str(saved))
    assert code == 0
    assert "is intact: step 0" in output
    (file,) = saved.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, output = command("verify", str(saved))
    assert code == 1
    assert "is damaged between byte 0" in output


def test_a_folder_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    for name in ("verify", "inspect"):
        code, output = command(name, str(tmp_path))
        assert code == 1
        assert "is not a checkpoint" in output
