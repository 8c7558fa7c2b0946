"""Checkpoints of state in low precision: conversion, rejection, export and damage."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from typer.testing import CliRunner

from offload_adam import CheckpointError, OffloadAdamW, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.checkpoint.format import MANIFEST_NAME, sealed
from offload_adam.checkpoint.load import load_optimizer_state, verify_checkpoint
from offload_adam.checkpoint.save import save_optimizer_state
from offload_adam.cli.app import app
from offload_adam.memory.split_master import join
from tests.support.devices import HOST_AS_DEVICE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUM_STEPS = 3


class OnDevice(OffloadAdamW):
    _backend = HOST_AS_DEVICE


class Net(nn.Module):
    """Has a parameter of each dtype, a vector, and a weight in another order in memory."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, dtype: torch.dtype = BF16) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.weight = parameter(37, 21)
        images = parameter(4, 3, 5, 5).detach().to(memory_format=torch.channels_last)
        self.images = nn.Parameter(images)
        self.bias = parameter(70)
        self.exact = parameter(11, 13, dtype=FP32)
        self.lower = parameter(9, 17, dtype=FP16)


def make(
    state_format: str, seed: int = 0, kind: Any = OffloadAdamW, num_steps: int = NUM_STEPS
) -> tuple[Net, Any]:
    net = Net(seed)
    optimizer = kind(
        list(net.named_parameters()), lr=1e-2, state_format=state_format, num_threads=1
    )
    first = 10 * seed  # so that state differs as well
    train(net, optimizer, first, first + num_steps)
    return net, optimizer


def train(net: Net, optimizer: Any, start: int, end: int) -> None:
    for step in range(start, end):
        for position, parameter in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(100 * step + position)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()


def master_of(optimizer: Any, parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of a parameter's fp32 master weight."""
    entry = optimizer.state[parameter]
    if "master_remainder" in entry:
        return join(parameter.detach(), entry["master_remainder"])
    master: torch.Tensor = entry.get("master_weight", parameter.detach())
    return master.clone()


def everything(net: Net, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and state by name."""
    found = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters():
        found |= {f"{name} {k}": v.clone() for k, v in optimizer.state[parameter].items()}
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def manifest_in(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    del values["sha256"]
    return values


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_manifest_without_low_precision_is_that_of_earlier_versions(tmp_path: Path) -> None:
    net, optimizer = make("fp32")
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    assert sorted(manifest_in(tmp_path / "c")["optimizer"]) == ["further", "groups", "steps"]
    assert "state_format" not in (tmp_path / "c" / MANIFEST_NAME).read_text()
    net, optimizer = make("bf16")
    save_checkpoint(tmp_path / "d", model=net, optimizer=optimizer)
    formats = manifest_in(tmp_path / "d")["optimizer"]["formats"]
    assert formats == dict.fromkeys(("weight", "images", "exact", "lower"), "bf16")
    assert "scales" not in manifest_in(tmp_path / "d")["optimizer"]


LOW_PRECISION = ["bf16", "mixed", "int8"]
PLACES = [(OffloadAdamW, OffloadAdamW), (OffloadAdamW, OnDevice), (OnDevice, OffloadAdamW)]


@pytest.mark.parametrize("state_format", LOW_PRECISION)
@pytest.mark.parametrize(("saving", "loading"), PLACES)
def test_a_load_keeps_all_bits(
    tmp_path: Path, saving: Any, loading: Any, state_format: str
) -> None:
    net, optimizer = make(state_format, kind=saving)
    remainder = optimizer.state[net.weight]["master_remainder"]
    remainder[0] = torch.iinfo(remainder.dtype).min  # ties, which a conversion may change
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, loaded = make(state_format, seed=1, kind=loading)
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(master_of(loaded, same), master_of(optimizer, one))
    for model, own in ((net, optimizer), (other, loaded)):
        train(model, own, NUM_STEPS, NUM_STEPS + 2)
    found, expected = everything(other, loaded), everything(net, optimizer)
    for values in (found, expected):
        values.pop("exact master_weight", None)  # a copy, if the parameter is on a device
    assert_same(found, expected)


@pytest.mark.parametrize(("saving", "loading"), PLACES)
def test_fp32_state_is_rounded_to_nearest(tmp_path: Path, saving: Any, loading: Any) -> None:
    net, optimizer = make("fp32", kind=saving)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, loaded = make("bf16", seed=1, kind=loading)
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
        assert torch.equal(master_of(loaded, same), master_of(optimizer, one))
        for key in ("exp_avg", "exp_avg_sq"):
            exact, found = optimizer.state[one][key], loaded.state[same][key]
            assert found.dtype == (FP32 if one.dim() == 1 else BF16)
            assert torch.equal(found, exact.to(found.dtype))
        assert loaded.state[same]["step"] == NUM_STEPS
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(other, loaded, NUM_STEPS, NUM_STEPS + 1)
    assert not torch.equal(other.weight, before["weight"])


@pytest.mark.parametrize(("saving", "loading"), PLACES)
def test_low_precision_needs_convert(tmp_path: Path, saving: Any, loading: Any) -> None:
    net, optimizer = make("bf16", kind=saving)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, loaded = make("fp32", seed=1, kind=loading)
    before = everything(other, loaded)
    expected = (
        r"'(weight|images|exact|lower)' was saved with state_format='bf16', but this optimizer "
        r"stores it with 'fp32'\..*convert=True"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert_same(everything(other, loaded), before)
    assert loaded.num_steps == NUM_STEPS

    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded, convert=True)
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
        # Of the two ties that torch rounds to even, one becomes the next fp32 number.
        masters = [
            m.view(torch.int32) for m in (master_of(optimizer, one), master_of(loaded, same))
        ]
        is_tie = masters[0] & 0xFFFF == 0x8000
        assert torch.equal(masters[0][~is_tie], masters[1][~is_tie])
        assert (masters[1] - masters[0]).max() <= 1
        for key in ("exp_avg", "exp_avg_sq"):
            assert loaded.state[same][key].dtype == FP32
            assert torch.equal(loaded.state[same][key], optimizer.state[one][key].float())
    # The step keeps the masters: it does not take the parameters for edited ones.
    group = loaded.param_groups[0]
    group["lr"], masters = 0.0, [master_of(loaded, each) for each in other.parameters()]
    train(other, loaded, NUM_STEPS, NUM_STEPS + 1)
    for master, parameter in zip(masters, other.parameters(), strict=True):
        assert torch.equal(master_of(loaded, parameter), master)


@pytest.mark.parametrize("state_format", LOW_PRECISION)
@pytest.mark.parametrize("own", ["fp32", *LOW_PRECISION])
def test_a_checkpoint_is_converted_as_a_state_dict_is(
    tmp_path: Path, state_format: str, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    net, optimizer = make(state_format)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, loaded = make(own, seed=1)
    with caplog.at_level("INFO", "offload_adam"):
        load_checkpoint(tmp_path / "c", model=other, optimizer=loaded, convert=True)
    assert "once more" not in caplog.text  # that is for the same format
    same, second = make(own, seed=2)
    same.load_state_dict(net.state_dict())
    second.load_state_dict(optimizer.state_dict(), convert=True)
    assert_same(everything(other, loaded), everything(same, second))
    assert loaded.state[other.weight]["step"] == NUM_STEPS


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_that_no_code_stands_for_are_rejected_first(tmp_path: Path, key: str) -> None:
    net, optimizer = make("fp32")
    optimizer.state[net.images][key][1, 2, 3, 4] = torch.inf
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, loaded = make("int8", seed=1)
    before = everything(other, loaded)
    with pytest.raises(CheckpointError, match=f"'optimizer/images/{key}' has values that are not"):
        load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert_same(everything(other, loaded), before)


@pytest.mark.parametrize("saved", ["fp32", "bf16", "int8"])
def test_a_checkpoint_before_the_first_update_is_loaded_as_such(tmp_path: Path, saved: str) -> None:
    net, optimizer = make(saved, num_steps=0)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, loaded = make("int8", seed=1)
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded, convert=True)
    assert loaded.state[other.weight]["exp_avg_sq_scale"] == 0
    assert not any(
        entry["exp_avg_sq"].any() for entry in loaded.full_state_dict()["state"].values()
    )


def test_there_and_back_with_convert_is_exact(tmp_path: Path) -> None:
    net, optimizer = make("bf16")
    before = everything(net, optimizer)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    other, exact = make("fp32", seed=1)
    load_checkpoint(tmp_path / "c", model=other, optimizer=exact, convert=True)
    save_checkpoint(tmp_path / "d", model=other, optimizer=exact)
    net, optimizer = make("bf16", seed=2)
    load_checkpoint(tmp_path / "d", model=net, optimizer=optimizer)
    found = everything(net, optimizer)
    for name, value in found.items():
        if name.endswith("master_remainder"):
            difference = value.long() - before[name].long()
            assert not difference[before[name] != -(2**15)].any(), name
        else:
            assert torch.equal(value, before[name]), name


def test_state_saved_apart_is_rounded_or_rejected(tmp_path: Path) -> None:
    net, optimizer = make("fp32")
    save_optimizer_state(tmp_path / "c", model=net, optimizer=optimizer, label="a")
    other, loaded = make("bf16", seed=1)
    other.load_state_dict(net.state_dict())
    load_optimizer_state(tmp_path / "c", model=other, optimizer=loaded, label="a")
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(master_of(loaded, same), master_of(optimizer, one))
    save_optimizer_state(tmp_path / "d", model=other, optimizer=loaded, label="a")
    before = everything(net, optimizer)
    # Tools call this function, and have no argument `convert` for it.
    expected = r"was saved with state_format='bf16'.* the optimizer with the saved format\.$"
    with pytest.raises(CheckpointError, match=expected):
        load_optimizer_state(tmp_path / "d", model=net, optimizer=optimizer, label="a")
    assert_same(everything(net, optimizer), before)


@pytest.mark.parametrize("state_format", LOW_PRECISION)
def test_export_to_torch_is_fp32(tmp_path: Path, state_format: str) -> None:
    net, optimizer = make(state_format)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    code, output = command("export", "--format", "torch", tmp_path / "c", tmp_path / "t.pt")
    assert code == 0, output
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    full = optimizer.full_state_dict()
    for packed, expected in full["state"].items():
        found = content["optimizer"]["state"][packed]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == FP32
            assert torch.equal(found[key], value), (packed, key)
    masters = content["optimizer"]["offload_adam"]["master_weight"]
    assert masters.keys() == full["offload_adam"]["master_weight"].keys()
    for packed, value in masters.items():
        assert torch.equal(value, full["offload_adam"]["master_weight"][packed])

    plain_net = Net(1)
    plain_net.load_state_dict(content["model"])
    plain = torch.optim.AdamW(plain_net.parameters())
    plain.load_state_dict(copy.deepcopy(content["optimizer"]))
    for parameter in plain_net.parameters():
        parameter.grad = torch.ones_like(parameter)
    plain.step()

    # And back: with names, formats, scales and masters.
    other, loaded = make(state_format, seed=1)
    other.load_state_dict(content["model"])
    loaded.load_state_dict(content["optimizer"])
    assert_same(everything(other, loaded), everything(net, optimizer))


def test_export_joins_the_blocks_of_weights_and_remainders(tmp_path: Path) -> None:
    """A block has 4 MiB: 2**21 elements of a bfloat16 weight, or 2**22 of its remainder."""
    net = nn.Linear(2049, 1025, bias=False, dtype=BF16)
    optimizer = OffloadAdamW(net.parameters(), state_format="int8", num_threads=1)
    net.weight.grad = net.weight.detach().clone()
    optimizer.step()
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    code, output = command("export", "--format", "torch", tmp_path / "c", tmp_path / "t.pt")
    assert code == 0, output
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    (found,) = content["optimizer"]["offload_adam"]["master_weight"].values()
    assert torch.equal(found, master_of(optimizer, net.weight))


@pytest.mark.parametrize("state_format", LOW_PRECISION)
def test_export_to_dcp_is_exact(tmp_path: Path, state_format: str) -> None:
    net, optimizer = make(state_format)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    code, output = command("export", "--format", "dcp", tmp_path / "c", tmp_path / "d")
    assert code == 0, output
    other, loaded = make(state_format, seed=1)
    state = {"model": other.state_dict(), "optimizer": OptimizerState(other, loaded)}
    dcp.load(state, checkpoint_id=tmp_path / "d", no_dist=True)
    assert_same(everything(other, loaded), everything(net, optimizer))
    for model, own in ((net, optimizer), (other, loaded)):
        train(model, own, NUM_STEPS, NUM_STEPS + 1)
    assert_same(everything(other, loaded), everything(net, optimizer))


@pytest.mark.parametrize(
    ("saving", "loading"),
    [("bf16", "fp32"), ("fp32", "bf16"), ("int8", "bf16"), ("bf16", "mixed"), ("mixed", "fp32")],
)
def test_dcp_does_not_convert(tmp_path: Path, saving: str, loading: str) -> None:
    net, optimizer = make(saving)
    dcp.save({"optimizer": OptimizerState(net, optimizer)}, checkpoint_id=tmp_path / "d")
    other, loaded = make(loading, seed=1)
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load({"optimizer": OptimizerState(other, loaded)}, checkpoint_id=tmp_path / "d")
    if "mixed" in (saving, loading) or "int8" in (saving, loading):
        return  # the second moments have other names
    # The state of an fp32 parameter has the same names in both formats.
    optimizer.close()
    loaded.close()
    one, same = nn.ParameterList([net.exact]), nn.ParameterList([other.exact])
    first = OffloadAdamW(one.parameters(), state_format=saving)  # type: ignore[arg-type]
    second = OffloadAdamW(same.parameters(), state_format=loading)  # type: ignore[arg-type]
    dcp.save({"optimizer": OptimizerState(one, first)}, checkpoint_id=tmp_path / "e")
    with pytest.raises(CheckpointError, match=f"saved with state_format='{saving}'"):
        dcp.load({"optimizer": OptimizerState(same, second)}, checkpoint_id=tmp_path / "e")


def _tensor(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["tensors"][name].update(changes)


def _format(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["optimizer"]["formats"].update({name: value})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown format": (_format("weight", "int4"), "formats"),
    "no text": (_format("weight", 3), "formats"),
    "no object": (lambda values: values["optimizer"].update(formats=["bf16"]), "formats"),
    "format of a vector": (_format("bias", "bf16"), "'bias'.*state_format='bf16'"),
    "moment as fp16": (_tensor("optimizer/weight/exp_avg", dtype="F16"), "exp_avg"),
    "remainder as bf16": (
        _tensor("optimizer/weight/master_remainder", dtype="BF16"),
        "master_remainder",
    ),
    "no remainder": (
        lambda values: values["tensors"].pop("optimizer/weight/master_remainder"),
        "master_remainder",
    ),
    "no format": (
        lambda values: values["optimizer"]["formats"].pop("weight"),
        "optimizer/weight",
    ),
}


CODE_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no scales": (lambda values: values["optimizer"].pop("scales"), "scale"),
    "scale missing": (lambda values: values["optimizer"]["scales"].pop("weight"), "weight"),
    "scale too large": (
        lambda values: values["optimizer"]["scales"].update(weight=2.0),
        "scale of 'weight'",
    ),
    "scale of text": (
        lambda values: values["optimizer"]["scales"].update(weight="one"),
        "scales",
    ),
    "format of bf16": (_format("weight", "bf16"), "weight"),
    "moment as fp32": (_tensor("optimizer/weight/scaled_exp_avg_sq", dtype="F32"), "exp_avg_sq"),
    "no moment": (
        lambda values: values["tensors"].pop("optimizer/weight/scaled_exp_avg_sq"),
        "scaled_exp_avg_sq",
    ),
    "16-bit remainder": (
        _tensor("optimizer/weight/master_remainder", dtype="I16"),
        "master_remainder",
    ),
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(
    ("state_format", "name"),
    [*(("bf16", name) for name in DAMAGES), *(("int8", name) for name in CODE_DAMAGES)],
)
def test_a_damaged_manifest_is_a_clean_error(
    tmp_path: Path, state_format: str, name: str, convert: bool
) -> None:
    net, optimizer = make(state_format)
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    damage, expected = (DAMAGES if state_format == "bf16" else CODE_DAMAGES)[name]
    values = manifest_in(tmp_path / "c")
    damage(values)
    (tmp_path / "c" / MANIFEST_NAME).write_text(sealed(values))
    other, loaded = make(state_format, seed=1)
    before = everything(other, loaded)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path / "c", model=other, optimizer=loaded, convert=convert)
    assert convert or re.search(expected, str(raised.value)), str(raised.value)
    assert_same(everything(other, loaded), before)
    for form in ("torch", "dcp"):
        code, output = command("export", "--format", form, tmp_path / "c", tmp_path / form)
        assert code in (0, 1), output
        assert "Traceback" not in output


@pytest.mark.parametrize(("saving", "loading"), [("int8", "mixed"), ("mixed", "int8")])
def test_dcp_does_not_convert_codes(tmp_path: Path, saving: str, loading: str) -> None:
    """Both formats have the same names and dtypes in a checkpoint."""
    net, optimizer = make(saving)
    dcp.save({"optimizer": OptimizerState(net, optimizer)}, checkpoint_id=tmp_path / "d")
    other, loaded = make(loading, seed=1)
    with pytest.raises(CheckpointError, match=f"saved with state_format='{saving}'"):
        dcp.load({"optimizer": OptimizerState(other, loaded)}, checkpoint_id=tmp_path / "d")


def test_verify_and_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = make("bf16")
    save_checkpoint(tmp_path / "c", model=net, optimizer=optimizer)
    manifest = verify_checkpoint(tmp_path / "c")
    assert manifest.tensors["optimizer/weight/master_remainder"].dtype == "I16"
    assert manifest.tensors["optimizer/weight/exp_avg_sq"].dtype == "BF16"
    assert "optimizer/weight/master_weight" not in manifest.tensors
    code, output = command("verify", tmp_path / "c")
    assert (code, "is intact: step 3" in output) == (0, True), output
    monkeypatch.setenv("COLUMNS", "200")
    code, output = command("inspect", tmp_path / "c")
    assert code == 0
    (line,) = (line for line in output.splitlines() if "weight/master_remainder" in line)
    assert "37 x 21" in line
    assert "I16" in line
    assert "state_format 'bf16': the state of 4 parameter(s)" in output
