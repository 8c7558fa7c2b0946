"""`OffloadAdamStrategy`: Lightning's DDP strategy with the complete optimizer state.

A checkpoint is the file that Lightning writes, and a folder beside it:

    epoch=0-step=500.ckpt                 written by Lightning: the model, and a reference
    epoch=0-step=500.ckpt.optimizer/
        offload_adam-<label>/             the state, as written by `save_optimizer_state`
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.integrations.missing import explain_missing
from offload_adam.integrations.saved_apart import (
    folder_of,
    load_apart,
    new_label,
    reference_to,
    remove_others,
    save_apart,
)
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.state_dict import StateReference

with explain_missing("lightning"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.strategies import DDPStrategy

_WITHOUT_DDP = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
    "process_group_backend",
    "timeout",
    "start_method",
}
"""Arguments of `DDPStrategy` that have a meaning without DDP."""


class OffloadAdamStrategy(DDPStrategy):
    """Lightning's DDP strategy, with checkpoints of the complete optimizer state.

        strategy = OffloadAdamStrategy(streaming=True)
        trainer = Trainer(strategy=strategy, devices=8)
        trainer.fit(model, ckpt_path="last")

    Each rank writes and reads its own part of the state, in the folder `X.ckpt.optimizer` beside
    Lightning's file `X.ckpt`. Move and copy the two together. The number of ranks may change
    between save and resume. Checkpoints must be on a file system that all ranks share.

    Args:
        streaming: do not wrap the model in DDP. The optimizers average the gradients during
            backward. Construct them in `configure_optimizers` with `module=self`. As in DDP, all
            ranks begin with the parameters and buffers of rank 0. Unlike in DDP, buffers such as
            the statistics of BatchNorm are not synchronized later.
        options: as in `DDPStrategy`, also those of `DistributedDataParallel` without `streaming`.

    Raises:
        ValueError: an option of DDP is given with `streaming`.
    """

    def __init__(self, *, streaming: bool = False, **options: Any) -> None:
        unused = sorted(options.keys() - _WITHOUT_DDP)
        if streaming and unused:
            raise ValueError(
                f"{', '.join(unused)} configures DDP, which streaming=True does not use. Leave it "
                "out, or pass streaming=False."
            )
        super().__init__(**options)
        self._streaming = streaming
        self._resumed = Path()  # the checkpoint that was loaded last

    def configure_ddp(self) -> None:
        """Wrap the model in DDP; when streaming, only copy rank 0's parameters and buffers."""
        if not self._streaming:
            super().configure_ddp()
            return
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Construct the optimizers; when streaming, check that they stream.

        Raises:
            ValueError: an optimizer does not average the gradients during backward.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers if self._streaming else ():
            # An optimizer that averages in step() is rejected too: Lightning would clip the
            # gradients of each rank before.
            if not isinstance(optimizer, ShardedOptimizer) or optimizer._hooks is None:
                raise ValueError(
                    f"{type(optimizer).__name__} does not average the gradients during backward, "
                    "and streaming=True does not use DDP. In configure_optimizers, return an "
                    "OffloadAdamW(..., module=self) without gradient_reduction='external', or "
                    "pass streaming=False."
                )

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return a reference to state that `save_checkpoint` saves. Collective."""
        if not isinstance(optimizer, ShardedOptimizer):
            state: dict[str, Any] = super().optimizer_state(optimizer)
            return state
        # `save_checkpoint` knows the folder.
        return reference_to(optimizer, new_label(optimizer.ranks), Path()).as_state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save the state of all optimizers, then Lightning's file. Collective.

        A crash at any time leaves the old checkpoint of this path, or the new one.

        Raises:
            ValueError: the path is not one of a file system, or the file is written in background.
            CheckpointError, OSError: writing failed.
        """
        parent = _folder_beside(filepath)
        kept = []
        states = checkpoint.get("optimizer_states", [])
        for number, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=False)):
            reference = StateReference.of(state)
            if reference is None:
                continue
            if isinstance(self.checkpoint_io, AsyncCheckpointIO):
                raise ValueError(
                    "OffloadAdamStrategy does not support AsyncCheckpointIO, because a file that "
                    "is written later may be lost after its old optimizer state was removed. "
                    "Leave this plugin out."
                )
            save_apart(optimizer, self.lightning_module, parent, reference.label)
            kept.append(folder_of(parent, reference.label).name)
            states[number] = reference_to(optimizer, reference.label, parent).as_state_dict()
        if not kept:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # Only rank 0 writes. Without this, the other ranks would wait for a failed rank 0.
        ranks = next(o.ranks for o in self.optimizers if isinstance(o, ShardedOptimizer))
        with raise_on_all_ranks(ranks, "writing Lightning's checkpoint file"):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            if ranks.rank == 0:
                remove_others(parent, kept)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read Lightning's file, and remember where it is."""
        self._resumed = Path(checkpoint_path)
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of all optimizers, whichever strategy has saved it. Collective.

        Raises:
            CheckpointError: the state is not found, or cannot be loaded.
        """
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            if isinstance(optimizer, ShardedOptimizer) and optimizer._loaded_reference is not None:
                # ModelCheckpoint may make last.ckpt a link to another file.
                files = [self._resumed, self._resumed.resolve()]
                parents = [*map(_folder_beside, files), Path(optimizer._loaded_reference.parent)]
                load_apart(optimizer, self.lightning_module, parents)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint's file, then its folder."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(_folder_beside(filepath), ignore_errors=True)


def _folder_beside(filepath: str | Path) -> Path:
    """Return the folder for the optimizer states of a checkpoint file.

    Raises:
        ValueError: the path is a URL.
    """
    if "://" in str(filepath):
        raise ValueError(
            f"OffloadAdamStrategy needs a path in a file system that all ranks share, not "
            f"{str(filepath)!r}."
        )
    return Path(f"{filepath}.optimizer").absolute()
