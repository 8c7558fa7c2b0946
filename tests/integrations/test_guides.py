"""The guides run as they are printed, after the model and data of docs/guides/index.md.

docs/guides/trainer.md, docs/guides/accelerate.md, docs/guides/lightning.md, docs/guides/peft.md and
docs/guides/ddp.md have one block each.
"""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import offload_adam
from offload_adam import integrations
from tests.integrations.language_model import forget_accelerator

GUIDES = Path(__file__).parents[2] / "docs/guides"
Names = dict[str, Any]


def script_of(guide: str) -> str:
    """Return the model and data, and the code of one guide."""
    text = "\n".join((GUIDES / f"{page}.md").read_text("utf-8") for page in ("index", guide))
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) == 2
    return "\n".join(["import torch", "torch.manual_seed(0)", *blocks])


def steps_of(optimizer: Any) -> set[int]:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return {int(entry["step"]) for entry in optimizer.state.values()}


def falls(first: list[float], second: list[float]) -> bool:
    """Return whether the loss falls, and the second run goes on from where the first one ended."""
    return sum(second) / len(second) < sum(first) / len(first) and second[0] < first[0]


def check_trainer(names: Names) -> None:
    trainer = names["trainer"]
    assert trainer.state.global_step == 20
    assert steps_of(trainer.optimizer) == {20}
    assert list(Path("trainer/checkpoint-20").glob("offload_adam-*"))


def check_accelerate(names: Names) -> None:
    assert falls(names["first_losses"], names["second_losses"])
    assert steps_of(names["optimizer"]) == {16}  # two runs over 16 batches, two in a step


def check_lightning(names: Names) -> None:
    assert names["trainer"].global_step == 16
    assert steps_of(names["trainer"].optimizers[0]) == {16}
    assert Path("lightning.ckpt.optimizer").is_dir()


def check_loop(names: Names) -> None:
    assert falls(names["first_losses"], names["second_losses"])


def check_peft(names: Names) -> None:
    check_loop(names)
    optimizer, model = names["optimizer"], names["model"]
    assert steps_of(optimizer) == {16}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(optimizer.state) == len(trained) < len(list(model.parameters())) / 2


CHECKS: dict[str, Callable[[Names], None]] = {
    "trainer": check_trainer,
    "accelerate": check_accelerate,
    "lightning": check_lightning,
    "peft": check_peft,
    "ddp": check_loop,
}


@pytest.mark.parametrize("guide", CHECKS)
def test_a_guide_runs_in_one_process(
    guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if guide == "ddp":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port}
        for name, value in {**environment, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
    forget_accelerator()
    num_threads = torch.get_num_threads()
    names: Names = {"__name__": "__main__"}
    try:
        with patch.dict(os.environ):  # Lightning sets RANK, WORLD_SIZE and more
            exec(compile(script_of(guide), guide, "exec"), names)
            CHECKS[guide](names)
    finally:
        forget_accelerator()
        torch.set_num_threads(num_threads)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("guide", CHECKS)
def test_a_guide_imports_all_names_but_the_model_and_the_data(guide: str) -> None:
    """Its code is often copied alone."""
    text = (GUIDES / f"{guide}.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    nodes = list(ast.walk(ast.parse(code)))
    imported = {
        name.asname or name.name.partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used &= {"torch", *offload_adam.__all__, *integrations.__all__}
    assert "OffloadAdamW" in used
    assert used <= imported


@pytest.mark.slow
@pytest.mark.parametrize("guide", [guide for guide in CHECKS if guide != "peft"])
def test_a_guide_runs_on_two_ranks(guide: str, tmp_path: Path) -> None:
    (tmp_path / "guide.py").write_text(script_of(guide), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "guide.py"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
