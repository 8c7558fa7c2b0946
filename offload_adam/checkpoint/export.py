"""Exports a checkpoint as a file of `torch.save` or a folder of `torch.distributed.checkpoint`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from offload_adam.checkpoint.commit import flush, partial_output, publish
from offload_adam.checkpoint.dcp import plain_text
from offload_adam.checkpoint.format import (
    Manifest,
    OptimizerEntry,
    decoded_optimizer,
    read_manifest,
)
from offload_adam.checkpoint.rank_file import as_bytes
from offload_adam.checkpoint.reader import CheckpointReader
from offload_adam.checkpoint.torch_file import LOADABLE_DTYPES, Streamed, write_torch_file
from offload_adam.dtypes import DTYPES
from offload_adam.errors import CheckpointError
from offload_adam.memory.planes import SCALED_KEY
from offload_adam.memory.split_master import join
from offload_adam.printable import show
from offload_adam.state.boxes import Box, inverse_order
from offload_adam.state.state_dict import pack_full
from offload_adam.state.state_shard import SCALE_KEY, BoxSource, BoxTensor

_MODEL, _OPTIMIZER = "model/", "optimizer/"
_BITS = {torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2}
_DCP_DTYPES = LOADABLE_DTYPES - _BITS
"""`dcp.save` fails for other dtypes, because it computes the size of an element by their names."""


def export_torch(path: Path, out: Path) -> str:
    """Write a checkpoint as one file for `torch.load(out, weights_only=True)`.

    The file holds a dict. "model" and "optimizer" are state dicts of the model and of torch's Adam
    or AdamW with the same groups. "step" and "extra" are the saved ones, without values that torch
    does not load with `weights_only`, such as NumPy arrays. Tensors are read, verified and written
    block by block; they keep the order of their elements in memory.

    Returns:
        The torch optimizer that loads the file, how it differs, and which values are left out.

    Raises:
        CheckpointError: the checkpoint is damaged or has a tensor of a dtype that `torch.load` does
            not load, or `out` exists.
        OSError: `out` cannot be written.
    """
    with partial_output(out) as partial_file, _open(path) as reader:
        manifest = reader.manifest
        _require_dtypes(manifest, LOADABLE_DTYPES, "a file for torch.load(weights_only=True)")
        left_out: list[str] = []
        model = {name: _streamed(reader, saved) for name, saved in _model_names(manifest).items()}
        content = {
            "model": model | _loadable("model", _model_values(manifest), left_out),
            "optimizer": _torch_state(reader, manifest, left_out),
            "step": manifest.step,
            "extra": _loadable("extra", manifest.decoded_extra(), left_out),
        }
        write_torch_file(partial_file, content)
        publish(partial_file, out)
    loaded_by = _torch_optimizer(manifest.optimizer)
    if left_out:
        listed = ", ".join(left_out)
        loaded_by += f", without {listed}, which torch.load(weights_only=True) does not load"
    return loaded_by


def _open(path: Path) -> closing[CheckpointReader]:
    return closing(CheckpointReader(path, read_manifest(path)))


def _require_dtypes(manifest: Manifest, dtypes: set[torch.dtype], form: str) -> None:
    """Check that all tensors have one of the dtypes that a format holds."""
    for name, entry in manifest.tensors.items():
        if DTYPES[entry.dtype] not in dtypes:
            raise CheckpointError(
                f"{name!r} has dtype {DTYPES[entry.dtype]}, which {form} cannot hold. Load the "
                "checkpoint with load_checkpoint, or save it from a model that holds this tensor "
                "as uint8."
            )


def _torch_state(
    reader: CheckpointReader, manifest: Manifest, left_out: list[str]
) -> dict[str, Any]:
    """Return a state dict for torch's optimizers. They ignore the key of the master weights."""
    planes = _state_names(manifest)
    plain = decoded_optimizer(manifest.optimizer.model_dump(), manifest.format_version)
    names: list[str] = []
    groups = []
    for number, group in enumerate(plain["groups"]):
        packed = list(range(len(names), len(names) + len(group["parameters"])))
        names += group["parameters"]
        options = _loadable(f"param_groups[{number}]", group["options"], left_out)
        groups.append({**options, "params": packed, "param_names": group["parameters"]})
    whole = {
        packed: {
            # A float32 tensor, as torch's optimizers save it.
            "step": torch.tensor(manifest.optimizer.steps[name], dtype=torch.float32, device="cpu"),
            **_streamed_planes(reader, planes[name], name),
        }
        for packed, name in enumerate(names)
        if name in planes
    }
    packed_ids = {packed: packed for packed in whole}
    further = _loadable("optimizer", plain["further"], left_out)
    return pack_full(groups, packed_ids, whole, further)


def _streamed_planes(
    reader: CheckpointReader, planes: Mapping[str, str], name: str
) -> dict[str, Any]:
    """Return the tensors of a parameter's state in fp32, by the keys of `pack_full`.

    Args:
        planes: names of the saved tensors, by torch's keys.
        name: the parameter's.
    """
    found: dict[str, Any] = {}
    weight, scale = _MODEL + name, reader.manifest.optimizer.scales.get(name)
    if scale is not None:
        found[SCALE_KEY] = torch.tensor(scale, dtype=torch.float64, device="cpu")
    for key, saved in planes.items():
        streamed = _streamed(reader, saved)
        if key != "master_remainder":
            if streamed.dtype == torch.bfloat16:
                factor = scale if key == SCALED_KEY and scale is not None else 1.0
                blocks = partial(_widened, reader, saved, factor)
                streamed = replace(streamed, dtype=torch.float32, blocks=blocks)
            found["exp_avg_sq" if key == SCALED_KEY else key] = streamed
        elif weight in reader.manifest.tensors:  # otherwise the model was saved separately
            blocks = partial(_joined, reader, weight, saved)
            found["master_weight"] = replace(streamed, dtype=torch.float32, blocks=blocks)
    return found


def _widened(reader: CheckpointReader, saved: str, scale: float) -> Iterator[memoryview]:
    """Yield the blocks of a bfloat16 tensor in fp32, multiplied by `scale`."""
    for block in reader.blocks(saved):
        yield as_bytes(torch.frombuffer(block, dtype=torch.bfloat16).float().mul_(scale))


def _joined(reader: CheckpointReader, weight: str, remainder: str) -> Iterator[memoryview]:
    """Yield the blocks of split master weights in fp32."""
    dtype = DTYPES[reader.manifest.tensors[remainder].dtype]
    blocks, low = reader.blocks(remainder), torch.empty(0, dtype=dtype, device="cpu")
    for block in reader.blocks(weight):
        high = torch.frombuffer(block, dtype=torch.bfloat16)
        while low.numel() < high.numel():  # a block of int8 has twice as many elements
            low = torch.cat([low, torch.frombuffer(next(blocks), dtype=dtype)])
        yield as_bytes(join(high, low[: high.numel()]))
        low = low[high.numel() :]


def _streamed(reader: CheckpointReader, saved: str) -> Streamed:
    """Return a saved tensor for torch's file, with the saved order in memory."""
    entry = reader.manifest.tensors[saved]
    strides, step = [0] * len(entry.shape), 1
    for dim in reversed(entry.order):
        strides[dim] = step
        step *= entry.shape[dim]
    dtype, shape = DTYPES[entry.dtype], tuple(entry.shape)
    return Streamed(saved, dtype, shape, tuple(strides), partial(reader.blocks, saved))


def _loadable(where: str, values: Mapping[Any, Any], left_out: list[str]) -> dict[Any, Any]:
    """Return the values that `torch.load(weights_only=True)` loads; list others in `left_out`."""
    if _is_loadable(values):
        return dict(values)
    items = list(values.items())
    if len(items) == 1:
        left_out.append(f"{where}[{show(items[0][0])}]")
        return {}
    # A test writes a file, so there are few tests if few values are at fault.
    halves = items[: len(items) // 2], items[len(items) // 2 :]
    return {k: v for half in halves for k, v in _loadable(where, dict(half), left_out).items()}


def _is_loadable(value: object) -> bool:
    # Whether torch loads a type depends on its version, so try it with this one.
    with TemporaryDirectory() as folder:
        file = Path(folder, "value.pt")
        try:
            write_torch_file(file, value)
            torch.load(file, weights_only=True)
        except Exception:  # torch does not document which errors it raises
            return False
    return True


def _torch_optimizer(optimizer: OptimizerEntry) -> str:
    """Return the name of the torch optimizer that loads a state, and what it lacks."""
    every = [group.options for group in optimizer.groups]
    decoupled = {bool(options.get("decoupled_weight_decay")) for options in every}
    name = "torch.optim.AdamW" if decoupled == {True} else "torch.optim.Adam"
    has_nesterov = any(options.get("nesterov") for options in every)
    return f"{name}, which has no nesterov" if has_nesterov else name


def export_dcp(path: Path, out: Path) -> str:
    """Write a checkpoint as a folder for `torch.distributed.checkpoint.load`, in any world size.

    The keys are those of `{"model": model.state_dict(), "optimizer": OptimizerState(model,
    optimizer)}`. Boxes are read, verified and written one after the other.

    Returns:
        The call that loads the folder.

    Raises:
        CheckpointError: the checkpoint is damaged or has a tensor of a dtype that DCP does not
            save, or `out` exists.
    """
    with partial_output(out) as partial_folder, _open(path) as reader:
        manifest = reader.manifest
        _require_dtypes(manifest, _DCP_DTYPES, "a folder of torch.distributed.checkpoint")
        plain = plain_text(manifest.step, manifest.format_version, manifest.optimizer.model_dump())
        state = {
            name: {key: _lazy(reader, saved) for key, saved in planes.items()}
            for name, planes in _state_names(manifest).items()
        }
        model = {name: _lazy(reader, saved) for name, saved in _model_names(manifest).items()}
        content = {
            "model": model | _model_values(manifest),
            "optimizer": {"state": state, "plain": plain},
        }
        _dcp_save(content, partial_folder)
        # torch 2.13 calls fsync on `.metadata` before it writes its own buffer to the file.
        for file in partial_folder.iterdir():
            flush(file)
        publish(partial_folder, out)
    return 'dcp.load({"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)})'


def _dcp_save(content: dict[str, Any], folder: Path) -> None:
    """Call `dcp.save` on one rank. Its CheckpointException is replaced by its cause."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ", category=UserWarning)
        try:
            dcp.save(content, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:
            # It holds the error of each rank, and there is only one rank.
            failure, _ = next(iter(error.failures.values()))
            raise failure from None


def _lazy(reader: CheckpointReader, saved: str) -> BoxTensor:
    """Return a saved tensor whose boxes are read when torch writes them."""
    entry = reader.manifest.tensors[saved]
    logical = inverse_order(entry.order)
    sources = [
        BoxSource(piece.box.permuted(logical), partial(reader.piece, saved, piece))
        for piece in entry.pieces
    ]
    if not sources:  # an empty tensor has no pieces
        empty = Box((0,) * len(entry.shape), tuple(entry.shape))
        sources = [BoxSource(empty, partial(reader.whole, saved))]
    return BoxTensor(entry.shape, DTYPES[entry.dtype], sources)


def _model_names(manifest: Manifest) -> dict[str, str]:
    """Return the saved name of each tensor in the model's state dict, tied ones included."""
    own = {name: name for name in manifest.tensors if name.startswith(_MODEL)}
    return {name.removeprefix(_MODEL): saved for name, saved in (own | manifest.tied).items()}


def _model_values(manifest: Manifest) -> dict[str, Any]:
    """Return the entries of the model's state dict that are not tensors."""
    values = manifest.decoded_values()
    return {name.removeprefix(_MODEL): value for name, value in values.items()}


def _state_names(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Return the saved names of the state tensors: parameter -> key -> saved name."""
    found: dict[str, dict[str, str]] = {name: {} for name in manifest.optimizer.steps}
    for saved in manifest.tensors:
        name, _, key = saved.removeprefix(_OPTIMIZER).rpartition("/")
        if saved.startswith(_OPTIMIZER) and name in found:
            found[name][key] = saved
    return found
