"""Files of torch that are no model with its Adam: rejected, in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdamW, load_checkpoint
from offload_adam.checkpoint.torch_import import import_torch_pickle
from offload_adam.errors import CheckpointError

Change = Callable[[dict[str, Any]], object]


def content() -> dict[str, Any]:
    """Return the state dicts of a small model and its AdamW after a step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


def set_weight(value: torch.Tensor) -> Change:
    return lambda found: found["model"].update(weight=value)


def set_state(key: str, value: object) -> Change:
    return lambda found: found["optimizer"]["state"][0].update({key: value})


def set_option(key: str, value: object) -> Change:
    return lambda found: found["optimizer"]["param_groups"][0].update({key: value})


def add_entry(key: object, value: object) -> Change:
    return lambda found: found["model"].update({key: value})


def bomb() -> list[Any]:
    value: list[Any] = [1, 2]
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_weight(torch.eye(3).to_sparse()), "weight has layout torch.sparse_coo"),
        (set_weight(torch.zeros(3, 4, device="meta")), "weight is on the meta device"),
        (set_weight(torch.zeros([1] * 65)), "weight has 65 dimensions"),
        (set_weight(torch.zeros(1).expand(10**12)), "'weight' repeats elements, .*clone"),
        (set_weight(torch.zeros(3, 4, dtype=torch.int64)), "'weight' has dtype torch.int64 and"),
        (set_state("exp_avg", torch.zeros(3, 4).to_sparse()), "exp_avg of 'weight' has layout"),
        (set_state("exp_avg", torch.zeros(4, 3)), r"of shape \[4, 3\], but must be"),
        (set_state("exp_avg", torch.zeros(3, 4, dtype=torch.float64)), "is torch.float64"),
        (set_state("exp_avg", 3), "no valid state of torch's Adam"),
        (set_state("exp_avg_var", torch.zeros(3, 4)), "'weight' has 'exp_avg_var', unlike"),
        (lambda found: found["optimizer"]["state"][0].pop("exp_avg_sq"), "has no 'exp_avg_sq'"),
        (set_state("step", torch.tensor(1.5)), "multiple of 1"),
        (set_state("step", 1e30), "less than or equal to 16777216"),
        (set_state("step", torch.tensor(1.0, device="meta")), "no valid state"),
        (set_option("betas", 5), "betas must be two numbers, not 5"),
        (set_option("betas", bomb()), "param_groups would take about"),
        (set_option("lr", float("nan")), "lr must be finite and at least 0, not nan"),
        (set_option("lr", -1), "lr must be finite and at least 0, not -1"),
        (set_option("lr", 10**400), "lr is too large for a float"),
        (set_option("lr", "x"), "lr must be a number, not 'x'"),
        (set_option("lr", torch.zeros(2)), "lr must be a number, not tensor"),
        (set_option("lr", torch.zeros((), device="meta")), "lr must be a number"),
        (set_option("eps", float("inf")), "eps must be finite"),
        (set_option("amsgrad", None), "amsgrad must be a bool, not None"),
        (set_option("maximize", 1), "maximize must be a bool, not 1"),
        (set_option("params", [0, 0]), "a parameter is in two places of param_groups"),
        (set_option("params", 5), "no valid state"),
        (add_entry(1, torch.ones(2)), "the key 1, which is not text"),
        (add_entry("table", bomb()), "state dict of the model would take about"),
        (
            lambda found: found["model"].update(dict.fromkeys(map(str, range(100)), "x" * 2**20)),
            "state dict of the model would take about",
        ),
        (add_entry("table", 10**5000), "Unsupported operand"),  # by torch
    ],
)
def test_what_would_not_load_is_not_imported(tmp_path: Path, change: Change, words: str) -> None:
    found = content()
    change(found)
    torch.save(found, tmp_path / "t.pt")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=words):
        import_torch_pickle(tmp_path / "t.pt", tmp_path / "c")
    assert time.monotonic() - began < 10
    assert [path.name for path in tmp_path.iterdir()] == ["t.pt"]


def test_views_that_share_memory_are_imported_up_to_a_limit(tmp_path: Path) -> None:
    """Each view is copied, so that many views of one memory would fill the disk."""
    found = content()
    memory = torch.arange(2**21, dtype=torch.float32)
    found["model"] |= {f"view{number}": memory[number:] for number in range(40)}
    torch.save(found, tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match=r"'view[0-9]+' repeats elements, or is one of many"):
        import_torch_pickle(tmp_path / "t.pt", tmp_path / "c")
    found["model"] = {name: found["model"][name] for name in ("weight", "bias", "view0", "view1")}
    torch.save(found, tmp_path / "t.pt")
    import_torch_pickle(tmp_path / "t.pt", tmp_path / "c")
    model = nn.Linear(4, 3)
    model.register_buffer("view0", torch.zeros(2**21))
    model.register_buffer("view1", torch.zeros(2**21 - 1))
    load_checkpoint(tmp_path / "c", model=model, optimizer=OffloadAdamW(model.parameters()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, found["model"][name]), name


IMPORT = """
import resource, sys
from pathlib import Path
from offload_adam.checkpoint.torch_import import import_torch_pickle
from offload_adam.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    import_torch_pickle(Path(sys.argv[1]), Path(sys.argv[1]).with_name("c"))
except CheckpointError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("version", [20, 99])
def test_compressed_parts_are_not_inflated(tmp_path: Path, version: int) -> None:
    """1 GiB of zeros in 1 MiB. torch reads an entry that claims to need version 9.9 of zip."""
    torch.save(content(), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "t.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            if not name.endswith("/data/0"):
                packed.writestr(name, plain.read(name))
        with packed.open("plain/data/0", "w") as out:
            for _ in range(1024):
                out.write(bytes(2**20))
    content_of = bytearray((tmp_path / "t.pt").read_bytes())
    content_of[content_of.index(b"PK\x01\x02") + 6] = version
    (tmp_path / "t.pt").write_bytes(content_of)
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "t.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    message, grown_kib = done.stdout.splitlines()
    words = "is damaged (zip file version 9.9)" if version == 99 else "holds compressed parts"
    assert words in message
    assert int(grown_kib) < 100 * 1024


def test_an_empty_file_is_rejected_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "t.pt").touch()
    with pytest.raises(CheckpointError, match=r"not written by torch\.save: it is empty\."):
        import_torch_pickle(tmp_path / "t.pt", tmp_path / "c")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        import_torch_pickle(tmp_path / "t.pt", tmp_path / "c")
