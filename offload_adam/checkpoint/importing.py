"""A checkpoint from a file that torch has pickled, of a plain model and a plain AdamW."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload_adam.checkpoint.content import Part, whole_part
from offload_adam.checkpoint.encoding import encode
from offload_adam.checkpoint.manifest import GroupEntry, OptimizerEntry
from offload_adam.checkpoint.partial import discard, partial_name, remove_abandoned
from offload_adam.checkpoint.rank_file import RankFile, rank_file_name
from offload_adam.checkpoint.save import Written, commit_files, manifest_of
from offload_adam.errors import CheckpointError

_PLANES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_NO_OPTIONS = ("params", "param_names", "foreach", "capturable", "differentiable", "fused")
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class TorchCheckpoint:
    """A model's state dict, and that of a `torch.optim.Adam` or `AdamW` over its parameters.

    values: entries of the model's that are no tensors.
    """

    model: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def import_torch_pickle(
    source: Path,
    target: Path,
    *,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    names: Sequence[str] | None = None,
) -> int:
    """Make a checkpoint of a file of `torch.save({"model": ..., "optimizer": ...})`.

    torch unpickles it with `weights_only=True`: tensors and plain values, no code of the file's.
    The state becomes float32, as it is here: fp32 is kept, bf16 and fp16 are widened, which is
    exact, and 16-bit weights become their own master weights.

    Args:
        names: of the optimizer's parameters in its order; None to take them from the file, where
            the optimizer was made of named parameters, or the model has no other tensors.

    Returns:
        The bytes of the tensors.

    Raises:
        CheckpointError: it is something else, or needs more than plain values to be unpickled;
            `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: a checkpoint is never written over")
    content = read_torch_pickle(source, model_key, optimizer_key)
    tied = _tied(content.model)
    own = {name: value for name, value in content.model.items() if name not in tied}
    entry, state = _optimizer_state(content.optimizer, own, names)
    tensors = {f"model/{name}": value for name, value in own.items()} | state
    parts = [whole_part(name, value) for name, value in tensors.items()]
    step = int(max(entry.steps.values(), default=0))
    aliases = {f"model/{name}": f"model/{first}" for name, first in tied.items()}
    values = {f"model/{name}": encode(value, name) for name, value in content.values.items()}
    _write(target, parts, Written(step, entry, aliases, values, {}))
    return sum(part.data.nbytes for part in parts)


def read_torch_pickle(source: Path, model_key: str, optimizer_key: str) -> TorchCheckpoint:
    """Load a file and find both state dicts in it.

    Raises:
        CheckpointError: as `import_torch_pickle`.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be opened: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{source} is no file of tensors and plain values: {first}. What would run code of the "
            "file's is not loaded: save the two state dicts alone, where you trust the file"
        ) from error
    for key in (model_key, optimizer_key):
        if not isinstance(content, dict) or not isinstance(content.get(key), Mapping):
            has = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(
                f"{source} has no state dict under {key!r}, but {has}: say which with --model-key "
                "and --optimizer-key"
            )
    model, optimizer = content[model_key], content[optimizer_key]
    if not {"state", "param_groups"} <= set(optimizer):
        raise CheckpointError(f"{optimizer_key!r} of {source} is no optimizer's state dict")
    tensors = {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in model.items() if name not in tensors}
    return TorchCheckpoint(tensors, values, optimizer)


def _tied(model: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return each further name of a tensor that stands under several, with the first one."""
    seen: dict[Any, str] = {}
    tied = {}
    for name, value in model.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in seen:
            tied[name] = seen[place]
        seen.setdefault(place, name)
    return tied


def _optimizer_state(
    optimizer: Mapping[str, Any], model: Mapping[str, torch.Tensor], given: Sequence[str] | None
) -> tuple[OptimizerEntry, dict[str, torch.Tensor]]:
    """Return what of the optimizer is no tensor, and its tensors by their names here."""
    try:
        groups = list(optimizer["param_groups"])
        ids = [packed for group in groups for packed in group["params"]]
        names = dict(zip(ids, given or _names(groups, len(ids), model), strict=True))
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, float] = {}
        entries = []
        for group in groups:
            _require_options(group)
            options = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
            own = [names[packed] for packed in group["params"]]
            entries.append(GroupEntry(parameters=own, options=encode(options, "optimizer")))
            for packed, name in zip(group["params"], own, strict=True):
                saved = optimizer["state"].get(packed, {})
                steps[name] = float(saved.get("step", 0.0))
                tensors |= _planes(name, model[name], saved, amsgrad=bool(group["amsgrad"]))
        return OptimizerEntry(groups=entries, steps=steps, further={}), tensors
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(f"not a state of torch's Adam or AdamW: {error!r}") from error


def _names(
    groups: Sequence[Mapping[str, Any]], count: int, model: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return the names of the optimizer's parameters in its order."""
    if all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]]
    if len(model) == count and len(groups) == 1:
        return list(model)
    raise CheckpointError(
        f"the optimizer has {count} parameters in {len(groups)} group(s) without names, and the "
        f"model {len(model)} tensors: give --names, a file with the name of one parameter a line, "
        "in the optimizer's order"
    )


def _require_options(group: Mapping[str, Any]) -> None:
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        if key not in group:
            raise CheckpointError(f"a group has no {key!r}: it is none of torch's Adam or AdamW")


def _planes(
    name: str, weight: torch.Tensor, saved: Mapping[str, torch.Tensor], *, amsgrad: bool
) -> dict[str, torch.Tensor]:
    """Return one parameter's state, float32; what torch has not made yet is zero."""
    planes = {}
    for key in _PLANES if amsgrad else _PLANES[:2]:
        value = saved.get(key)
        if value is None:
            value = torch.zeros_like(weight, dtype=torch.float32)
        if value.shape != weight.shape or value.dtype not in _WIDENED:
            raise CheckpointError(
                f"{key} of {name!r} is {value.dtype} of shape {list(value.shape)}, and the weight "
                f"has shape {list(weight.shape)}: the state must be floats of that shape"
            )
        planes[key] = value
    if weight.dtype != torch.float32:
        planes["master_weight"] = weight
    return {f"optimizer/{name}/{key}": value.float() for key, value in planes.items()}


def _write(target: Path, parts: Sequence[Part], plain: Written) -> None:
    remove_abandoned(target)
    unfinished = target.with_name(partial_name(target.name))
    unfinished.mkdir(parents=True)
    try:
        file = RankFile(unfinished, rank_file_name(0, 1), parts)
        file.write(parts)
        commit_files(unfinished, target, manifest_of([file.finish()], plain))
    except BaseException:
        discard(unfinished)
        raise
