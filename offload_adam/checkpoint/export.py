"""A checkpoint in torch's own forms: one plain file, or a `torch.distributed.checkpoint` folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from offload_adam.checkpoint.content import DTYPES, as_bytes, decoded_optimizer
from offload_adam.checkpoint.dcp import plain_text
from offload_adam.checkpoint.load import CheckpointReader
from offload_adam.checkpoint.manifest import Manifest, OptimizerEntry, read_manifest
from offload_adam.checkpoint.partial import discard, partial_name, publish, remove_abandoned
from offload_adam.checkpoint.torch_file import Streamed, write_torch_file
from offload_adam.errors import CheckpointError
from offload_adam.layout.boxes import Box, range_of_box
from offload_adam.step.box_tensor import BoxSource, BoxTensor, inverse_order, logical_box
from offload_adam.step.saved_state import pack_full

_MODEL, _OPTIMIZER = "model/", "optimizer/"


def export_torch(path: Path, out: Path) -> str:
    """Write a checkpoint as one file that `torch.load(out, weights_only=True)` reads.

    It is a dict: "model" and "optimizer" are plain state dicts, of the model and of
    `torch.optim.AdamW` over the same groups; "step" and "extra" are as they were saved, but for
    values that torch does not read with `weights_only`, NumPy arrays for example. Tensors are read,
    verified and written block by block, and lie in memory as they did when they were saved.

    Returns:
        Which of torch's optimizers takes it, what that one does otherwise, and what is left out.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` exists.
        OSError: `out` cannot be written.
    """
    _refuse_existing(out)
    manifest = read_manifest(path)
    with CheckpointReader(path, manifest) as reader:
        names = _model_names(manifest)
        readable = _Readable()
        model = {name: _streamed(reader, saved) for name, saved in names.items()}
        content = {
            "model": model | readable("model", _model_values(manifest)),
            "optimizer": _torch_state(reader, manifest, readable),
            "step": manifest.step,
            "extra": readable("extra", manifest.decoded_extra()),
        }
        with _appearing(out) as unfinished:
            write_torch_file(unfinished, content)
    words = taken_by(manifest.optimizer)
    if readable.left_out:
        left_out = ", ".join(readable.left_out)
        words += f", without {left_out}, which torch.load(weights_only=True) does not read"
    return words


def export_dcp(path: Path, out: Path) -> str:
    """Write a checkpoint as a folder that `torch.distributed.checkpoint.load` reads.

    The keys are those of `{"model": model.state_dict(), "optimizer": OptimizerState(model,
    optimizer)}`, for any world. Boxes are read, verified and written one after the other.

    Returns:
        What loads it.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` exists.
    """
    _refuse_existing(out)
    manifest = read_manifest(path)
    with CheckpointReader(path, manifest) as reader:
        plain = plain_text(manifest.step, manifest.format_version, manifest.optimizer.model_dump())
        state = {
            name: {key: _lazy(reader, saved) for key, saved in planes.items()}
            for name, planes in _state_names(manifest).items()
        }
        names = _model_names(manifest)
        content = {
            "model": {name: _lazy(reader, saved) for name, saved in names.items()}
            | _model_values(manifest),
            "optimizer": {"state": state, "plain": plain},
        }
        with _appearing(out) as unfinished:
            _dcp_save(content, unfinished)
    return 'dcp.load({"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)})'


def taken_by(optimizer: OptimizerEntry) -> str:
    """Say which of torch's optimizers goes on with a state, and what none of them has."""
    every = [group.options for group in optimizer.groups]
    decoupled = {bool(options.get("decoupled_weight_decay")) for options in every}
    words = "torch.optim.AdamW" if decoupled == {True} else "torch.optim.Adam"
    if any(options.get("nesterov") for options in every):
        words += ", which has no nesterov"
    return words


class _Readable:
    """Leaves out what `torch.load(weights_only=True)` does not read, and lists it in `left_out`."""

    def __init__(self) -> None:
        self.left_out: list[str] = []

    def __call__(self, where: str, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the readable ones of some values."""
        return {key: v for key, v in values.items() if self._is_readable(f"{where}[{key!r}]", v)}

    def _is_readable(self, name: str, value: object) -> bool:
        with TemporaryDirectory() as folder:
            file = Path(folder, "value.pt")
            try:
                write_torch_file(file, value)
                torch.load(file, weights_only=True)
            except Exception:  # torch documents none of those that it raises
                self.left_out.append(name)
                return False
        return True


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield where to write; it is renamed to `out` when it is whole, and removed otherwise."""
    remove_abandoned(out)
    unfinished = out.with_name(partial_name(out.name))
    try:
        yield unfinished
        publish(unfinished, out)
    except BaseException:
        discard(unfinished)
        raise


def _dcp_save(content: dict[str, Any], folder: Path) -> None:
    """Let torch write a folder, and find the error of ours in what it raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ", category=UserWarning)
        try:
            dcp.save(content, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            raise failure from None


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} exists, and is not written over: choose another name")


def _model_names(manifest: Manifest) -> dict[str, str]:
    """Return the tensors of the model's state dict by their names, tied ones under each."""
    own = {name: name for name in manifest.tensors if name.startswith(_MODEL)}
    return {name.removeprefix(_MODEL): saved for name, saved in (own | manifest.tied).items()}


def _model_values(manifest: Manifest) -> dict[str, Any]:
    """Return what of the model's state dict is no tensor, by its names there."""
    values = manifest.decoded_values()
    return {name.removeprefix(_MODEL): value for name, value in values.items()}


def _state_names(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Return the saved planes of each parameter, by parameter and key."""
    found: dict[str, dict[str, str]] = {name: {} for name in manifest.optimizer.steps}
    for saved in manifest.tensors:
        name, _, key = saved.removeprefix(_OPTIMIZER).rpartition("/")
        if saved.startswith(_OPTIMIZER) and name in found:
            found[name][key] = saved
    return found


def _torch_state(
    reader: CheckpointReader, manifest: Manifest, readable: _Readable
) -> dict[str, Any]:
    """Return a plain state dict of torch's, master weights beside it under a key of our own."""
    planes = _state_names(manifest)
    plain = decoded_optimizer(manifest.optimizer.model_dump(), manifest.format_version)
    names: list[str] = []
    groups = []
    for number, group in enumerate(plain["groups"]):
        packed = list(range(len(names), len(names) + len(group["parameters"])))
        names += group["parameters"]
        options = readable(f"param_groups[{number}]", group["options"])
        groups.append({**options, "params": packed, "param_names": group["parameters"]})
    whole = {
        packed: {
            "step": _step(name, manifest.optimizer.steps[name]),
            **{key: _streamed(reader, saved) for key, saved in planes[name].items()},
        }
        for packed, name in enumerate(names)
        if name in planes
    }
    packed_ids = {packed: packed for packed in whole}
    return pack_full(groups, packed_ids, whole, readable("optimizer", plain["further"]))


def _streamed(reader: CheckpointReader, saved: str) -> Streamed:
    """Return a saved tensor for torch's file, its dimensions as they lay in memory."""
    entry = reader.manifest.tensors[saved]
    strides, step = [0] * len(entry.shape), 1
    for dim in reversed(entry.order):
        strides[dim] = step
        step *= entry.shape[dim]
    dtype, shape = DTYPES[entry.dtype], tuple(entry.shape)
    return Streamed(saved, dtype, shape, tuple(strides), partial(reader.blocks, saved))


def _step(name: str, count: float) -> Streamed:
    """Return a step count as torch keeps it."""
    value = torch.tensor([count], dtype=torch.float32, device="cpu")
    return Streamed(f"step of {name}", value.dtype, (), (), lambda: [as_bytes(value)])


def _lazy(reader: CheckpointReader, saved: str) -> BoxTensor:
    """Return a saved tensor whose boxes are read when they are asked for."""
    entry = reader.manifest.tensors[saved]

    def read(box: Box) -> torch.Tensor:
        start, end = range_of_box(entry.memory_shape, box)
        flat = torch.empty(end - start, dtype=DTYPES[entry.dtype], device="cpu")
        reader.fill(saved, flat, start)
        return flat.view(box.sizes).permute(inverse_order(entry.order))

    boxes = [Box(tuple(piece.offsets), tuple(piece.sizes)) for piece in entry.pieces]
    if not boxes:  # it has no elements
        boxes = [Box((0,) * len(entry.shape), tuple(entry.memory_shape))]
    sources = [BoxSource(logical_box(box, entry.order), partial(read, box)) for box in boxes]
    return BoxTensor(entry.shape, DTYPES[entry.dtype], sources)
