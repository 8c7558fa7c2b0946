"""Export of checkpoints in torch's formats, and import of checkpoints that torch has pickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from typer.testing import CliRunner

from offload_adam import Adam, CheckpointError, OffloadAdam, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.cli.app import app
from tests.distributed.test_checkpoints import (
    assert_same,
    make,
    save,
    whole_state,
)
from tests.support.models import Model
from tests.support.ranks import RankPool


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize("kind", ["fp32", "bf16", "adam_offload"])
def test_torch_loads_an_export(ranks: RankPool, kind: str, tmp_path: Path) -> None:
    original = ranks.run(save, 2, kind, str(tmp_path / "c"), timeout=60.0)[0]
    code, output = command("export", "--format", "torch", tmp_path / "c", tmp_path / "t.pt")
    assert (code, output.count("torch.optim.Adam")) == (0, 1), output
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    assert content["step"] == 3
    assert content["extra"] == {"rank_0": [1, None]}
    model = Model().to(original["weights"]["scale"].dtype)
    model.load_state_dict(content["model"])  # strict: every name, the tied ones too
    assert_same(original["weights"], dict(model.state_dict()))
    trained = [p for p in model.parameters() if p.requires_grad]
    split = len(trained) if kind.startswith("adam") else 2
    groups = [{"params": trained[:split]}, {"params": trained[split:]}]
    plain = torch.optim.Adam([group for group in groups if group["params"]])
    plain.load_state_dict(content["optimizer"])
    for group, saved in zip(plain.param_groups, original["full"]["param_groups"], strict=True):
        for key in ("lr", "betas", "eps", "weight_decay"):
            assert group[key] == saved[key]
    for packed, parameter in enumerate(trained):
        expected = original["full"]["state"][packed]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            # torch casts the moments of a 16-bit parameter when it loads them.
            value = expected[key] if key == "step" else expected[key].to(parameter.dtype)
            assert torch.equal(plain.state[parameter][key], value)
            assert torch.equal(content["optimizer"]["state"][packed][key], expected[key])
    other, offload = make(kind, seed=9)
    other.load_state_dict(content["model"])
    offload.load_state_dict(content["optimizer"])
    found = whole_state(other, offload)
    assert_same(original["full"]["state"], found["full"]["state"])
    # An optimizer without names takes over those of the state that it loads, as torch's does.
    names = found["full"]["offload_adam"].pop("param_names")
    assert names == [group["param_names"] for group in content["optimizer"]["param_groups"]]
    assert_same(original["full"]["offload_adam"], found["full"]["offload_adam"])
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    plain.step()


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_dcp_folder_loads_as_one_of_torchs(ranks: RankPool, kind: str, tmp_path: Path) -> None:
    original = ranks.run(save, 3, kind, str(tmp_path / "c"), timeout=60.0)[0]
    code, output = command("export", "--format", "dcp", tmp_path / "c", tmp_path / "d")
    assert code == 0, output
    model, optimizer = make(kind, seed=9, channels_last=True)
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": OptimizerState(model, optimizer),
    }
    dcp.load(state, checkpoint_id=tmp_path / "d", no_dist=True)
    assert_same(original, whole_state(model, optimizer))


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    model, optimizer = make("fp32", seed=1)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    for form in ("torch", "dcp"):
        code, output = command("export", "--format", form, tmp_path / "c", tmp_path / "c")
        assert code == 1
        assert "is never overwritten" in output
    assert command("export", tmp_path / "c", tmp_path / "t.pt")[0] == 2  # no form is the default


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, form: str) -> None:
    model, optimizer = make("fp32", seed=1)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    (file,) = (tmp_path / "c").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    code, output = command("export", "--format", form, tmp_path / "c", tmp_path / "t")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (1, ["c"])
    assert f"{file.name} is damaged" in " ".join(output.split())
    assert "Traceback" not in output


def pickled(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: object
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train a plain model for three steps and save it as everybody does."""
    for step in range(3):
        for number, parameter in enumerate(model.parameters()):
            # One parameter has never had a gradient: torch has no state for it.
            has_gradient = parameter.requires_grad and number != 1
            parameter.grad = torch.full_like(parameter, step - 1.5) if has_gradient else None
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)
    return model, optimizer


def plain_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)
    model[2].weight = model[1].weight
    return model


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_adamw_is_imported(tmp_path: Path, dtype: torch.dtype, named: bool) -> None:
    model = plain_model(dtype)
    given = list(model.named_parameters()) if named else list(model.parameters())
    _, optimizer = pickled(
        tmp_path / "t.pt", model, torch.optim.AdamW(given, lr=0.25, amsgrad=True)
    )
    how = ("import", "--format", "torch-pickle", tmp_path / "t.pt", tmp_path / "c")
    code, output = command(*how)
    assert code == 0, output
    assert verify_checkpoint(tmp_path / "c").step == 3
    other = plain_model(dtype)
    offload = OffloadAdam(other.parameters(), amsgrad=True)
    load_checkpoint(tmp_path / "c", model=other, optimizer=offload)
    group = offload.param_groups[0]
    assert (group["lr"], group["decoupled_weight_decay"]) == (0.25, True)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        saved, found = optimizer.state[one], offload.state[two]
        assert found["step"] == float(saved.get("step", 0))
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            expected = saved[key].float() if saved else torch.zeros(two.shape)
            assert torch.equal(found[key], expected)
        if dtype != torch.float32:
            assert torch.equal(found["master_weight"], one.float())
    code, output = command(*how)
    assert code == 1
    assert "is never overwritten" in output


def test_frozen_tensors_that_share_memory_are_imported(tmp_path: Path) -> None:
    """torch.save keeps the sharing, so one of them is saved; the model has an object for each."""

    def make_sharing(table: torch.Tensor) -> Any:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].register_buffer("table", table.view(2, 3))
        model[1].register_buffer("table", table.view(2, 3))
        model[1].register_buffer("flat", table)
        return model

    model = make_sharing(torch.arange(6, dtype=torch.int8))
    names = [name for name, _ in model.named_parameters()]
    (tmp_path / "n").write_text("\n".join(names))
    pickled(tmp_path / "t.pt", model, torch.optim.AdamW(model.parameters()))
    how = ("import", "--format", "torch-pickle", tmp_path / "t.pt", tmp_path / "c")
    assert command(*how, "--names", tmp_path / "n")[0] == 0
    other = make_sharing(torch.zeros(6, dtype=torch.int8))
    optimizer = OffloadAdam(other.parameters(), decoupled_weight_decay=True)
    load_checkpoint(tmp_path / "c", model=other, optimizer=optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    other[1].table = torch.zeros(3, 2, dtype=torch.int8)
    with pytest.raises(
        CheckpointError, match=r"'model/0\.table' has shape \[2, 3\].* and \[3, 2\]"
    ):
        load_checkpoint(tmp_path / "c", model=other, optimizer=optimizer)


def test_frozen_parameters_of_torchs_optimizer_are_imported(tmp_path: Path) -> None:
    """Torch's file does not say what is frozen; only state without an update may be left out."""

    def make_frozen() -> Any:
        model: Any = plain_model()
        model[0].requires_grad_(False)
        base = torch.arange(3, dtype=torch.int8)
        model.register_parameter("base", nn.Parameter(base, requires_grad=False))
        return model

    model = make_frozen()
    pickled(tmp_path / "t.pt", model, torch.optim.AdamW(model.named_parameters()))
    how = ("import", "--format", "torch-pickle", tmp_path / "t.pt", tmp_path / "c")
    assert command(*how)[0] == 0
    other = make_frozen()
    other.base.zero_()
    optimizer = OffloadAdam(other.parameters(), decoupled_weight_decay=True)
    load_checkpoint(tmp_path / "c", model=other, optimizer=optimizer)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    optimizer.close()
    other[1].bias.requires_grad = False
    optimizer = OffloadAdam(other.parameters(), decoupled_weight_decay=True)
    with pytest.raises(CheckpointError, match=r"has 'optimizer/1\.bias/exp_avg', but this model"):
        load_checkpoint(tmp_path / "c", model=other, optimizer=optimizer)


def test_an_import_asks_for_parameter_names_that_it_cannot_know(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    path = tmp_path / "t.pt"
    pickled(path, model, torch.optim.AdamW(model.parameters()))
    how = ("import", "--format", "torch-pickle", path, tmp_path / "c")
    code, output = command(*how)
    assert code == 1
    assert "Pass --names" in output
    names = [name for name, _ in model.named_parameters()]
    for given, words in (
        (names[:-1], "There are 3 names, 3 of them different, for the optimizer's 4 parameters"),
        ([*names[:-1], names[0]], "There are 4 names, 3 of them different"),
        ([*names, names[0]], "There are 5 names, 4 of them different"),
        ([*names[:-1], "other"], "'other' is named as a parameter of the optimizer, but the model"),
    ):
        (tmp_path / "n").write_text("\n".join(given))
        code, output = command(*how, "--names", tmp_path / "n")
        assert (code, words in " ".join(output.split())) == (1, True), output
    (tmp_path / "n").write_bytes(b"\xff")
    code, output = command(*how, "--names", tmp_path / "n")
    assert (
        code,
        f"{tmp_path / 'n'} cannot be read: not UTF-8 text" in " ".join(output.split()),
    ) == (1, True)
    (tmp_path / "n").write_text("\n".join(names))
    code, output = command(*how, "--names", tmp_path / "n")
    assert code == 0, output
    load_checkpoint(tmp_path / "c", model=model, optimizer=OffloadAdam(model.parameters()))


class Trap:
    """Creates a folder if a reader unpickles it and runs its code."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def test_an_import_runs_no_code_of_the_file(tmp_path: Path) -> None:
    model = plain_model()
    trap = tmp_path / "trap"
    pickled(tmp_path / "t.pt", model, torch.optim.AdamW(model.parameters()), more=Trap(trap))
    code, output = command("import", "--format", "torch-pickle", tmp_path / "t.pt", tmp_path / "c")
    assert code == 1
    assert "holds more than tensors and plain values" in output
    assert not trap.exists()
    torch.load(tmp_path / "t.pt", weights_only=False)
    assert trap.exists()


def test_what_is_no_such_file(tmp_path: Path) -> None:
    model, _ = pickled(
        tmp_path / "sgd", m := plain_model(), torch.optim.SGD(m.parameters(), momentum=0.9)
    )
    (tmp_path / "text").write_text("not a pickle")
    (tmp_path / "empty").write_bytes(b"")
    torch.save(list(model.parameters()), tmp_path / "list")
    torch.save({"model": model.state_dict(), "optimizer": {}}, tmp_path / "none")
    sparse = {"a": {"b": torch.eye(2).to_sparse()}}
    plain: dict[str, Any] = {"state": {}, "param_groups": []}
    torch.save({"model": sparse, "optimizer": plain}, tmp_path / "sparse")
    whole = (tmp_path / "sgd").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for name, words in {
        "sgd": "has no 'betas'",
        "text": "was not written by torch.save",
        "empty": "was not written by torch.save",
        "list": "has no state dict under 'model'",
        "none": "is not the state dict of an optimizer",
        "sparse": "a['b'] is a tensor of torch.float32, torch.sparse_coo",
        "cut": "is damaged (File is not a zip file)",
        "missing": "cannot be opened",
    }.items():
        code, output = command(
            "import", "--format", "torch-pickle", tmp_path / name, tmp_path / "c"
        )
        assert (code, words in " ".join(output.split())) == (1, True), (name, output)
        assert "Traceback" not in output
    assert not [*tmp_path.glob("c"), *tmp_path.glob("c.*")]


def test_training_continues_after_an_import(tmp_path: Path) -> None:
    """The next steps are those of torch, up to fp32 rounding."""
    model, optimizer = pickled(
        tmp_path / "t.pt", m := plain_model(), torch.optim.AdamW(m.parameters(), lr=0.01)
    )
    command("import", "--format", "torch-pickle", tmp_path / "t.pt", tmp_path / "c")
    other = plain_model()
    offload = OffloadAdam(other.parameters())
    load_checkpoint(tmp_path / "c", model=other, optimizer=offload)
    for step in range(3):
        for each in (model, other):
            for parameter in each.parameters():
                parameter.grad = torch.full_like(parameter, 0.5 + step)
        optimizer.step()
        offload.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_further_steps_of_adam_are_told_by_the_counts(tmp_path: Path) -> None:
    model = plain_model()
    pickled(tmp_path / "t.pt", model, torch.optim.Adam(model.parameters()))
    command("import", "--format", "torch-pickle", tmp_path / "t.pt", tmp_path / "c")
    adam = Adam(model.parameters())
    load_checkpoint(tmp_path / "c", model=model, optimizer=adam)
    assert adam.global_step == 3
