"""Loads a checkpoint into a model and an optimizer, in any world size.

load_checkpoint, load_optimizer_state
    read_manifest, _check       compare names, shapes, dtypes and groups; modify nothing
    _read_in_place              read every range directly into the state, file by file
    _convert                    read and convert state that was saved in another format
    _load_modules               call model.load_state_dict for entries that modules compute
    load_plain                  load groups, step counts and other values that are not tensors
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_adam.checkpoint.format import (
    LOAD_ANOTHER,
    Manifest,
    TensorEntry,
    decoded_optimizer,
    read_manifest,
)
from offload_adam.checkpoint.optimizer_access import (
    SAME_MODEL,
    ParameterNames,
    locked,
    plan_plain_state,
)
from offload_adam.checkpoint.reader import CheckpointReader, Read
from offload_adam.checkpoint.save import (
    WEIGHTS_PREFIX,
    ModelState,
    model_state,
    parameter_dtypes,
)
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.dtypes import (
    DTYPE_NAMES,
    copy_bits,
    equal_bits,
    is_lazy_view,
    saveable,
)
from offload_adam.encoding import encode
from offload_adam.errors import CheckpointError
from offload_adam.fsdp_private import local_of
from offload_adam.memory.codes import check_storable
from offload_adam.memory.planes import SCALED_KEY
from offload_adam.options import CODED_FORMATS
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.boxes import Box, boxes_of_part, inverse_order, memory_order, views_of
from offload_adam.state.load_plan import (
    OTHER_KEY,
    OTHER_MASTER_KEY,
    converted,
    copy_plane,
    log_rounded,
)
from offload_adam.state.state_dict import reject_other_format
from offload_adam.state.state_shard import ParameterShard, shards_of
from offload_adam.step.step import ShardedAdam

logger = logging.getLogger(__name__)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    convert: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint of `save_checkpoint`, saved in any world size and sharding. Collective.

    Names, shapes, dtypes and groups are compared before anything is modified. Nothing is cast,
    except that fp32 moments are rounded to nearest if the optimizer has state in low precision.
    Every block is verified and read directly into the state. Then `model.load_state_dict` runs with
    the tensors and with the entries that modules add to a state dict (`get_extra_state`, hooks).

    Args:
        path: a checkpoint, the same on every rank.
        model, optimizer: constructed with the names, shapes, dtypes and groups that were saved.
            Both are modified in place.
        convert: also load state in low precision into an optimizer with another format, which is
            otherwise an error.

    Returns:
        The saved `extra`, with its tensors on the host.

    Raises:
        CheckpointError: on every rank. If a file is damaged or cannot be read, or if the model's
            `load_state_dict` fails, the state is loaded only in part: load another checkpoint.
            After other errors nothing is modified.

    Cost: beyond the state, a rank needs 4 blocks of 4 MiB of host memory, one more if state is on a
        device, and a whole tensor if the order of its elements in memory has changed. 8-bit codes
        and state of another format need a few temporary copies of one parameter's plane. At most 8
        files are open at once.
    """
    return _load(Path(path), model, optimizer, label=None, convert=convert)


def load_optimizer_state(
    path: str | os.PathLike[str], *, model: nn.Module, optimizer: ShardedOptimizer, label: str
) -> None:
    """Load what `save_optimizer_state` saved, in any world size. Collective.

    Load the model first. A master weight that does not round to its parameter is replaced by the
    parameter's value.

    Args:
        path, model, optimizer: as in `load_checkpoint`. The model is not modified.
        label: that of the save.

    Raises:
        CheckpointError: as `load_checkpoint`; or the folder has another label.
    """
    _load(Path(path), model, optimizer, label=label, convert=False)


def _load(
    folder: Path,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    *,
    label: str | None,
    convert: bool,
) -> dict[str, Any]:
    """Load a checkpoint, or only the optimizer's state if `label` is given."""
    weights = label is None
    with locked(optimizer), PROGRESS.at("checkpoint", long_running=True), ExitStack() as stack:
        core = optimizer._settled_on_all_ranks("preparing to load a checkpoint")
        optimizer._take_unfrozen()
        # All checks come first, on all ranks: an error here has modified nothing on any rank.
        with raise_on_all_ranks(optimizer.ranks, "reading a checkpoint"):
            manifest = read_manifest(folder)
            reader = stack.enter_context(closing(CheckpointReader(folder, manifest)))
            name_of = ParameterNames(model, core)
            if weights:
                _require_weights(manifest, folder)
                state = model_state(model, core, optimizer.param_groups)
            else:
                _check_label(manifest, folder, label)
                state = ModelState()
            if not convert:
                _reject_other_formats(manifest, name_of, core, can_convert=weights)
            _check(manifest, name_of, core, state, weights=weights)
            plain = decoded_optimizer(manifest.optimizer.model_dump(), manifest.format_version)
            load_plain = plan_plain_state(optimizer, core, plain, name_of)
            _check_storable(reader, name_of, core)
        with raise_on_all_ranks(optimizer.ranks, "loading a checkpoint"), torch.no_grad():
            # A background checkpoint may still read the state that is overwritten here.
            core.external_edits.before_writing()
            core.external_edits.reject_replaced()
            _read_in_place(reader, name_of, core, state, weights=weights)
            if weights and _load_modules(reader, model, state):
                # A hook may return rounded copies of weights in the state dict, and load_state_dict
                # has then copied them over the weights.
                _read_in_place(reader, name_of, core, state, weights=True)
            _convert(reader, name_of, core)
            # Sync master weights with the loaded parameters, and record the version counters of
            # the parameters: the next step must not mistake the load for an edit by the user.
            core.external_edits.sync_all()
            # Last, so that an error above leaves groups and step counts as they are.
            load_plain()
            core.num_steps = manifest.step
    return manifest.decoded_extra()


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Verify the manifest and every byte of a checkpoint.

    Raises:
        CheckpointError: the manifest is invalid, or a file is missing, damaged or cannot be read.
            The message names the file and the damaged range of bytes.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    with closing(CheckpointReader(folder, manifest)) as reader:
        reader.verify()
    return manifest


def _require_weights(manifest: Manifest, folder: Path) -> None:
    """Check that a checkpoint was not saved by `save_optimizer_state`."""
    if not any(name.startswith(WEIGHTS_PREFIX) for name in manifest.tensors):
        raise CheckpointError(
            f"{folder} holds the state of the optimizer without the model. Resume with the tool "
            "that saved it, or pass a folder that save_checkpoint wrote."
        )


def _check_label(manifest: Manifest, folder: Path, label: str | None) -> None:
    """Check that `save_optimizer_state` saved this state, with this label."""
    saved = manifest.decoded_extra().get("label")
    if saved != label:
        raise CheckpointError(
            f"{folder} holds the state of another save: its label is {saved!r}, not {label!r}. "
            f"{LOAD_ANOTHER}"
        )


def _check_dtypes(manifest: Manifest, name_of: ParameterNames, core: ShardedAdam) -> None:
    """Check that the trained parameters have the dtypes with which their state was saved."""
    saved = manifest.decoded_extra().get("dtypes", {})
    for name, dtype in parameter_dtypes(core, name_of).items():
        if saved.get(name, dtype) != dtype:
            raise CheckpointError(
                f"{name!r} was {saved[name]} when the state was saved and is {dtype} here. Loading "
                "does not cast: construct the model with the saved dtype."
            )


def _check(
    manifest: Manifest,
    name_of: ParameterNames,
    core: ShardedAdam,
    state: ModelState,
    *,
    weights: bool,
) -> None:
    """Check that a checkpoint has the names, shapes and dtypes of this model and optimizer."""
    expected: dict[str, torch.Tensor] = {}
    if not weights:
        _check_dtypes(manifest, name_of, core)
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        if weights:
            expected[f"model/{name}"] = shard.parameter
        for key, dtype in _saved_dtypes(manifest, name, shard).items():
            saved = _plane_name(manifest, name, key)
            if not weights and saved not in manifest.tensors and key == "master_weight":
                continue  # the parameter was its own master weight, and the model has loaded it
            # If the parameter is its own master weight, `saved` is already expected.
            expected.setdefault(saved, shard.parameter)
            _compare(manifest.tensors, saved, dtype, shard.parameter.shape)
    # Tensors that shared memory in a file of torch are tied after its import, but may be two
    # tensors of the model: buffers that are views of one table, for example.
    expected |= {_saved_name(manifest, name): tensor for name, tensor in state.whole.items()}
    for name, tensor in state.whole.items():
        _compare(manifest.tensors, _saved_name(manifest, name), tensor.dtype, tensor.shape)
    for name, tensor in expected.items():
        if name.startswith("model/"):
            _compare(manifest.tensors, name, tensor.dtype, tensor.shape)
    # Entries that modules compute may change their shape between saves: compare only the names.
    by_module = {*state.computed, *state.values}
    for name in sorted(by_module - {*manifest.tensors, *manifest.values}):
        if manifest.format_version == 2 and name in state.values:
            if core.ranks.rank == 0:  # all ranks load the same checkpoint
                logger.warning(
                    "Keeping the current value of %r: checkpoints of format 2 do not store it", name
                )
            continue
        raise CheckpointError(f"The checkpoint has no {name!r}. {SAME_MODEL}")
    surplus = [name for name in manifest.tensors if name not in expected]
    surplus = [name for name in surplus if not _may_be_unused(manifest, name)]
    surplus = [name for name in [*surplus, *manifest.values] if name not in by_module]
    if surplus:
        raise CheckpointError(
            f"The checkpoint has {surplus[0]!r}, but this model and optimizer do not. {SAME_MODEL}"
        )


def _reject_other_formats(
    manifest: Manifest, name_of: ParameterNames, core: ShardedAdam, *, can_convert: bool
) -> None:
    """Reject state in low precision for parameters whose state has another format here.

    Raises:
        CheckpointError: the message names the parameter.
    """
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        try:
            saved = manifest.optimizer.format_of(name)
            reject_other_format(name, saved, shard.state_format, can_convert=can_convert)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def _saved_dtypes(manifest: Manifest, name: str, shard: ParameterShard) -> dict[str, torch.dtype]:
    """Return the dtype of each plane to read for a parameter, by key, as it was saved."""
    own = {key: plane.dtype for key, plane in shard.planes.items()}
    saved = manifest.optimizer.format_of(name)
    if saved == shard.state_format:
        return own
    moment = torch.float32 if saved == "fp32" else torch.bfloat16
    second = SCALED_KEY if saved in CODED_FORMATS else "exp_avg_sq"
    dtypes = dict.fromkeys(("exp_avg", second), moment)
    if saved != "fp32" and shard.parameter.dtype == torch.bfloat16:
        remainder = torch.int8 if saved in CODED_FORMATS else torch.int16
        return dtypes | {"master_remainder": remainder}
    # A master weight is missing if the fp32 parameter is its own master weight.
    has_master = shard.parameter.dtype != torch.float32 or "master_weight" in own
    return dtypes | ({"master_weight": torch.float32} if has_master else {})


def _may_be_unused(manifest: Manifest, saved: str) -> bool:
    """Return whether a saved tensor is state that this optimizer need not have."""
    name, _, key = saved.removeprefix("optimizer/").rpartition("/")
    if saved.startswith("model/"):
        return False
    # An fp32 parameter has a master weight only if its state is on another device. A parameter that
    # was never updated may be frozen here.
    return key == "master_weight" or manifest.optimizer.steps.get(name) == 0


def _saved_name(manifest: Manifest, name: str) -> str:
    """Return the name under which a tensor of the model is saved: another one, if it is tied."""
    return manifest.tied.get(name, name)


def _plane_name(manifest: Manifest, name: str, key: str) -> str:
    """Return the saved name of a parameter's state tensor."""
    saved = f"optimizer/{name}/{key}"
    if key == "master_weight" and saved not in manifest.tensors:
        # An fp32 parameter on the device of its state is its own master weight.
        return f"model/{name}"
    return saved


def _compare(
    tensors: Mapping[str, TensorEntry], name: str, dtype: torch.dtype, shape: Iterable[int]
) -> None:
    """Check that a tensor is saved with this dtype and logical shape."""
    entry = tensors.get(name)
    if entry is None:
        raise CheckpointError(f"The checkpoint has no {name!r}. {SAME_MODEL}")
    if entry.dtype != DTYPE_NAMES[dtype]:
        raise CheckpointError(
            f"{name!r} is {entry.dtype} in the checkpoint and {DTYPE_NAMES[dtype]} here. Loading "
            "does not cast: construct the model with the saved dtype."
        )
    if entry.shape != list(shape):
        raise CheckpointError(
            f"{name!r} has shape {entry.shape} in the checkpoint and {list(shape)} here. "
            f"{SAME_MODEL}"
        )


def _read_in_place(
    reader: CheckpointReader,
    name_of: ParameterNames,
    core: ShardedAdam,
    state: ModelState,
    *,
    weights: bool,
) -> None:
    """Read parameters, optimizer state and buffers in place, in one pass over the files."""
    loaded = set()
    reads: list[Read] = []
    for shard in shards_of(core.states):
        name, boxes = name_of(shard.parameter), shard.boxes()
        is_same = reader.manifest.optimizer.format_of(name) == shard.state_format
        for key, plane in shard.planes.items() if is_same else ():
            saved = _plane_name(reader.manifest, name, key)
            # `_check` has found what may be missing.
            if isinstance(plane, torch.Tensor) and saved in reader.manifest.tensors:
                reads += _reads(reader, saved, boxes, shard.order, plane)
        if weights and name not in loaded:
            # Every rank reads whole parameters (of a DTensor its local part), but only its own
            # ranges of the state.
            loaded.add(name)
            reads += _live_reads(reader, f"model/{name}", shard.parameter)
    for name, tensor in state.whole.items():
        reads += _live_reads(reader, _saved_name(reader.manifest, name), tensor)
    reader.read(reads)


def _convert(reader: CheckpointReader, name_of: ParameterNames, core: ShardedAdam) -> None:
    """Read state that is not stored as it was saved, and convert it: other formats, and codes.

    Call it after the parameters are loaded: a split master weight depends on its parameter.
    """
    manifest, num_rounded = reader.manifest, 0
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        is_same = manifest.optimizer.format_of(name) == shard.state_format
        for saved_key, dtype in _saved_dtypes(manifest, name, shard).items():
            key = saved_key if saved_key in shard.planes else OTHER_KEY[saved_key]
            plane, saved = shard.planes[key], _plane_name(manifest, name, saved_key)
            if (is_same and isinstance(plane, torch.Tensor)) or saved not in manifest.tensors:
                continue
            values = _values_of(reader, saved, dtype, shard)
            scale = manifest.optimizer.scales.get(name, 1.0)
            source = converted(key, plane.dtype, saved_key, values, shard.weight, scale)
            is_exact = copy_plane(plane, source)
            num_rounded += is_same and not is_exact
    log_rounded(num_rounded)


def _values_of(
    reader: CheckpointReader, saved: str, dtype: torch.dtype, shard: ParameterShard
) -> torch.Tensor:
    """Return this rank's elements of a saved plane."""
    values = torch.empty(shard.end - shard.start, dtype=dtype, device="cpu")
    reader.read(_reads(reader, saved, shard.boxes(), shard.order, values))
    return values


def _check_storable(reader: CheckpointReader, name_of: ParameterNames, core: ShardedAdam) -> None:
    """Check that moments of another format can be stored in codes.

    Raises:
        CheckpointError: the message names the saved tensor.
    """
    manifest = reader.manifest
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        if shard.scale is None or manifest.optimizer.format_of(name) in CODED_FORMATS:
            continue
        for key, dtype in _saved_dtypes(manifest, name, shard).items():
            saved = _plane_name(manifest, name, key)
            if key not in OTHER_MASTER_KEY:
                try:
                    values = _values_of(reader, saved, dtype, shard)
                    check_storable(f"The saved {saved!r}", values, is_squared=key != "exp_avg")
                except ValueError as error:
                    raise CheckpointError(str(error)) from error


def _load_modules(reader: CheckpointReader, model: nn.Module, state: ModelState) -> bool:
    """Call `model.load_state_dict` with the saved entries that modules computed.

    The other entries of the passed state dict are the live tensors themselves: torch does not copy
    a tensor to itself, and modules and hooks see a complete state dict.

    Returns:
        Whether an entry is not a live tensor, so that it may have been copied over one.

    Raises:
        CheckpointError: `load_state_dict` fails, or it does not load a saved entry, and the model
            has another value.
    """
    values = reader.manifest.decoded_values()
    for name in {*state.computed, *state.values} & reader.manifest.tensors.keys():
        values[name] = reader.whole(name)
    current = model.state_dict(keep_vars=True)
    entries = {name: values.get(f"model/{name}", value) for name, value in current.items()}
    try:
        # With strict=False, the model may omit entries from its own state dict. A model that
        # overrides load_state_dict may not have this argument.
        parameters = inspect.signature(model.load_state_dict).parameters
        options = {"strict": False} if {"strict", "kwargs"} & parameters.keys() else {}
        result = model.load_state_dict(entries, **options)
    except Exception as error:  # user code: hooks and overridden methods
        raise CheckpointError(
            f"load_state_dict of the model failed: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. The model is loaded only in part: fix its load_state_dict "
            "or its hooks, and load again."
        ) from error
    unexpected = getattr(result, "unexpected_keys", ())
    not_loaded = sorted(name for name in unexpected if f"model/{name}" in values)
    current = model.state_dict(keep_vars=True) if not_loaded else {}
    for name in not_loaded:
        # The same value is no loss. A 4-bit layer of bitsandbytes, for example, saves its scales,
        # but gets them by quantizing its weight.
        if not _is_same(name, current.get(name), values[f"model/{name}"]):
            raise CheckpointError(
                f"load_state_dict of the model does not load {name!r}, although the model's state "
                "dict has this entry, with another value than the checkpoint. Add a load hook to "
                "the model, or construct it with the saved value."
            )
    live = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return any(id(value) not in live for value in entries.values())


def _is_same(name: str, current: Any, saved: Any) -> bool:
    """Return whether an entry of the state dict has the saved value; a tensor, in every bit."""
    if not isinstance(current, torch.Tensor) or not isinstance(saved, torch.Tensor):
        return bool(encode(current, name) == encode(saved, name))
    if (current.dtype, current.shape) != (saved.dtype, saved.shape):
        return False
    return equal_bits(saveable(name, current), saved)


def _reads(
    reader: CheckpointReader,
    name: str,
    boxes: Sequence[Box],
    order: Sequence[int],
    target: torch.Tensor,
) -> Iterable[Read]:
    """Return the reads of some boxes of a tensor.

    If the order of its elements in memory has changed since the save, read the boxes here, and
    return no reads.

    Args:
        boxes: with their dimensions in the order `order`.
        target: (n,) the elements of the boxes, one box after the other.
    """
    if list(order) == reader.manifest.tensors[name].order:
        return reader.reads(name, boxes, target)
    for box, values in views_of(target, boxes):
        saved = reader.box(name, box.permuted(inverse_order(order)))
        copy_bits(values, saved.permute(tuple(order)))
    return ()


def _live_reads(reader: CheckpointReader, name: str, tensor: torch.Tensor) -> Iterable[Read]:
    """Return the reads of all elements that this rank has of a tensor of the model.

    If the tensor is a lazy view or has gaps, or the order of its elements in memory has changed
    since the save, read and copy the elements here, and return no reads.
    """
    # In place: FSDP2 gathers from the memory of the local tensor.
    target = local_of(tensor).detach()
    order = memory_order(target)
    boxes = boxes_of_part(tensor, order, 0, target.numel())
    flat = target.permute(order)
    if flat.is_contiguous() and not is_lazy_view(target):
        return _reads(reader, name, boxes, order, flat.view(-1))
    values = torch.empty(target.numel(), dtype=target.dtype, device="cpu")
    reader.read(_reads(reader, name, boxes, order, values))
    whole = values.view(flat.shape).permute(inverse_order(order))
    part, source = target, whole
    # torch does not write to an expanded tensor, whose elements share memory along a dimension.
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            part, source = part.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    copy_bits(part, source)
    if part is not target and not equal_bits(target, whole):
        raise CheckpointError(
            f"Elements of {name!r} share memory here (strides {target.stride()}), but have "
            "different values in the checkpoint. Call contiguous() on this tensor of the model."
        )
    return ()
