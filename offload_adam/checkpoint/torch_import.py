"""Makes a checkpoint of a file in which `torch.save` stored a model and its Adam or AdamW."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from offload_adam.checkpoint.commit import commit_files, partial_output
from offload_adam.checkpoint.format import FORMAT_VERSION, GroupEntry, Manifest, OptimizerEntry
from offload_adam.checkpoint.rank_file import RankFile, rank_file_name
from offload_adam.checkpoint.save import manifest_of, memory_key, whole_part
from offload_adam.dtypes import saveable
from offload_adam.encoding import check_size, encode
from offload_adam.errors import CheckpointError
from offload_adam.params.groups import LOCAL_OPTIONS, check_group
from offload_adam.printable import show

_PLANES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_PASS_NAMES = "Pass --names FILE, with one parameter name per line in the optimizer's order."
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_ZIP_MAGIC = b"PK\x03\x04"  # by which torch.load recognises a zip file
_DEFAULTS = {"nesterov": False, "maximize": False, "decoupled_weight_decay": False}
# Bytes of weights that a file of torch may stand for: tensors may be views of the same memory.
_MAX_GROWTH = 4  # per byte of the file
_MIN_GROWTH_NBYTES = 64 * 1024 * 1024  # for expanded buffers such as masks
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
            a value that `load_checkpoint` would reject; or `target` exists.

    Cost: time and memory in proportion to the file, whatever it holds.
    """
    with partial_output(target) as folder:
        model, optimizer = _read_torch_pickle(source, model_key, optimizer_key)
        model_tensors = _model_tensors(
            model, _MIN_GROWTH_NBYTES + _MAX_GROWTH * source.stat().st_size
        )
        # A checkpoint stores a tied tensor only once, under its first name.
        tied = _tied(model_tensors)
        own = {name: value for name, value in model_tensors.items() if name not in tied}
        values = {name: value for name, value in model.items() if name not in model_tensors}
        check_size(values, "the state dict of the model")  # together, as one may be in all
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
            values={f"model/{name}": encode(value, name) for name, value in values.items()},
            extra={},
        )
        folder.mkdir()
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
    if source.exists() and not source.is_file():
        raise CheckpointError(f"{source} is not a regular file. Pass a file that torch.save wrote.")
    try:
        _require_stored(source)
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be opened: {error.strerror}. Pass a file that torch.save wrote."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch does not document its errors: damaged bytes raise any type
        # torch puts its reason after several lines of advice, some of it to run the file's code.
        explained = isinstance(error, (pickle.UnpicklingError, RuntimeError, EOFError, ValueError))
        text = str(error) if explained else f"it is damaged ({type(error).__name__})"
        reason = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        if source.stat().st_size == 0:
            reason = "it is empty"
        raise CheckpointError(
            f"{source} holds more than tensors and plain values, or was not written by torch.save: "
            f"{reason.rstrip('.')}. Code in a file is not run: save only the two state dicts."
        ) from error
    for key in (model_key, optimizer_key):
        if not isinstance(content, dict) or not isinstance(content.get(key), Mapping):
            has = f"a {type(content).__name__}"
            if isinstance(content, dict):
                has = f"the keys {', '.join(sorted(map(show, islice(content, 20))))}"
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


def _require_stored(source: Path) -> None:
    """Check that no part of a zip file is compressed: a few bytes could stand for many gigabytes.

    Raises:
        CheckpointError: the parts together are larger than the file, since torch.save compresses
            nothing, or the zip file is damaged.
    """
    with source.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return  # an earlier format of torch
    try:
        with zipfile.ZipFile(source) as archive:
            nbytes = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        # torch may read it nevertheless, so it could hold compressed parts.
        raise CheckpointError(f"{source} is damaged ({error}). Save it anew.") from error
    if nbytes > source.stat().st_size:
        raise CheckpointError(
            f"{source} holds compressed parts, which torch.save does not write: {nbytes:,} bytes "
            "in a smaller file. Load it in a place that you trust, and save it anew."
        )


def _model_tensors(model: Mapping[Any, Any], limit: int) -> dict[str, torch.Tensor]:
    """Return the tensors in a model's state dict.

    Args:
        limit: bytes of all tensors together. Tensors of a file may be views of the same memory, so
            that copies of them could take far more than the file.

    Raises:
        CheckpointError: a name is not text, a checkpoint cannot hold a tensor, or they are larger.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[Any] = set()
    nbytes = 0
    for name, value in model.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"The model's state dict has the key {show(name)}, which is not text. Save "
                "model.state_dict() of a torch.nn.Module."
            )
        if not isinstance(value, torch.Tensor):
            continue
        tensor = found[name] = saveable(name, value)
        place = memory_key(tensor)
        if place not in seen:
            nbytes += tensor.numel() * tensor.element_size()
        seen.add(place)
        if nbytes > limit:
            raise CheckpointError(
                f"{name!r} repeats elements, or is one of many views of the same memory: the "
                f"tensors up to it would take {nbytes:,} bytes. Save copies (tensor.clone()) of "
                "what belongs to the model."
            )
    return found


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
        check_size(optimizer["param_groups"], "param_groups")
        groups = list(optimizer["param_groups"])
        ids = [packed for group in groups for packed in group["params"]]
        if len({*ids}) < len(ids):
            raise ValueError("a parameter is in two places of param_groups")
        names = dict(zip(ids, _names(groups, len(ids), model, given), strict=True))
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, float] = {}
        entries = []
        for group in groups:
            options = _options(group)
            own = [names[packed] for packed in group["params"]]
            entries.append(GroupEntry(parameters=own, options=encode(options, "optimizer")))
            for packed, name in zip(group["params"], own, strict=True):
                saved = optimizer["state"].get(packed, {})
                if not saved and model[name].dtype not in _EXACT_IN_FLOAT32:
                    continue  # frozen: integers, for example, have no gradients
                _check_entry(name, saved, amsgrad=bool(group["amsgrad"]))
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


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group that a checkpoint has.

    Raises:
        CheckpointError: an option is missing, or `load_checkpoint` would reject its value.
    """
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        if key not in group:
            raise CheckpointError(
                f"A parameter group has no {key!r}. Import a file of torch's Adam or AdamW."
            )
    options = {key: value for key, value in group.items() if key not in LOCAL_OPTIONS}
    check_group({**_DEFAULTS, **options})
    return options


def _check_entry(name: str, saved: Mapping[str, Any], *, amsgrad: bool) -> None:
    """Check that the state of a parameter has the keys of Adam, all of them once it was updated."""
    planes = _PLANES if amsgrad else _PLANES[:2]
    unknown = [key for key in saved if key not in ("step", *_PLANES)]
    missing = [key for key in planes if key not in saved] if saved.get("step") else []
    if unknown or missing:
        raise CheckpointError(
            f"The state of {name!r} has {show(unknown[0]) if unknown else f'no {missing[0]!r}'}, "
            "unlike that of torch's Adam and AdamW. Import a file of one of these."
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
        value = saveable(f"{key} of {name!r}", value)
        if value.shape != weight.shape or value.dtype not in _EXACT_IN_FLOAT32:
            raise CheckpointError(
                f"{key} of {name!r} is {value.dtype} of shape {list(value.shape)}, but must be "
                f"float32, bfloat16 or float16 of the weight's shape {list(weight.shape)}. Save "
                "model and optimizer of the same run."
            )
        planes[key] = value
    if weight.dtype not in _EXACT_IN_FLOAT32:
        raise CheckpointError(
            f"{name!r} has dtype {weight.dtype} and state of Adam, but a float32 master weight "
            "holds only float32, bfloat16 and float16 exactly. Convert the model, and save it anew."
        )
    if weight.dtype != torch.float32:
        planes["master_weight"] = weight
    return {f"optimizer/{name}/{key}": value.float() for key, value in planes.items()}
