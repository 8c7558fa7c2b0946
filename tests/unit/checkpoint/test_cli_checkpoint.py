"""`offload-adam checkpoint verify` and `inspect`."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from offload_adam import OffloadAdam, save_checkpoint
from offload_adam.checkpoint.format import MANIFEST_NAME, sealed
from offload_adam.cli import checkpoint as cli_checkpoint
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


@pytest.mark.parametrize(
    "name", ["[/red]", "[bold]x[/bold]", "\x1b[2J", "\x9b2J", "\u202e", "a\nb"]
)
def test_inspect_shows_any_name_as_it_is_and_harmless(
    saved: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((saved / MANIFEST_NAME).read_text())
    del values["sha256"]
    values["tensors"][f"model/{name}"] = {"dtype": "U8", "shape": [0], "order": [0], "pieces": []}
    values["values"] = {f"model/value{name}": 1}
    values["extra"] = {f"extra{name}": 1}
    (saved / MANIFEST_NAME).write_text(sealed(values))
    monkeypatch.setenv("COLUMNS", "200")
    code, output = command("inspect", str(saved))
    assert code == 0
    shown = name if name.isprintable() or "\n" in name else name.encode("unicode_escape").decode()
    for prefix in ("model/", "value", "extra"):
        assert prefix + shown.split("\n")[0] in output
    assert output.replace("\n", "").isprintable()


def test_inspect_shows_keys_of_any_type(saved: Path) -> None:
    values = json.loads((saved / MANIFEST_NAME).read_text())
    del values["sha256"]
    tensor = {"$type": "torch.Tensor", "dtype": "torch.bits8", "shape": [1], "data": "AA=="}
    values["extra"] = {"$type": "dict", "pairs": [[tensor, 1], [5, 2], ["epoch", 3]]}
    (saved / MANIFEST_NAME).write_text(sealed(values))
    code, output = command("inspect", str(saved))
    assert code == 0
    assert ", 5, epoch\n" in output


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


def test_inspect_shortens_long_names(tmp_path: Path) -> None:
    """Unlimited, a name of a megabyte takes seconds to print."""
    model = torch.nn.ModuleDict({1_000_000 * "x": torch.nn.Linear(4, 3)})
    extra = {"y1=[" * 250_000: 1}
    optimizer = OffloadAdam(model.parameters())
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)
    code, output = command("inspect", str(tmp_path / "c"))
    assert code == 0
    assert "extra:" in output
    assert len(output) < 100_000


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "device", "large", "binary", "missing"])
def test_names_are_read_from_a_text_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(cli_checkpoint, "MAX_NAMES_NBYTES", 1000)
    path = Path("/dev/zero") if kind == "device" else tmp_path / "names"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("large", "binary"):
        path.write_bytes(1001 * b"x" if kind == "large" else b"\xff")
    code, output = command(
        *("import", "--format=torch-pickle", f"--names={path}"),
        *(str(tmp_path / "no.pt"), str(tmp_path / "out")),
    )
    reason = {
        "pipe": "not a regular file",
        "device": "not a regular file",
        "large": "larger than 1,000 bytes",
        "binary": "not UTF-8 text",
        "missing": "No such file or directory",
    }
    assert code == 1
    assert output == (
        f"offload-adam: {path} cannot be read: {reason[kind]}. Pass a text file with one parameter "
        "name per line.\n"
    )


def test_a_long_name_is_not_quoted_whole(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    values = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(values, tmp_path / "file.pt")
    (tmp_path / "names").write_text("weight\n" + 1_000_000 * "x")
    code, output = command(
        *("import", "--format=torch-pickle", f"--names={tmp_path / 'names'}"),
        *(str(tmp_path / "file.pt"), str(tmp_path / "out")),
    )
    assert code == 1
    assert len(output) < 4200


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("width", [80, 100])
def test_inspect_wraps_names_in_a_terminal_and_where_columns_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, is_terminal: bool
) -> None:
    model = torch.nn.ModuleDict({"a_long_name_" * 8: torch.nn.Linear(400, 300)})
    save_checkpoint(tmp_path / "c", model=model, optimizer=OffloadAdam(model.parameters()))
    monkeypatch.setenv("COLUMNS", str(width))
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a pipe for a terminal
    _, output = command("inspect", str(tmp_path / "c"))
    output = re.sub(r"\x1b\[[\d;]*m", "", output)
    assert all(len(line) <= width for line in output.splitlines())
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines()]
    names: list[str] = []
    cells: list[list[str]] = []
    for name, *others in filter(None, rows):
        if others[0]:  # a new tensor, otherwise the rest of a name
            names.append("")
            cells.append(others)
        names[-1] += name
    bias, weight = ["F32", "300", "1", "1.17 KiB"], ["F32", "300 x 400", "1", "468.75 KiB"]
    assert cells == [bias, weight, bias, bias, weight, weight]
    layer = "a_long_name_" * 8
    assert names == [
        *(f"model/{layer}.{name}" for name in ("bias", "weight")),
        *(
            f"optimizer/{layer}.{name}/{kind}"
            for name in ("bias", "weight")
            for kind in ("exp_avg", "exp_avg_sq")
        ),
    ]


def test_inspect_begins_with_a_summary(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = OffloadAdam(model.parameters(), state_format="bf16")
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra={"epoch": 3})
    _, output = command("inspect", str(tmp_path / "c"))
    first, second, third, fourth, line, *_ = output.splitlines()
    assert first == "step 0, saved by 1 rank(s)"
    assert second == "state_format 'bf16': the state of 1 parameter(s)"
    assert re.fullmatch(r"total: \d+ tensor\(s\), \d+ elements, \d+ B", third)
    assert fourth == "extra: epoch"
    assert line.startswith("┏")


def test_inspect_writes_each_name_on_one_line_of_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.ModuleDict({"a_long_name_" * 10: torch.nn.Linear(4, 3)})
    save_checkpoint(tmp_path / "c", model=model, optimizer=OffloadAdam(model.parameters()))
    monkeypatch.delenv("COLUMNS", raising=False)
    _, output = command("inspect", str(tmp_path / "c"))
    names = [line.split("│")[1].strip() for line in output.splitlines() if "│" in line]
    layer = "a_long_name_" * 10
    assert names == [
        *(f"model/{layer}.{name}" for name in ("bias", "weight")),
        *(
            f"optimizer/{layer}.{name}/{kind}"
            for name in ("bias", "weight")
            for kind in ("exp_avg", "exp_avg_sq")
        ),
    ]
    assert "total: 6 tensor(s), 45 elements, 180 B\n" in output


def test_inspect_prints_json(saved: Path) -> None:
    code, output = command("inspect", str(saved), "--json")
    assert code == 0
    state = {"dtype": "F32", "pieces": 1}
    weight = state | {"shape": [3, 4], "nbytes": 48}
    bias = state | {"shape": [3], "nbytes": 12}
    kinds = ("exp_avg", "exp_avg_sq")
    assert json.loads(output) == {
        "step": 0,
        "world_size": 1,
        "tensors": {
            "model/bias": bias,
            "model/weight": weight,
            **{f"optimizer/bias/{kind}": bias for kind in kinds},
            **{f"optimizer/weight/{kind}": weight for kind in kinds},
        },
        "values": {},
        "state_formats": {},
        "extra": [],
        "total": {"tensors": 6, "elements": 45, "nbytes": 180},
    }
    assert command("inspect", str(saved / "none"), "--json")[0] == 1


@pytest.mark.parametrize("name", ["verify", "inspect"])
def test_a_folder_that_is_not_a_checkpoint(saved: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoints" / "step-3")
    for path, words in (
        ("empty", "has no manifest.json. Pass a folder that save_checkpoint wrote."),
        ("file", "file is not a folder."),
        ("missing", "missing does not exist."),
        ("run", f"The newest checkpoint below it is {run / 'checkpoints' / 'step-3'}."),
        ("run/checkpoints", f"The newest checkpoint below it is {run / 'checkpoints' / 'step-3'}."),
    ):
        code, output = command(name, str(tmp_path / path))
        assert code == 1
        assert words in output
