"""Write the files beside this one: python -c "from tests.saved.write import main; main(VERSION)"

They are written once for each format and then kept: a new format gets a folder of its own.

    VERSION/CASE-WORLD/checkpoint/      what save_checkpoint wrote on WORLD ranks
    VERSION/CASE-WORLD/distributed/     OptimizerState through torch.distributed.checkpoint
    VERSION/CASE-WORLD/rank-N.pt        this rank's local_state_dict()
    VERSION/CASE-WORLD/expected.pt      all values at the save and three steps later, by torch.save
    VERSION/train/                      a training run's folder, with its checkpoint after step 4
"""

from __future__ import annotations

import copy
import io
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

from offload_adam import Adam, OffloadAdam, OffloadPolicy, save_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.config import RunConfig
from offload_adam.schedules import CosineDecayLR
from offload_adam.train.job import run_job
from tests.support.models import Model
from tests.support.ranks import RankPool

HERE = Path(__file__).parent
CASES = [
    ("fp32", 1),
    ("fp32", 2),
    ("bf16", 1),
    ("bf16", 2),
    ("amsgrad", 1),
    ("adam", 1),
    ("adam", 2),
    ("adam_offload", 2),
]
PLAIN = {"epoch": 3, "history": [1.5, None, "text"], "nested": {"flag": True}}
EXTRAS: dict[str, dict[str, Any]] = {
    "format_2": PLAIN,
    "format_3": {
        **PLAIN,
        "milestones": Counter({3: 1, 6: 2}),
        "best": float("inf"),
        "pair": (1, (2.5, b"bytes")),
        "$type": "a key of the user's",
    },
}
"""What was given as `extra`, by format."""
NUM_STEPS = 3


def make(case: str, seed: int) -> tuple[Model, Any]:
    """Return a model with weights drawn from `seed`, and its optimizer."""
    torch.manual_seed(seed)
    model = Model().to(torch.bfloat16 if case == "bf16" else torch.float32)
    model.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared: dict[str, Any] = {
        "gradient_reduction": "optimizer",
        "offload": OffloadPolicy(bucket_nbytes=512),
    }
    if case.startswith("adam"):
        rate = CosineDecayLR(0.001, 0.1, 9)
        return model, Adam(trained, rate, **shared, use_offload=case == "adam_offload")
    groups = [{"params": trained[:2], "lr": 0.03}, {"params": trained[2:], "weight_decay": 0.1}]
    return model, OffloadAdam(groups, lr=0.05, amsgrad=case == "amsgrad", **shared)


def train(model: Model, optimizer: Any, start: int, end: int) -> None:
    """Take steps whose gradients are the same on every rank."""
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 3, 5, 5, generator=generator).to(model.scale.dtype)
        optimizer.zero_grad()
        model(inputs).float().square().mean().backward()
        optimizer.step()


def values(model: Model, optimizer: Any) -> dict[str, Any]:
    """Return every value of both, on rank 0. Collective."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = optimizer.full_state_dict()
    return {"weights": weights, "full": full, "num_steps": optimizer.num_steps}


def write(rank: int, world_size: int, case: str, version: str) -> None:
    """Train for a few steps and write everything; the expected values hold three steps more."""
    target = folder_of(version, case, world_size)
    extra = EXTRAS[version]
    model, optimizer = make(case, seed=1)
    train(model, optimizer, 0, NUM_STEPS)
    save_checkpoint(target / "checkpoint", model=model, optimizer=optimizer, extra=extra)
    dcp.save({"optimizer": OptimizerState(model, optimizer)}, checkpoint_id=target / "distributed")
    torch.save(copy.deepcopy(optimizer.local_state_dict()), target / f"rank-{rank}.pt")
    saved = values(model, optimizer)
    train(model, optimizer, NUM_STEPS, 2 * NUM_STEPS)
    after = values(model, optimizer)
    if rank == 0:
        torch.save({"saved": saved, "after": after}, target / "expected.pt")
    optimizer.close()


def folder_of(version: str, case: str, world_size: int) -> Path:
    """Return where the files of one case are."""
    return HERE / version / f"{case}-{world_size}"


def train_config(folder: str) -> RunConfig:
    """Return the configuration of the training run; paths in it count from this folder."""
    sections: dict[str, Any] = {
        "run": {"name": "train", "dir": folder},
        "model": {"sizes": {"num_layers": 1, "width": 8, "num_heads": 2}},
        "data": {"path": "text/*.txt"},
        "train": {"num_steps": 8, "batch_size": 4, "sequence_length": 16, "eval_sequences": 8},
        "optimizer": {"lr": 1e-2, "max_grad_norm": 1.0},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 4, "keep_last": 10},
    }
    return RunConfig.model_validate(sections)


def main(version: str) -> None:
    root = HERE / version
    shutil.rmtree(root, ignore_errors=True)
    with RankPool() as ranks:
        for case, world_size in CASES:
            folder_of(version, case, world_size).mkdir(parents=True)
            ranks.run(write, world_size, case, version)
    os.chdir(HERE)
    run_job(train_config(version), Console(file=io.StringIO()))
    shutil.rmtree(root / "train" / "checkpoints" / "step-8")
