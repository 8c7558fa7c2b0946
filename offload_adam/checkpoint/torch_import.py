"""Makes a checkpoint of a file in which `torch.save` stored a model and its Adam or AdamW."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offload_adam.checkpoint.commit import commit_files, partial_output
from offload_adam.checkpoint.dtypes import saveable
from offload_adam.checkpoint.encoding import encode
from offload_adam.checkpoint.format import FORMAT_VERSION, GroupEntry, Manifest, OptimizerEntry
from offload_adam.checkpoint.optimizer_access import NOT_OPTIONS
from offload_adam.checkpoint.rank_file import RankFile, rank_file_name
from offload_adam.checkpoint.save import manifest_of, memory_key, whole_part
from offload_adam.errors import CheckpointError

_PLANES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_PASS_NAMES = "Pass --names FILE, with one parameter name per line in the optimizer's order."
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_EXACT_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def import_torch_pickle(
    source: Path,
    target: Path,
    *,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    names: Sequence[str] | None = None,
) -> int:
    """Make a checkpoint of a file that `torch.save({"model": ..., "optimizer": ...})` wrote.

    The file is loaded with `weights_only=True`, so no code in it runs. State in bf16 or fp16 is
    converted to float32, which is exact. 16-bit weights also become the master weights.

    Args:
        model_key, optimizer_key: keys of the two state dicts in the file.
        names: names of the optimizer's parameters, in its order. None to read them from the file,
            if the optimizer was constructed with named parameters, or to use those of the model's
            tensors, if there is one group and no other tensor.

    Returns:
        Size of the tensors in bytes.

    Raises:
        CheckpointError: the file is not such a file, holds more than tensors and plain values, or
            `target` exists.
    """
    with partial_output(target) as folder:
        model, optimizer = _read_torch_pickle(source, model_key, optimizer_key)
        model_tensors = {name: v for name, v in model.items() if isinstance(v, torch.Tensor)}
        # A checkpoint stores a tied tensor only once, under its first name.
        tied = _tied(model_tensors)
        own = {name: value for name, value in model_tensors.items() if name not in tied}
        entry, state = _optimizer_state(optimizer, own, names)
        tensors = {f"model/{name}": value for name, value in own.items()} | state
        parts = [whole_part(name, saveable(name, value)) for name, value in tensors.items()]
        plain = Manifest(
            format_version=FORMAT_VERSION,
            step=int(max(entry.steps.values(), default=0)),
            world_size=1,
            tensors={},
            files={},
            optimizer=entry,
            tied={f"model/{name}": f"model/{first}" for name, first in tied.items()},
            values={
                f"model/{name}": encode(value, name)
                for name, value in model.items()
                if name not in model_tensors
            },
            extra={},
        )
        folder.mkdir(parents=True)
        file = RankFile(folder, rank_file_name(0, 1), parts)
        file.write(parts)
        commit_files(folder, target, manifest_of([file.finish()], plain))
    return sum(part.data.nbytes for part in parts)


def _read_torch_pickle(
    source: Path, model_key: str, optimizer_key: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Load a file, and return the state dicts of the model and of the optimizer.

    Raises:
        CheckpointError: as `import_torch_pickle`.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be opened: {error.strerror}. Pass a file that torch.save wrote."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # torch puts its reason after several lines of advice, some of it to run the file's code.
        # A KeyError, from bytes that are no pickle, has only a number.
        text = "it is damaged" if isinstance(error, KeyError) else str(error)
        reason = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"{source} holds more than tensors and plain values, or was not written by torch.save: "
            f"{reason.rstrip('.')}. Code in a file is not run: save only the two state dicts."
        ) from error
    for key in (model_key, optimizer_key):
        if not isinstance(content, dict) or not isinstance(content.get(key), Mapping):
            has = f"a {type(content).__name__}"
            if isinstance(content, dict):
                has = f"the keys {', '.join(sorted(map(repr, content)))}"
            raise CheckpointError(
                f"{source} has no state dict under {key!r}: it holds {has}. Name the keys with "
                "--model-key and --optimizer-key."
            )
    model, optimizer = content[model_key], content[optimizer_key]
    if not {"state", "param_groups"} <= set(optimizer):
        raise CheckpointError(
            f"{optimizer_key!r} of {source} is not the state dict of an optimizer. Name with "
            "--optimizer-key the key of a dict that has 'state' and 'param_groups'."
        )
    return model, optimizer


def _tied(model: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the other names of tied tensors, each with the first name."""
    seen: dict[Any, str] = {}
    tied = {}
    for name, value in model.items():
        place = memory_key(value)
        if place in seen:
            tied[name] = seen[place]
        elif place is not None:
            seen[place] = name
    return tied


def _optimizer_state(
    optimizer: Mapping[str, Any], model: Mapping[str, torch.Tensor], given: Sequence[str] | None
) -> tuple[OptimizerEntry, dict[str, torch.Tensor]]:
    """Return the optimizer's entry in the manifest, and its tensors by their saved names."""
    try:
        groups = list(optimizer["param_groups"])
        ids = [packed for group in groups for packed in group["params"]]
        names = dict(zip(ids, _names(groups, len(ids), model, given), strict=True))
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, float] = {}
        entries = []
        for group in groups:
            _require_options(group)
            options = {key: value for key, value in group.items() if key not in NOT_OPTIONS}
            own = [names[packed] for packed in group["params"]]
            entries.append(GroupEntry(parameters=own, options=encode(options, "optimizer")))
            for packed, name in zip(group["params"], own, strict=True):
                saved = optimizer["state"].get(packed, {})
                if not saved and model[name].dtype not in _EXACT_IN_FLOAT32:
                    continue  # frozen: integers, for example, have no gradients
                steps[name] = float(saved.get("step", 0.0))
                tensors |= _planes(name, model[name], saved, amsgrad=bool(group["amsgrad"]))
        return OptimizerEntry(groups=entries, steps=steps, further={}), tensors
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(
            "The file has no valid state of torch's Adam or AdamW "
            f"({type(error).__name__}: {str(error).rstrip('.')}). Save optimizer.state_dict() anew."
        ) from error


def _names(
    groups: Sequence[Mapping[str, Any]],
    count: int,
    model: Mapping[str, torch.Tensor],
    given: Sequence[str] | None,
) -> Sequence[str]:
    """Return the names of the optimizer's `count` parameters in its order: `given`, if not empty.

    Raises:
        CheckpointError: the names are unknown, not `count`, or not those of the model's tensors.
    """
    if given:
        names = given
    elif all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    elif len(model) == count and len(groups) == 1:
        return list(model)
    else:
        raise CheckpointError(
            f"The optimizer has {count} parameters without names in {len(groups)} group(s), and "
            f"the model has {len(model)} tensors. {_PASS_NAMES}"
        )
    num_different = len({*names})
    if not num_different == len(names) == count:
        raise CheckpointError(
            f"There are {len(names)} names, {num_different} of them different, for the optimizer's "
            f"{count} parameters. {_PASS_NAMES}"
        )
    for name in names:
        if name not in model:
            raise CheckpointError(
                f"{name!r} is named as a parameter of the optimizer, but the model has no such "
                f"tensor, or has it under an earlier name to which it is tied. {_PASS_NAMES}"
            )
    return names


def _require_options(group: Mapping[str, Any]) -> None:
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        if key not in group:
            raise CheckpointError(
                f"A parameter group has no {key!r}. Import a file of torch's Adam or AdamW."
            )


def _planes(
    name: str, weight: torch.Tensor, saved: Mapping[str, torch.Tensor], *, amsgrad: bool
) -> dict[str, torch.Tensor]:
    """Return the state of one parameter in float32: zeros if torch has not created it yet."""
    planes = {}
    for key in _PLANES if amsgrad else _PLANES[:2]:
        value = saved.get(key)
        if value is None:
            value = torch.zeros_like(weight, dtype=torch.float32)
        if value.shape != weight.shape or value.dtype not in _EXACT_IN_FLOAT32:
            raise CheckpointError(
                f"{key} of {name!r} is {value.dtype} of shape {list(value.shape)}, but must be "
                f"float32, bfloat16 or float16 of the weight's shape {list(weight.shape)}. Save "
                "model and optimizer of the same run."
            )
        planes[key] = value
    if weight.dtype != torch.float32:
        planes["master_weight"] = weight
    return {f"optimizer/{name}/{key}": value.float() for key, value in planes.items()}
