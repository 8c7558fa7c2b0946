"""Training loops with an Accelerator, alone or as one of several ranks, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LinearLR

from offload_adam import OffloadAdamW
from offload_adam.integrations import keep_state_sharded
from tests.integrations.language_model import EPS, LR, Texts, forget_accelerator, make_model
from tests.integrations.trainer_runs import GLOBAL_BATCH, NUM_STEPS, Result


@dataclass(frozen=True)
class Loop:
    """A training loop.

    optimizer: "drop-in", "streaming", or "torch" for torch.optim.AdamW.
    wrap: let Accelerate wrap the model in DDP; otherwise the optimizer averages the gradients.
    options: of the optimizer.
    arguments: of the Accelerator.
    accumulate: backwards in a step; the batch of a step stays the same.
    sharded: call `keep_state_sharded`.
    """

    optimizer: str = "drop-in"
    wrap: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    dtype: torch.dtype = torch.float32
    max_norm: float | None = None
    sharded: bool = True


def loop(
    rank: int, world_size: int, folder: Path, run: Loop, resume: bool = False
) -> tuple[Result, dict[str, Any]]:
    """Train and save after half of the steps, or resume from there.

    Returns:
        What the run leaves, and the full state on rank 0 at the save or after the load.
    """
    forget_accelerator()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=run.accumulate, **run.arguments)
    set_seed(11)
    model = make_model(run.dtype)
    options: dict[str, Any] = {"lr": LR, "eps": EPS, "weight_decay": 0.1, **run.options}
    cls: type[torch.optim.Optimizer] = OffloadAdamW
    if run.optimizer == "torch":
        cls = torch.optim.AdamW
    elif run.optimizer == "streaming":
        options["module"] = model
    if run.optimizer != "torch" and not run.wrap:
        options["gradient_reduction"] = "optimizer"
    optimizer = cls(model.parameters(), **options)
    batch = GLOBAL_BATCH // (world_size * run.accumulate)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=batch)
    model = accelerator.prepare_model(model, evaluation_mode=not run.wrap)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    # Not prepared, because Accelerate steps a prepared scheduler once for each rank.
    scheduler = LinearLR(optimizer.optimizer, 0.5, total_iters=NUM_STEPS)
    accelerator.register_for_checkpointing(scheduler)
    if run.optimizer != "torch" and run.sharded:
        keep_state_sharded(accelerator, optimizer)
    batches, half = iter(loader), NUM_STEPS // 2
    losses, norms = [], []
    middle: dict[str, Any] = {}
    for step in range(NUM_STEPS):
        if step == half:
            if resume:
                accelerator.load_state(str(folder))
            else:
                accelerator.save_state(str(folder))
            middle = full_state(optimizer.optimizer)
        for _ in range(run.accumulate):
            inputs = next(batches)
            if resume and step < half:
                continue
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and run.max_norm is not None:
                    norm = accelerator.clip_grad_norm_(model.parameters(), run.max_norm)
                    norms.append(float(norm))
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    scheduler.step()
            losses.append(float(loss.detach()))
    bare = accelerator.unwrap_model(model)
    weights = {name: value.clone() for name, value in bare.state_dict().items()}
    return Result(losses, norms, weights, full_state(optimizer.optimizer)), middle


def full_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return optimizer.full_state_dict() if isinstance(optimizer, OffloadAdamW) else {}
