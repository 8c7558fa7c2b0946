"""The guides in docs/integrations.md run as they are printed."""

from __future__ import annotations

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

from tests.integrations.language_model import forget_accelerator

DOCUMENT = Path(__file__).parents[2] / "docs/integrations.md"
Names = dict[str, Any]


def script_of(section: str) -> str:
    """Return the model and data, and all code of one section."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    blocks = re.findall(r"^```python\n(.*?)^```$", sections[""] + sections[section], re.M | re.S)
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
    "Trainer": check_trainer,
    "Accelerate": check_accelerate,
    "Lightning": check_lightning,
    "peft": check_peft,
    "DistributedDataParallel": check_loop,
}


@pytest.mark.parametrize("section", CHECKS)
def test_a_guide_runs_in_one_process(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if section == "DistributedDataParallel":
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
            exec(compile(script_of(section), section, "exec"), names)
            CHECKS[section](names)
    finally:
        forget_accelerator()
        torch.set_num_threads(num_threads)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("section", [section for section in CHECKS if section != "peft"])
def test_a_guide_runs_on_two_ranks(section: str, tmp_path: Path) -> None:
    (tmp_path / "guide.py").write_text(script_of(section), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "guide.py"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
