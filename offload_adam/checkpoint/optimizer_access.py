"""What checkpoints need of an optimizer: its lock, its parameters' names, and its plain state.

The plain state is all state except tensors. The callers hold `locked(optimizer)` while they use the
core that `_settled_on_all_ranks` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from offload_adam.checkpoint.format import LOAD_ANOTHER
from offload_adam.errors import CheckpointError
from offload_adam.options import CODED_FORMATS
from offload_adam.params.groups import FIXED_OPTIONS, LOCAL_OPTIONS
from offload_adam.printable import show
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.load_plan import check_scale, check_step_count
from offload_adam.state.state_shard import shards_of
from offload_adam.step.step import ShardedAdam

SAME_MODEL = "Construct the model and the optimizer as they were when they were saved."
"""What to do about a checkpoint of another model or optimizer, for error messages."""


def check_optimizer(optimizer: object) -> None:
    """Check that checkpoints support this optimizer.

    Raises:
        TypeError: the optimizer is not one of this package.
    """
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(
            f"Checkpoints do not support the optimizer {type(optimizer).__qualname__}. Pass an "
            "OffloadAdam, OffloadAdamW or offload_adam.Adam. To convert a file with the state of "
            "torch.optim.AdamW, use `offload-adam checkpoint import`."
        )


def locked(optimizer: ShardedOptimizer) -> AbstractContextManager[object]:
    """Check the optimizer, and return its lock.

    While a thread holds the lock, other threads that call a method of the optimizer wait.

    Raises:
        TypeError: the optimizer is not one of this package.
    """
    check_optimizer(optimizer)
    return optimizer._lock


class ParameterNames:
    """The names of a model's parameters. A tied parameter has its first name."""

    def __init__(self, model: nn.Module, core: ShardedAdam) -> None:
        core.reshard()  # a module that FSDP2 has gathered shows other parameters
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __call__(self, parameter: torch.Tensor) -> str:
        """Return the model's name of a parameter that the optimizer trains.

        Raises:
            CheckpointError: the model does not have this parameter.
        """
        name = self._names.get(id(parameter))
        if name is None:
            raise CheckpointError(
                f"The optimizer has a parameter of shape {tuple(parameter.shape)} that the model "
                "does not have. Pass the model that the optimizer trains."
            )
        return name


def plain_state(
    optimizer: ShardedOptimizer, core: ShardedAdam, name_of: ParameterNames
) -> dict[str, Any]:
    """Return the fields of `format.OptimizerEntry`, not encoded yet.

    The caller holds the optimizer's lock.

    Raises:
        CheckpointError: see `_check_state_is_read` and `reject_distinct`.
    """
    optimizer._check_state_is_read()
    core.reject_distinct(name_of)
    groups = [
        {
            "parameters": [name_of(parameter) for parameter in group["params"]],
            "options": {k: value for k, value in group.items() if k not in LOCAL_OPTIONS},
        }
        for group in optimizer.param_groups
    ]
    steps, formats, scales = {}, {}, {}
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        steps[name] = float(shard.step)
        if shard.state_format != "fp32":
            formats[name] = shard.state_format
        if shard.scale is not None:
            scales[name] = float(shard.scale)
    further = optimizer._further_state()
    # Earlier versions reject these keys, so they are omitted if all state is fp32.
    low = {key: value for key, value in (("formats", formats), ("scales", scales)) if value}
    return {"groups": groups, "steps": steps, "further": further, **low}


def plan_plain_state(
    optimizer: ShardedOptimizer,
    core: ShardedAdam,
    saved: Mapping[str, Any],
    name_of: ParameterNames,
) -> Callable[[], None]:
    """Check the saved result of `plain_state`, and return a function that loads it.

    All checks run here, so the returned function cannot fail halfway. The caller holds the
    optimizer's lock until it has called this function.

    Raises:
        CheckpointError: parameter groups, their parameters or their fixed options differ from those
            of this optimizer, or this optimizer rejects a saved value; or see `reject_distinct`.
    """
    core.reject_distinct(name_of)
    try:
        return _plan(optimizer, core, saved, name_of)
    except (TypeError, ValueError) as error:
        # Some of these messages are fragments, others are sentences with a full stop.
        reason = str(error).removesuffix(".")
        raise CheckpointError(
            f"The checkpoint does not match this optimizer: {reason}. {SAME_MODEL}"
        ) from error
    except (AttributeError, KeyError) as error:
        raise CheckpointError(
            f"The saved state of the optimizer is invalid ({type(error).__name__}: {error}). "
            f"{LOAD_ANOTHER}"
        ) from error


def _plan(
    optimizer: ShardedOptimizer,
    core: ShardedAdam,
    saved: Mapping[str, Any],
    name_of: ParameterNames,
) -> Callable[[], None]:
    groups = optimizer.param_groups
    if len(saved["groups"]) != len(groups):
        raise ValueError(
            f"it was saved with {len(saved['groups'])} parameter group(s), but this optimizer has "
            f"{len(groups)}"
        )
    shards = {name_of(shard.parameter): shard for shard in shards_of(core.states)}
    # A parameter without an update has no state to lose, so it may be frozen here. `import` cannot
    # know whether such a parameter was frozen.
    steps = {name: count for name, count in saved["steps"].items() if count or name in shards}
    _check_names("among the trained parameters", steps, shards)
    for name, count in steps.items():
        check_step_count(f"the step count of {name!r}", count)
    for number, (group, entry) in enumerate(zip(groups, saved["groups"], strict=True)):
        names = {name_of(parameter) for parameter in group["params"]}
        _check_names(f"in group {number}", entry["parameters"], names)
        options = _options_of(entry)
        for key in FIXED_OPTIONS:
            was, now = options.get(key, False), group.get(key, False)
            if was is not now:  # both are bools; a tensor in a damaged file does not compare as one
                raise ValueError(
                    f"group {number} was saved with {key}={show(was)}, but has {key}={now} in this "
                    "optimizer"
                )
        # Check all options together: one may be valid only with the saved values of others.
        optimizer._check_group({**group, **options})
    scales = {
        name: _scale_of(name, saved) for name, shard in shards.items() if shard.scale is not None
    }
    entries = {
        optimizer._index_of[shard.parameter]: {"step": steps[name]}
        for name, shard in shards.items()
    }
    load_further = optimizer._plan_further_state(saved["further"], entries)

    def load() -> None:
        for name, shard in shards.items():
            shard.step.fill_(steps[name])
            if shard.scale is not None:
                shard.scale.fill_(scales[name])
        load_further()
        for group, entry in zip(groups, saved["groups"], strict=True):
            # AdamGroup.update would reject the saved values of a dynamic lr or weight decay.
            dict.update(group, _options_of(entry))
        optimizer._loaded_reference = None  # this state replaces what the reference stands for

    return load


def _scale_of(name: str, saved: Mapping[str, Any]) -> float:
    """Return the scale of a parameter's second moment, which is loaded into codes."""
    if saved.get("formats", {}).get(name) in CODED_FORMATS:
        return check_scale(f"the scale of {name!r}", saved["scales"][name])
    return 1.0 if saved["steps"].get(name) else 0.0


def _options_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved group.

    Keys such as `params`, which only a damaged checkpoint has here, are left out.
    """
    return {key: value for key, value in entry["options"].items() if key not in LOCAL_OPTIONS}


def _check_names(where: str, saved: Iterable[str], here: Collection[str]) -> None:
    """Check that the saved names are those of this optimizer, in any order."""
    for name in sorted({*saved} ^ {*here}):
        if name in here:
            raise ValueError(f"this optimizer has {name!r} {where}, but the checkpoint does not")
        raise ValueError(f"the checkpoint has {name!r} {where}, but this optimizer does not")
