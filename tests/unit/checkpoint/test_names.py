"""State is saved by parameter name, so the order of parameters may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import CheckpointError, OffloadAdam, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.format import read_manifest


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 3)
        self.tied = self.second
        self.register_buffer("counter", torch.tensor(7))


def trained() -> tuple[Model, OffloadAdam]:
    """Return a model whose parameters have taken 1, 2, 3 and 4 steps."""
    torch.manual_seed(3)
    model = Model()
    groups: list[dict[str, Any]] = [
        {"params": [model.first.weight, model.first.bias], "lr": 0.5},
        {"params": [model.second.weight, model.second.bias]},
    ]
    optimizer = OffloadAdam(groups)
    for step in range(4):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape) if step <= number else None
        optimizer.step()
    return model, optimizer


def test_the_order_of_parameters_may_change(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    other = Model()
    groups: list[dict[str, Any]] = [
        {"params": [other.first.bias, other.first.weight]},
        {"params": [other.second.bias, other.second.weight]},
    ]
    reordered = OffloadAdam(groups)
    load_checkpoint(tmp_path / "c", model=other, optimizer=reordered)
    assert [group["lr"] for group in reordered.param_groups] == [0.5, 1e-3]
    for number, (one, two) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        assert torch.equal(one, two)
        assert reordered.state[two]["step"] == number + 1
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, reordered.state[two][key])


def test_a_parameter_in_another_group_is_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    optimizer.close()
    groups: list[dict[str, Any]] = [
        {"params": [model.first.weight]},
        {"params": [model.first.bias, *model.second.parameters()]},
    ]
    moved = OffloadAdam(groups)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        CheckpointError,
        match=r"the checkpoint has 'first\.bias' in group 0, but this optimizer does not",
    ):
        load_checkpoint(tmp_path / "c", model=model, optimizer=moved)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_manifest_has_the_names_of_parameters(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    manifest = read_manifest(tmp_path / "c")
    assert manifest.optimizer.steps == {
        "first.weight": 1.0,
        "first.bias": 2.0,
        "second.weight": 3.0,
        "second.bias": 4.0,
    }
    groups = manifest.optimizer.groups
    assert [group.parameters for group in groups] == [
        ["first.weight", "first.bias"],
        ["second.weight", "second.bias"],
    ]
    assert manifest.tied == {
        "model/tied.weight": "model/second.weight",
        "model/tied.bias": "model/second.bias",
    }
    assert "model/counter" in manifest.tensors
