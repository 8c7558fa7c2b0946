"""Runs of Accelerate, Trainer and Lightning that shard their model by FSDP2, as one of two ranks.

Accelerate shards on CPUs only if it is told that they are devices, see `sharding_on_cpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from offload_adam import OffloadAdamW
from offload_adam.integrations import keep_state_sharded
from tests.integrations.language_model import forget_accelerator
from tests.integrations.trainer_runs import Run as TrainerRun
from tests.integrations.trainer_runs import make_trainer
from tests.support.fsdp2 import EPS, LR, MAX_NORM, Model, Run, batch_of, loss_of, whole
from tests.support.fsdp2 import make_model as make_any_model

NUM_STEPS = 4


def make_model() -> Model:
    """Return a model without unused parameters, whose state torch's AdamW cannot load."""
    model = make_any_model()
    model.unused.requires_grad_(False)
    return model


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Let Accelerate use its FSDP plugin on CPUs, as it does on GPUs."""
    construct = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None:
            self.fsdp_plugin = plugin
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    forget_accelerator()
    try:
        # Accelerate and Trainer set variables that later runs of this process would read.
        with mock.patch.object(AcceleratorState, "__init__", init), mock.patch.dict(os.environ):
            yield
    finally:
        forget_accelerator()


def accelerate(optimizer: str, folder: Path, **of_plugin: Any) -> tuple[Run, bool]:
    """Train with an Accelerator, save in the middle, train on, load and train the rest again.

    Returns:
        What the run shows, and whether the second time shows the same.
    """
    with sharding_on_cpu():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
            **of_plugin,
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = make_model()
        options = {"module": model, "overlap": True} if optimizer == "streaming" else {}
        cls = torch.optim.AdamW if optimizer == "torch" else OffloadAdamW
        made = cls(model.parameters(), lr=LR, eps=EPS, **options)  # type: ignore[arg-type]
        model, made = accelerator.prepare(model, made)
        if optimizer == "drop-in":  # without effect: Accelerate saves DTensors itself
            keep_state_sharded(accelerator, made)
        values: list[float] = []

        def train(first: int) -> None:
            for step in range(first, NUM_STEPS):
                loss = loss_of(model, batch_of(step, accelerator.process_index))
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                made.step()
                made.zero_grad()
                values.extend([loss.item(), float(norm)])
                if first == 0 and step == 1:
                    accelerator.save_state(str(folder))

        train(0)
        run = Run(list(values), whole(model))
        accelerator.load_state(str(folder))
        train(2)
        again = Run([*values[:4], *values[len(run.values) :]], whole(model))
        return run, again.equals(run)


def trainer(
    rank: int, world_size: int, folder: Path, optimizer: str, kind: str
) -> tuple[list[float], list[float], list[float]]:
    """Train with a Trainer, then resume from its checkpoint: losses, norms, losses again."""
    with sharding_on_cpu():
        arguments = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["GPT2Block"],
                "cpu_ram_efficient_loading": False,
                "state_dict_type": kind,
            },
            "max_grad_norm": 0.5,
        }
        # The callback has no effect: Trainer saves DTensors itself.
        run = TrainerRun(optimizer, arguments=arguments, callback=optimizer == "drop-in")
        found = []
        for resume in (None, str(folder / "checkpoint-3")):
            made = make_trainer(world_size, folder, run)
            made.train(resume_from_checkpoint=resume)
            history = [entry for entry in made.state.log_history if "loss" in entry]
            found.append([entry["loss"] for entry in history])
            norms = [float(entry["grad_norm"]) for entry in history]
            forget_accelerator()
        return found[0], norms, found[1]


class Sharded(lightning.LightningModule):
    """Shards its model where Lightning wants it: before `configure_optimizers`."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.model = make_model()
        self.kind = optimizer
        self.losses: list[float] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "torch":
            return torch.optim.AdamW(self.model.parameters(), lr=LR, eps=EPS)
        options: dict[str, Any] = {"module": self.model} if self.kind == "streaming" else {}
        return OffloadAdamW(self.model.parameters(), lr=LR, eps=EPS, **options)


class Batches(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([batch_of(step, dist.get_rank()) for step in range(NUM_STEPS)])


def lightning_run(folder: Path, optimizer: str) -> tuple[list[float], list[float]]:
    """Train with Lightning, then load its checkpoint of step 2 and train again: the losses."""
    found = []
    for resume in (False, True):
        module = Sharded(optimizer)
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        made = lightning.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            max_steps=NUM_STEPS,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[keep],
        )
        batches = torch.utils.data.DataLoader(Batches(), batch_size=None)
        made.fit(module, batches, ckpt_path=folder / "step=2.ckpt" if resume else None)
        found.append(module.losses)
    return found[0], found[1]
