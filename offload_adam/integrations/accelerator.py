"""`keep_state_sharded`: the complete optimizer state in `save_state` and `load_state`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.integrations.missing import explain_missing
from offload_adam.integrations.saved_apart import (
    folder_of,
    is_sharded,
    load_apart,
    new_label,
    reference_to,
    remove_others,
    save_apart,
    unwrapped,
)
from offload_adam.sharded_optimizer import ShardedOptimizer

with explain_missing("accelerate"):
    from accelerate import Accelerator


def keep_state_sharded(accelerator: Accelerator, *optimizers: torch.optim.Optimizer) -> None:
    """Save and load the complete state of optimizers with an Accelerator's state.

        model, optimizer = accelerator.prepare(model, OffloadAdamW(model.parameters()))
        keep_state_sharded(accelerator, optimizer)
        accelerator.save_state("checkpoint")
        accelerator.load_state("checkpoint")

    Each rank writes and reads its own part of the state. The number of ranks may change between
    save and load. The folder must be on a file system that all ranks share.

    Call it once, on all ranks, before `save_state` and `load_state`. With FSDP2 it has no effect,
    because Accelerate then saves and loads the complete state itself.

    Args:
        optimizers: as given to or returned by `accelerator.prepare`.

    Raises:
        TypeError: an optimizer is not one of this package, or none is given.
    """
    found = [_require_offload_adam(optimizer) for optimizer in optimizers]
    if not found:
        raise TypeError("keep_state_sharded() needs an optimizer. Pass that of prepare().")
    accelerator.register_save_state_pre_hook(partial(_save, accelerator, found))
    accelerator.register_load_state_pre_hook(partial(_prepare_load, accelerator, found))


def _require_offload_adam(optimizer: torch.optim.Optimizer) -> ShardedOptimizer:
    bare = unwrapped(optimizer)
    if not isinstance(bare, ShardedOptimizer):
        raise TypeError(
            "keep_state_sharded() supports OffloadAdam and OffloadAdamW, not "
            f"{type(bare).__name__}. Leave it out: Accelerate saves the whole state of other "
            "optimizers itself."
        )
    return bare


def _save(
    accelerator: Accelerator,
    optimizers: list[ShardedOptimizer],
    models: list[nn.Module],
    weights: list[Any],
    folder: str,
) -> None:
    """Write the state of all optimizers. Accelerate then saves references. Collective."""
    optimizers = [optimizer for optimizer in optimizers if not is_sharded(optimizer)]
    if not optimizers:
        return
    parent = Path(folder).absolute()
    labels = [new_label(optimizer.ranks) for optimizer in optimizers]
    for optimizer, label in zip(optimizers, labels, strict=True):
        save_apart(optimizer, _bare(accelerator, models), parent, label)
        optimizer._given_reference = reference_to(optimizer, label, parent)
    ranks = optimizers[0].ranks
    with raise_on_all_ranks(ranks, "removing an older optimizer state"):
        if ranks.rank == 0:
            remove_others(parent, [folder_of(parent, label).name for label in labels])


def _prepare_load(
    accelerator: Accelerator,
    optimizers: list[ShardedOptimizer],
    models: list[nn.Module],
    folder: str,
) -> None:
    """Let `load_state_dict` read the state from this folder when it is given a reference."""
    for optimizer in optimizers:
        parents = [Path(folder).absolute()]
        bare = _bare(accelerator, models)
        optimizer._read_reference = partial(load_apart, optimizer, bare, parents)


def _bare(accelerator: Accelerator, models: list[nn.Module]) -> nn.ModuleList:
    """Return all models, without the wrapper of DDP, which they have only with several ranks."""
    return nn.ModuleList(
        accelerator.unwrap_model(model, keep_torch_compile=False) for model in models
    )
