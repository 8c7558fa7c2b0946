"""`OffloadAdamCallback`: saves and loads the optimizer state of a transformers Trainer.

Trainer's order of events, and what the callback does:

    resume     load_state_dict(optimizer.pt)   the optimizer keeps the reference in this file
    train begin                                move pending states of a run that was interrupted
                                               load the state that the reference names
    step end   should_save is known            save the state in a folder for pending states
               evaluate, save the model, optimizer.pt = state_dict(), delete old checkpoints
    save                                       move the state into the new checkpoint

The state is complete before Trainer deletes an older checkpoint, so a crash at any time leaves one
to resume from. Only with save_strategy="best" is it written afterwards.
"""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.errors import CheckpointError
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

with explain_missing("transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# In output_dir. Trainer does not upload names that begin with an underscore to the Hub.
_PENDING = "_offload_adam_pending"


class OffloadAdamCallback(TrainerCallback):
    """Save and load the complete optimizer state with each checkpoint of a Trainer.

        trainer = Trainer(..., optimizer_cls_and_kwargs=(OffloadAdamW, {"lr": 1e-4}),
                          callbacks=[OffloadAdamCallback()])
        trainer.train(resume_from_checkpoint=True)

    Each rank writes and reads its own part of the state. The number of ranks may change between
    save and resume. `output_dir` must be on a file system that all ranks share. With FSDP2 the
    callback has no effect, because Trainer then saves and loads the complete state itself.

    Args:
        checkpoint: the checkpoint to resume from. Needed only if a checkpoint was moved and
            `args.resume_from_checkpoint` is not set, because Trainer does not tell callbacks
            which checkpoint it resumes from.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._checkpoint = None if checkpoint is None else Path(checkpoint).absolute()
        self._run = ""  # begins the labels of all states of one `train()`
        self._saved: str | None = None  # label of the state that was saved last
        self._has_effect = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Load the state if Trainer resumes. Warn of arguments that the optimizer does not use.

        Raises:
            TypeError: Trainer has another optimizer.
            ValueError: in a hyperparameter search.
            CheckpointError: the state is not found, or cannot be loaded.
        """
        optimizer = _optimizer_of(given)
        if state.is_hyper_param_search:
            raise ValueError(
                "OffloadAdamCallback does not support hyperparameter_search, in which Trainer does "
                "not tell callbacks where it saves. Search without this callback, with "
                "save_strategy='no'."
            )
        if optimizer.ranks.rank == 0 and state.global_step == 0:
            _warn_of_unused(args, optimizer)
        self._has_effect = not is_sharded(optimizer)
        if not self._has_effect:
            return
        self._run = new_label(optimizer.ranks)
        reference = optimizer._loaded_reference
        label = None if reference is None else reference.label
        _settle(optimizer, Path(args.output_dir).absolute(), label)
        if reference is None:
            return
        given_paths = [self._checkpoint, args.resume_from_checkpoint]
        saved = Path(reference.parent)
        parents = [
            *(Path(str(path)).absolute() for path in given_paths if path),
            _checkpoint_folder(args, state),
            saved,
            saved.parent / _PENDING,  # of a run that was interrupted, in another output_dir
        ]
        remedy = (
            "If the checkpoint was moved or renamed, pass its path to the callback: "
            "OffloadAdamCallback(checkpoint=path)."
        )
        load_apart(optimizer, given["model"], parents, remedy)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Save the state if a save follows."""
        self._prepare(args, state, control, given)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Save the state if a save follows."""
        self._prepare(args, state, control, given)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Move the state into the new checkpoint."""
        optimizer = _optimizer_of(given)
        optimizer._given_reference = None  # on ranks that have not saved it
        if args.save_only_model or not self._has_effect:
            return
        label, checkpoint = self._label(state), _checkpoint_folder(args, state)
        self._save(optimizer, given["model"], args, label)
        _move(optimizer, folder_of(Path(args.output_dir) / _PENDING, label), checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Let `state_dict()` return the state again."""
        _optimizer_of(given)._given_reference = None

    def _prepare(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        given: dict[str, Any],
    ) -> None:
        """Give Trainer a reference to save. Save the state if it is known that Trainer will."""
        optimizer, label = _optimizer_of(given), self._label(state)
        if not self._has_effect:
            return
        optimizer._given_reference = reference_to(optimizer, label, _checkpoint_folder(args, state))
        if control.should_save or control.should_evaluate or control.should_training_stop:
            # Trainer reads the parameters next, partly on rank 0 alone: updates must be over.
            optimizer.synchronize()
        if control.should_save and not args.save_only_model:
            self._save(optimizer, given["model"], args, label)

    def _save(
        self, optimizer: ShardedOptimizer, model: nn.Module, args: TrainingArguments, label: str
    ) -> None:
        """Save the state in the folder for pending states, once for each label. Collective."""
        # If the last step of an epoch saves, the epoch's end saves the same state again.
        if self._saved != label:
            save_apart(optimizer, model, Path(args.output_dir) / _PENDING, label)
            self._saved = label

    def _label(self, state: TrainerState) -> str:
        # The same on all ranks without a collective, because it is needed after every step.
        return f"{self._run}-{state.global_step}"


def _warn_of_unused(args: TrainingArguments, optimizer: ShardedOptimizer) -> None:
    """Warn of hyperparameters in `args` that no parameter group has.

    Trainer passes only the dict of `optimizer_cls_and_kwargs` to the optimizer. After a resume
    there is nothing to compare, because the groups have the values of the checkpoint.
    """
    defaults = {field.name: field.default for field in fields(args)}  # also those of a subclass
    groups = optimizer.param_groups
    used = {
        # A scheduler has already changed "lr", and keeps the first one.
        "learning_rate": [group.get("initial_lr", group["lr"]) for group in groups],
        "adam_beta1": [group["betas"][0] for group in groups],
        "adam_beta2": [group["betas"][1] for group in groups],
        "adam_epsilon": [group["eps"] for group in groups],
    }
    unused = [
        f"{name}={wanted!r} (the optimizer has {', '.join(dict.fromkeys(map(str, found)))})"
        for name, found in used.items()
        if (wanted := getattr(args, name)) != defaults[name]
        # A group may have a value of its own, and tensors may round them.
        and not any(math.isclose(value, wanted, rel_tol=1e-6) for value in found)
    ]
    if unused:
        logger.warning(
            "The optimizer does not use %s of TrainingArguments. Put lr, betas and eps into the "
            "dict of optimizer_cls_and_kwargs, such as (OffloadAdamW, {'lr': %s, 'betas': (%s, "
            "%s), 'eps': %s}).",
            ", ".join(unused),
            *(args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon),
        )


def _move(optimizer: ShardedOptimizer, folder: Path, checkpoint: Path) -> None:
    """Move a pending state into its checkpoint. Collective.

    Raises:
        CheckpointError: Trainer has not written the checkpoint.
    """
    with raise_on_all_ranks(optimizer.ranks, "moving the optimizer state"):
        if optimizer.ranks.rank == 0:
            if not checkpoint.is_dir():
                raise CheckpointError(
                    f"Trainer has not written {checkpoint}, into which {folder} belongs. Save "
                    "checkpoints in output_dir."
                )
            if folder.exists():  # otherwise it has been moved already
                folder.rename(checkpoint / folder.name)
            remove_others(checkpoint, [folder.name])  # of an earlier run into the same checkpoint
            run, _, _ = folder.name.rpartition("-")
            for unused in folder.parent.glob(f"{run}-*"):  # another callback cancelled the save
                shutil.rmtree(unused, ignore_errors=True)
            with suppress(OSError):  # not empty: see `_settle`
                folder.parent.rmdir()


def _settle(optimizer: ShardedOptimizer, output: Path, label: str | None) -> None:
    """Move what an interrupted run left pending into its checkpoints. Collective.

    The run may have ended after Trainer wrote a checkpoint that needs a pending state. If there is
    no checkpoint of this step, nothing needs the state, and it is removed.

    Args:
        label: of the state to load, which is kept: its checkpoint may have been renamed.
    """
    with raise_on_all_ranks(optimizer.ranks, "moving the optimizer state"):
        if optimizer.ranks.rank == 0:
            for folder in (output / _PENDING).glob("*"):
                _, _, step = folder.name.rpartition("-")
                checkpoint = output / f"checkpoint-{step}"
                if checkpoint.is_dir():
                    # optimizer.pt there may still refer to another state: keep both.
                    folder.rename(checkpoint / folder.name)
                elif label is None or folder != folder_of(output / _PENDING, label):
                    shutil.rmtree(folder, ignore_errors=True)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir).absolute() / f"checkpoint-{state.global_step}"


def _optimizer_of(given: dict[str, Any]) -> ShardedOptimizer:
    """Return Trainer's optimizer.

    Raises:
        TypeError: it is not one of this package.
    """
    optimizer = unwrapped(given["optimizer"])
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(
            "OffloadAdamCallback needs an OffloadAdam or OffloadAdamW, but Trainer has the "
            f"optimizer {type(optimizer).__name__}. Pass optimizer_cls_and_kwargs="
            "(OffloadAdamW, {...}) or optimizers=(optimizer, None) to Trainer, or leave the "
            "callback out."
        )
    return optimizer
