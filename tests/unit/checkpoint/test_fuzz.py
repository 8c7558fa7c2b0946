"""Damaged checkpoints: each is loaded completely or rejected with a clean error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from offload_adam import (
    Adam,
    CheckpointError,
    OffloadAdam,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.export import export_dcp, export_torch
from offload_adam.checkpoint.format import MANIFEST_NAME, sealed
from offload_adam.checkpoint.torch_import import import_torch_pickle
from offload_adam.cli.app import app
from offload_adam.encoding import TAG
from offload_adam.schedules import CosineDecayLR
from tests.unit.checkpoint.test_format import JSON, places

HOSTILE = st.sampled_from(
    [
        *(2**24 + 1, 2**53, 2**62, 2**63, 2**70, 10**400, -1, -0.0, 1.5, 1e308),
        *("../x", "\x1b[31m", "[/red]", "model/weight", "F64", "I4", "bits8", "x" * 3000),
        *([1] * 65, [2**62, 0], [0, 2**70], [2**62, 2**62, 0], ["weight", "weight"]),
        {TAG: "tuple", "items": []},
        {TAG: "float", "value": "inf"},
        {TAG: "torch.Tensor", "dtype": "torch.float32", "shape": [2**62, 0], "data": ""},
        {TAG: "torch.device", "value": "cuda:99999"},
    ]
).map(copy.deepcopy)  # later changes must not modify the values above


class Saved:
    """A checkpoint, its model and optimizer, and the original content of its files."""

    def __init__(self, folder: Path, *, adam: bool) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Linear(4, 3)
        self.optimizer: Adam | OffloadAdam = (
            Adam(self.model.parameters(), CosineDecayLR(0.0, 0.1, 5))
            if adam
            else OffloadAdam(self.model.parameters())
        )
        self.model(torch.ones(4)).sum().backward()
        self.optimizer.step()
        save_checkpoint(folder, model=self.model, optimizer=self.optimizer, extra={"a": [1]})
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def restore(self) -> None:
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def load(self) -> bool:
        """Return whether the checkpoint loads. Any error but CheckpointError fails the test."""
        try:
            load_checkpoint(self.folder, model=self.model, optimizer=self.optimizer)
        except CheckpointError:
            return False
        return True


@pytest.fixture(scope="module", params=[False, True], ids=["OffloadAdam", "Adam"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Saved:
    return Saved(tmp_path_factory.mktemp("fuzz") / "c", adam=request.param)


@settings(max_examples=100)
@given(st.data())
def test_any_damage_is_rejected(saved: Saved, data: st.DataObject) -> None:
    """Flipped, removed or inserted bytes are always detected."""
    name = data.draw(st.sampled_from(sorted(saved.files)))
    content = bytearray(saved.files[name])
    at = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "put in"]))
    if how == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    (saved.folder / name).write_bytes(content)
    same = name == MANIFEST_NAME and _same(bytes(content), saved.files[name])
    assert saved.load() is same
    saved.restore()
    assert saved.load()


def _same(content: bytes, original: bytes) -> bool:
    """Return whether a manifest has the same content, for example with more blanks."""
    try:
        return bool(json.loads(content) == json.loads(original))
    except ValueError:
        return False


@settings(max_examples=100)
@given(st.data())
def test_any_sealed_manifest_is_loaded_or_rejected(
    saved: Saved, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Replaces any part of a manifest, and seals it with the correct checksum."""
    values = json.loads(saved.files[MANIFEST_NAME])
    del values["sha256"]
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([p for p in places(values) if p]))
        at = values
        for key in path:
            at = at[key]
        at[last] = data.draw(JSON | HOSTILE | st.floats(allow_nan=False, allow_infinity=False))
    (saved.folder / MANIFEST_NAME).write_text(sealed(values))
    saved.load()
    export_to(tmp_path_factory.mktemp("export"), saved.folder)
    saved.restore()
    assert saved.load()


def export_to(folder: Path, checkpoint: Path) -> None:
    """Show and export a checkpoint, in both formats. Any error but CheckpointError fails."""
    result = CliRunner().invoke(app, ["checkpoint", "inspect", str(checkpoint)])
    assert result.exit_code in (0, 1), result.exception
    assert "\x1b" not in result.output
    with suppress(CheckpointError):
        export_torch(checkpoint, folder / "t.pt")
    with suppress(CheckpointError):
        export_dcp(checkpoint, folder / "dcp")


def _bomb() -> list[Any]:
    value: list[Any] = [1]
    for _ in range(40):
        value = [value, value]
    return value


# Of the shape of the weight where they have it. Made for each example, since few can be copied.
ODD_TENSORS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.zeros(3, 2),
    lambda: torch.zeros(3, 2).to_sparse(),
    lambda: torch.zeros(3, 2).to_sparse_csr(),
    lambda: torch.zeros(3, 2, device="meta"),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided),
    lambda: torch.zeros(2, 3).t(),
    lambda: torch.zeros(3, 4)[:, ::2],
    lambda: torch.zeros(1).expand(3, 2),
    lambda: torch.zeros(1).expand(10**12),
    lambda: torch.zeros(3, 2, dtype=torch.complex64).conj(),
    lambda: torch.zeros(3, 2, dtype=torch.float64),
    lambda: torch.zeros(3, 2, dtype=torch.int64),
    lambda: torch.zeros(3, 2, dtype=torch.uint8).view(torch.bits8),
    lambda: torch.zeros(3, 2).to(torch.float8_e4m3fn),
    lambda: torch.zeros(3, 2, requires_grad=True),
    lambda: torch.zeros([1] * 70),
    lambda: torch.tensor(float("nan")),
    lambda: torch.tensor(1e30),
    lambda: torch.tensor(1.5),
]
ODD_VALUES: list[Any] = [
    *(10**400, 2**70, -1, True, None, 5, "a" * 3000, "\x1b[31m", "\ud800", (0.9,), (0.9, 1.0)),
    *([0, 0], [1, 0], ["weight", "weight"], {1, 2}, b"x", torch.float32, _bomb()),
]


@settings(max_examples=100)
@given(st.data())
def test_any_pickled_file_is_imported_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("import")
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content: Any = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    *path, last = data.draw(st.sampled_from([p for p in places(content) if p]))
    at = content
    for key in path:
        at = at[key]
    odd = st.sampled_from(ODD_TENSORS).map(lambda make: make())
    at[last] = data.draw(JSON | st.floats() | odd | st.sampled_from(ODD_VALUES).map(copy.deepcopy))
    torch.save(content, folder / "t.pt")
    with suppress(CheckpointError):
        import_torch_pickle(folder / "t.pt", folder / "c")
    if (folder / "c").exists():
        with suppress(CheckpointError):
            load_checkpoint(folder / "c", model=model, optimizer=OffloadAdam(model.parameters()))
