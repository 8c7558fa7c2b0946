"""A checkpoint keeps everything that `state_dict` and `load_state_dict` keep of a model."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner

from offload_adam import (
    CheckpointError,
    OffloadAdam,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.format import MANIFEST_NAME, read_manifest, sealed
from offload_adam.checkpoint.save import model_state
from offload_adam.checkpoint.torch_import import import_torch_pickle
from offload_adam.cli.app import app
from tests.unit.test_encoding import bits


class Extra(nn.Linear):
    """Has an extra state of any type."""

    value: Any = None

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


class Packed(nn.Linear):
    """Saves a buffer in a form that differs from the live one."""

    packed: torch.Tensor

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.register_buffer("packed", torch.zeros(4), persistent=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "unpacked"] = self.packed * 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.packed.copy_(state_dict.pop(prefix + "unpacked") / 2)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Renamed(nn.Linear):
    """Saves its weights under other names, some of them as detached tensors."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        hooks: Any = self
        self.register_buffer("scale", torch.ones(2))
        hooks.register_state_dict_post_hook(self._rename)
        hooks.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        state[prefix + "kernel"] = state.pop(prefix + "weight")
        state[prefix + "factor"] = state.pop(prefix + "scale").detach()
        state[prefix + "bias"] = state[prefix + "bias"].detach()

    @staticmethod
    def _rename_back(module: Any, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "kernel")
        state[prefix + "scale"] = state.pop(prefix + "factor")


class Split(nn.Linear):
    """Saves the rows of a fused weight as separate tensors, and a copy of its bias."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        hooks: Any = self
        hooks.register_state_dict_post_hook(self._split)
        hooks.register_load_state_dict_pre_hook(self._fuse)

    @staticmethod
    def _split(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        weight = state.pop(prefix + "weight")
        state[prefix + "q"], state[prefix + "k"] = weight[:2], weight[2:]
        state[prefix + "bias"] = state[prefix + "bias"].clone()

    @staticmethod
    def _fuse(module: Any, state: Any, prefix: str, *rest: Any) -> None:
        parts = [state.pop(prefix + "q"), state.pop(prefix + "k")]
        state[prefix + "weight"] = torch.cat(parts)


class Cached(nn.Linear):
    """Derives a value from its weights whenever a state dict is loaded."""

    norm = -1.0

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.norm = float(self.weight.detach().norm())


class Quiet(nn.Linear):
    """Leaves a frozen weight out of its state dict."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        hooks: Any = self
        self.weight.requires_grad = False
        hooks.register_state_dict_post_hook(self._leave_out)

    @staticmethod
    def _leave_out(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        del state[prefix + "weight"]


def make(kind: Callable[..., nn.Module], seed: int = 1) -> tuple[Any, OffloadAdam]:
    """Return a model with a layer of a kind between others, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), kind(4, 4), nn.BatchNorm1d(4))
    return model, OffloadAdam([p for p in model.parameters() if p.requires_grad])


def train(model: nn.Module, optimizer: OffloadAdam) -> None:
    inputs = torch.arange(12.0).view(3, 4)
    for _ in range(2):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, how: str, model: nn.Module, optimizer: OffloadAdam) -> None:
    if how == "at once":
        save_checkpoint(folder, model=model, optimizer=optimizer)
    else:
        begin_checkpoint(folder, model=model, optimizer=optimizer).wait()


@pytest.mark.parametrize("how", ["at once", "background"])
@pytest.mark.parametrize("kind", [Extra, Packed, Renamed, Split, Cached])
def test_a_module_with_its_own_state_dict(kind: type[nn.Linear], how: str, tmp_path: Path) -> None:
    """The loaded model equals one that torch's load_state_dict has loaded."""
    model, optimizer = make(kind)
    train(model, optimizer)
    layer: Any = model[1]
    if kind is Extra:
        layer.value = torch.tensor([5.0, 3.0])
    elif kind is Packed:
        layer.packed.fill_(5.0)
    elif kind is Renamed:
        layer.scale.fill_(7.0)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    save(tmp_path / "c", how, model, optimizer)
    train(model, optimizer)
    expected, _ = make(kind, seed=2)
    expected.load_state_dict(saved)
    found, other = make(kind, seed=3)
    load_checkpoint(tmp_path / "c", model=found, optimizer=other)
    for name, value in saved.items():
        assert torch.equal(found.state_dict()[name], value), name
    for one, two in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(found.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, two)
    first: Any = found[1]
    second: Any = expected[1]
    if kind is Cached:
        assert first.norm == second.norm > 0
    elif kind is Extra:
        assert torch.equal(first.value, torch.tensor([5.0, 3.0]))
    again, third = make(kind)
    train(again, third)
    train(again, third)  # the reference, without a checkpoint
    train(found, other)
    for one, two in zip(found.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_live_tensors_are_read_in_place_under_any_name_that_a_hook_gives_them() -> None:
    """Copies would double the memory of the frozen weights."""
    model, optimizer = make(Renamed)
    state = model_state(model, optimizer._settled(), optimizer.param_groups)
    assert state.computed == {}
    assert state.whole["model/1.factor"].data_ptr() == model[1].scale.data_ptr()
    assert state.tied == {"model/1.kernel": "model/1.weight"}


def buffer_of(content: bytes) -> io.BytesIO:
    file = io.BytesIO(content)
    file.seek(len(content))  # torch.save leaves the position at the end
    return file


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"bytes",
        buffer_of(b"as TransformerEngine's"),
        {"amax": torch.ones(3), 5: (1, float("inf"))},
        torch.zeros(0),
        torch.ones(2, 3, dtype=torch.bfloat16).t(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_extra_state_of_any_kind(value: Any, tmp_path: Path) -> None:
    model, optimizer = make(Extra)
    layer: Any = model[1]
    layer.value = value
    before = bits(value)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    for other_value in ("another", torch.ones(9, 9)):
        layer.value = other_value  # type and shape may differ from the saved ones
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
        assert bits(layer.value) == before


def test_extra_state_that_cannot_be_held_is_rejected_by_name(tmp_path: Path) -> None:
    model, optimizer = make(Extra)
    model[1].value = {"fn": make}
    with pytest.raises(CheckpointError, match=r"^model/1\._extra_state\['fn'\] is of type f"):
        save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def test_the_layers_must_save_the_same_entries(tmp_path: Path) -> None:
    """If names differ, nothing is modified. An entry that no module loads is an error."""
    with_state, first = make(Extra)
    without, second = make(nn.Linear, seed=2)
    save_checkpoint(tmp_path / "with", model=with_state, optimizer=first)
    save_checkpoint(tmp_path / "without", model=without, optimizer=second)
    before = [parameter.clone() for parameter in with_state.parameters()]
    with pytest.raises(CheckpointError, match=r"has no 'model/1\._extra_state'"):
        load_checkpoint(tmp_path / "without", model=with_state, optimizer=first)
    assert all(map(torch.equal, before, with_state.parameters()))
    before = [parameter.clone() for parameter in without.parameters()]
    with pytest.raises(CheckpointError, match=r"has 'model/1\._extra_state', but this model"):
        load_checkpoint(tmp_path / "with", model=without, optimizer=second)
    assert all(map(torch.equal, before, without.parameters()))


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (3, 4),
        (torch.tensor([1.0, torch.nan]), torch.tensor([2.0, torch.nan])),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2), [1.0, 1.0]),
    ],
    ids=str,
)
def test_an_entry_that_no_module_loads_must_have_the_saved_value(
    saved: Any, other: Any, tmp_path: Path
) -> None:
    """As the scales of a 4-bit layer of bitsandbytes, which come from quantizing its weight."""
    model, optimizer = make(nn.Linear)
    entry = {"scale": saved}
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({prefix + "scale": entry["scale"]})
    )
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    entry["scale"] = other
    with pytest.raises(CheckpointError, match=r"does not load 'scale'.* with another value"):
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)


def test_a_checkpoint_of_format_2_leaves_such_state_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make(Extra)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    values = read_manifest(tmp_path / "c").model_dump()
    del values["values"]
    values["optimizer"]["groups"][0]["options"]["betas"] = [0.9, 0.999]
    text = sealed(json.loads(json.dumps({**values, "format_version": 2})))
    (tmp_path / "c" / MANIFEST_NAME).write_text(text)
    model[1].value = {"kept": 1}
    with caplog.at_level(logging.WARNING):
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert model[1].value == {"kept": 1}
    assert "Keeping the current value of 'model/1._extra_state'" in caplog.text


def test_a_frozen_tensor_of_another_shape_is_rejected(tmp_path: Path) -> None:
    """Otherwise the saved bytes would be read into a part of the tensor."""
    small, first = make(nn.Linear)
    small.register_buffer("table", torch.ones(3))
    save_checkpoint(tmp_path / "c", model=small, optimizer=first)
    for shape in ((2,), (4,), (3, 1)):
        other, second = make(nn.Linear)
        other.register_buffer("table", torch.zeros(shape))
        with pytest.raises(CheckpointError, match="'model/table' has shape"):
            load_checkpoint(tmp_path / "c", model=other, optimizer=second)


def test_parametrized_and_frozen_layers(tmp_path: Path) -> None:
    """Also a frozen weight that the state dict omits, which torch reports as missing."""

    def kind(num_in: int, num_out: int) -> nn.Module:
        normed = parametrizations.weight_norm(nn.Linear(num_in, num_out))
        return nn.Sequential(normed, Quiet(num_in, num_out))

    model, optimizer = make(kind)
    train(model, optimizer)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    found, other = make(kind, seed=2)
    load_checkpoint(tmp_path / "c", model=found, optimizer=other)
    assert saved.keys() == found.state_dict().keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_layer_that_is_not_initialized_is_named(tmp_path: Path) -> None:
    model, optimizer = make(nn.Linear)
    model.append(nn.LazyLinear(3))
    with pytest.raises(CheckpointError, match=r"'3\.weight' of the model is not initialized"):
        save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_load_state_dict_is_reported(tmp_path: Path) -> None:
    model, optimizer = make(Packed)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    model[1].packed = torch.zeros(3)
    with pytest.raises(CheckpointError, match="load_state_dict of the model failed"):
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)


def test_a_sparse_buffer_is_named(tmp_path: Path) -> None:
    model, optimizer = make(nn.Linear)
    model.register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match=r"model/table has layout torch\.sparse_coo"):
        save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_other_state_is_exported_imported_and_shown(tmp_path: Path) -> None:
    import numpy as np

    model, optimizer = make(Extra)
    train(model, optimizer)
    layer: Any = model[1]
    layer.value = {"amax": torch.arange(3.0), "calls": (2, 3)}
    extra = {"rng": torch.get_rng_state(), "epoch": 3, "numpy": np.ones(2)}
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)
    shown = command("inspect", tmp_path / "c")
    assert "model/1._extra_state" in shown
    assert "extra: rng, epoch, numpy" in shown
    output = command("export", "--format", "torch", tmp_path / "c", tmp_path / "t.pt")
    assert "without extra['numpy']" in output
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    del extra["numpy"]
    assert bits(content["extra"]) == bits(extra)
    plain, _ = make(Extra, seed=2)
    plain.load_state_dict(content["model"])
    assert bits(plain[1].value) == bits(layer.value)

    command("export", "--format", "dcp", tmp_path / "c", tmp_path / "dcp")
    distributed, _ = make(Extra, seed=4)
    distributed[1].value = {"amax": torch.zeros(3), "calls": (0, 0)}
    target = {"model": distributed.state_dict()}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert bits(target["model"]["1._extra_state"]) == bits(layer.value)

    trained = torch.optim.AdamW(plain.parameters())
    trained.zero_grad()
    plain(torch.ones(3, 4)).sum().backward()
    trained.step()
    state = {"model": plain.state_dict(), "optimizer": trained.state_dict()}
    torch.save(state, tmp_path / "own.pt")
    names = [name for name, _ in plain.named_parameters()]
    import_torch_pickle(tmp_path / "own.pt", tmp_path / "d", names=names)
    found, other = make(Extra, seed=3)
    load_checkpoint(tmp_path / "d", model=found, optimizer=other)
    assert bits(found[1].value) == bits(layer.value)


class OwnLoad(nn.Linear):
    """Overrides load_state_dict with fewer arguments and without a result."""

    def load_state_dict(self, state_dict: Any) -> None:  # type: ignore[override]
        super().load_state_dict(state_dict)


class Rounded(nn.Linear):
    """Saves its weights as bfloat16, as many published models do."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            destination[prefix + name] = destination[prefix + name].bfloat16()


@pytest.mark.parametrize("kind", [OwnLoad, Rounded])
def test_trained_weights_are_restored_to_the_bit_for_any_load_state_dict(
    tmp_path: Path, kind: type[nn.Linear]
) -> None:
    torch.manual_seed(0)
    model, other = kind(4, 3), kind(4, 3)
    optimizer, loaded = OffloadAdam(model.parameters()), OffloadAdam(other.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    assert loaded.num_steps == 1
