"""Save the state in a folder beside a tool's own file of the optimizer, and load it again.

    optimizer._given_reference = reference_to(optimizer, label, parent)
    the tool saves optimizer.state_dict(), which is the reference
    save_apart(optimizer, model, parent, label)      every rank writes its part of the state

    the tool calls optimizer.load_state_dict()       the optimizer keeps the reference
    load_apart(optimizer, model, [parent, ...])      every rank reads its part of the state

Every rank reads and writes only its own part of the state, and any world size can load it.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from offload_adam.checkpoint.commit import PARTIAL_SUFFIX
from offload_adam.checkpoint.load import load_optimizer_state
from offload_adam.checkpoint.save import save_optimizer_state
from offload_adam.coordinator.rank_checks import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import CheckpointError
from offload_adam.fsdp_private import is_dtensor
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.state_dict import StateReference

_PREFIX = "offload_adam-"
# With the step in a Trainer, and with more if the save was killed.
_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{32}}(-\d+)?(\..+{re.escape(PARTIAL_SUFFIX)})?")


def is_sharded(optimizer: ShardedOptimizer) -> bool:
    """Return whether FSDP2 or tensor parallelism has sharded parameters of the optimizer.

    Their state consists of DTensors, which the tools save and load completely themselves.
    """
    return any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"])


def new_label(ranks: RankGroup) -> str:
    """Return random text, the same on every rank. Collective."""
    return gather_texts(ranks, uuid.uuid4().hex)[0]


def folder_of(parent: Path, label: str) -> Path:
    """Return the folder of a saved state in its parent."""
    return parent / f"{_PREFIX}{label}"


def unwrapped(optimizer: object) -> object:
    """Return the optimizer in a tool's wrappers."""
    while not isinstance(optimizer, ShardedOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def reference_to(optimizer: ShardedOptimizer, label: str, parent: Path) -> StateReference:
    """Return the reference to a state that is saved in a folder of its own in `parent`."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    return StateReference(label, str(parent), sizes)


def save_apart(optimizer: ShardedOptimizer, model: nn.Module, parent: Path, label: str) -> None:
    """Save the state in a folder of its own in `parent`. Collective.

    Args:
        model: gives the parameters their names, which must not depend on the world size. So pass
            the model without its DDP wrapper.

    Raises:
        CheckpointError: as `save_optimizer_state`.
    """
    path = folder_of(parent, label)
    save_optimizer_state(path, model=model, optimizer=optimizer, label=label)


def load_apart(
    optimizer: ShardedOptimizer, model: nn.Module, parents: Sequence[Path], remedy: str = ""
) -> None:
    """Load the state of the reference that `load_state_dict` has loaded. Collective.

    Args:
        model: as in `save_apart`. It has been loaded already.
        parents: folders to search, in this order.
        remedy: what to try first if no folder has the state, for the error message.

    Raises:
        CheckpointError: on every rank. No folder has the state, or it cannot be loaded. The
            optimizer then rejects steps until another state is loaded.
    """
    reference = optimizer._loaded_reference
    assert reference is not None, "load_state_dict has loaded a reference"
    with raise_on_all_ranks(optimizer.ranks, "looking for the optimizer state"):
        folder = _find(reference.label, list(dict.fromkeys(parents)), remedy)
    load_optimizer_state(folder, model=model, optimizer=optimizer, label=reference.label)


def _find(label: str, parents: Sequence[Path], remedy: str) -> Path:
    for parent in parents:
        folder = folder_of(parent, label)
        if folder.is_dir():
            return folder
    others = sorted(str(path) for parent in parents for path in parent.glob(f"{_PREFIX}*"))
    hint = f" These folders hold the state of other saves: {', '.join(others)}." if others else ""
    copy = f"{remedy} Otherwise copy" if remedy else "Copy"
    raise CheckpointError(
        f"The optimizer state is in a folder named {_PREFIX}{label}, which is in none of "
        f"{', '.join(map(str, parents))}.{hint} {copy} a checkpoint with all of its folders, and "
        "resume from the copy."
    )


def remove_others(parent: Path, kept: Collection[str]) -> None:
    """Remove the states of earlier saves from a folder, except those with the names `kept`."""
    for path in parent.glob(f"{_PREFIX}*"):
        # The parent may be any folder of the user, with other things whose names begin so.
        if _NAME.fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
