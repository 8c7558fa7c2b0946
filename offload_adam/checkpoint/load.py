"""Read a checkpoint into a model and an optimizer, of any world size, every byte verified."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from offload_adam.checkpoint.content import (
    DTYPE_NAMES,
    DTYPES,
    ParameterNames,
    as_bytes,
    inverse_order,
    memory_order,
    whole_tensors,
)
from offload_adam.checkpoint.files import BlockMemory, VerifiedFile
from offload_adam.checkpoint.manifest import Manifest, TensorEntry, read_manifest, sorted_pieces
from offload_adam.coordinator.admission import together
from offload_adam.errors import CheckpointError
from offload_adam.observe.place import HERE
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.step.parameter_shard import ParameterShard


def load_checkpoint(
    path: str | os.PathLike[str], *, model: nn.Module, optimizer: ShardedOptimizer
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, whatever the world size then and now. Collective.

    Names, shapes, dtypes and groups are compared before anything is changed, and nothing is cast.
    Bytes go from the files into the state as it lies, block by verified block: besides the state
    itself a rank needs 4 blocks of 4 MiB, and one tensor where the order of its elements in memory
    has changed.

    Returns:
        What was given as `extra`.

    Raises:
        CheckpointError: on every rank; nothing is changed, unless the message speaks of damage:
            that is found while reading, and then another checkpoint must be loaded.
    """
    folder = Path(path)
    membership = optimizer.membership
    name_of = ParameterNames(model)
    with HERE.at("checkpoint", patient=True), ExitStack() as stack:

        def check() -> tuple[Manifest, CheckpointReader]:
            manifest = read_manifest(folder)
            reader = stack.enter_context(CheckpointReader(folder, manifest))
            _check(manifest, model, optimizer)
            optimizer.check_plain_state(manifest.optimizer.model_dump(), name_of)
            return manifest, reader

        manifest, reader = together(membership, "reading a checkpoint", check)

        def load() -> None:
            with torch.no_grad():
                optimizer.finish_reading()
                _load(reader, model, optimizer)
                optimizer.load_plain_state(manifest.optimizer.model_dump(), name_of)
                optimizer.num_steps = manifest.step

        together(membership, "loading a checkpoint", load)
    return manifest.extra


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Check the manifest and every byte of a checkpoint.

    Raises:
        CheckpointError: naming the file and the place.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    with CheckpointReader(folder, manifest) as reader:
        reader.verify()
    return manifest


class CheckpointReader:
    """The open files of a checkpoint.

    Owns: one descriptor a file and a few blocks, until it is left as a context.

    Raises:
        CheckpointError: a file is missing or has another length than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._stack = ExitStack()
        self._files: dict[str, VerifiedFile] = {}
        memory = BlockMemory()
        try:
            for name, entry in manifest.files.items():
                file = VerifiedFile(folder, name, entry, memory)
                self._files[name] = self._stack.enter_context(file)
        except BaseException:
            self._stack.close()
            raise

    def verify(self) -> None:
        """Check every byte."""
        for file in self._files.values():
            file.verify()

    def fill(self, name: str, target: torch.Tensor, start: int) -> None:
        """Read elements [start, start + n) of a tensor, in its saved order.

        Args:
            target: (n,) of the saved dtype, on any device.
        """
        entry = self.manifest.tensors[name]
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        view, itemsize = as_bytes(host), target.element_size()
        end = start + target.numel()
        for low, high, piece in sorted_pieces(entry):
            first, last = max(low, start), min(high, end)
            if first < last:
                part = view[(first - start) * itemsize : (last - start) * itemsize]
                self._files[piece.file].read_into(part, piece.start + (first - low) * itemsize)
        if host is not target:
            target.copy_(host)

    def whole(self, name: str) -> torch.Tensor:
        """Return a whole tensor in its logical shape, in the saved order in memory."""
        entry = self.manifest.tensors[name]
        flat = torch.empty(prod(entry.shape), dtype=DTYPES[entry.dtype])
        self.fill(name, flat, 0)
        return flat.view(entry.memory_shape).permute(inverse_order(entry.order))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _check(manifest: Manifest, model: nn.Module, optimizer: ShardedOptimizer) -> None:
    """Refuse a checkpoint of another model."""
    name_of = ParameterNames(model)
    expected: dict[str, torch.Tensor] = {}
    for shard in optimizer.shards():
        name = name_of(shard.parameter)
        expected[f"model/{name}"] = shard.parameter
        for key, plane in shard.planes.items():
            saved = f"optimizer/{name}/{key}"
            if key == "master_weight" and saved not in manifest.tensors:
                saved = f"model/{name}"  # an fp32 parameter was its own master weight
            expected.setdefault(saved, plane)
            _compare(manifest.tensors, saved, plane.dtype, shard.parameter.shape)
    for name, tensor in whole_tensors(model, optimizer).items():
        expected[name] = tensor
    for name, tensor in expected.items():
        if name.startswith("model/"):
            _compare(manifest.tensors, name, tensor.dtype, None)
    own = "/master_weight"  # surplus where the fp32 parameter is its own master weight now
    surplus = [n for n in manifest.tensors if n not in expected and not n.endswith(own)]
    if surplus:
        raise CheckpointError(
            f"the checkpoint has {surplus[0]!r}, which this model and optimizer do not have: "
            "build them as they were"
        )


def _compare(
    tensors: Mapping[str, TensorEntry],
    name: str,
    dtype: torch.dtype,
    shape: Iterable[int] | None,
) -> None:
    entry = tensors.get(name)
    if entry is None:
        raise CheckpointError(f"the checkpoint has no {name!r}")
    if entry.dtype != DTYPE_NAMES[dtype]:
        raise CheckpointError(
            f"{name!r} is {entry.dtype} in the checkpoint and {DTYPE_NAMES[dtype]} here: nothing "
            "is cast on load; build the model in the same dtype"
        )
    if shape is not None and entry.shape != list(shape):
        raise CheckpointError(
            f"{name!r} has shape {entry.shape} in the checkpoint and {list(shape)} here"
        )


def _load(reader: CheckpointReader, model: nn.Module, optimizer: ShardedOptimizer) -> None:
    name_of = ParameterNames(model)
    loaded = set()
    for shard in optimizer.shards():
        name = name_of(shard.parameter)
        for key, plane in shard.planes.items():
            saved = f"optimizer/{name}/{key}"
            if saved not in reader.manifest.tensors:
                saved = f"model/{name}"
            _load_range(reader, saved, shard, plane)
        if name not in loaded:
            loaded.add(name)
            _load_whole(reader, f"model/{name}", shard.parameter.detach())
    for name, tensor in whole_tensors(model, optimizer).items():
        _load_whole(reader, name, tensor)
    optimizer.refresh_master()


def _load_range(
    reader: CheckpointReader, name: str, shard: ParameterShard, target: torch.Tensor
) -> None:
    """Read a shard's range; through a whole tensor where elements lie in another order now."""
    order = memory_order(shard.parameter)
    if list(order) == reader.manifest.tensors[name].order:
        reader.fill(name, target, shard.start)
        return
    whole = reader.whole(name)
    target.copy_(whole.permute(order).reshape(-1)[shard.start : shard.end])


def _load_whole(reader: CheckpointReader, name: str, target: torch.Tensor) -> None:
    """Read a whole tensor, straight into its memory where it lies as it was saved."""
    order = memory_order(target)
    flat = target.permute(order)
    if flat.is_contiguous() and list(order) == reader.manifest.tensors[name].order:
        reader.fill(name, flat.view(-1), 0)
    else:
        target.copy_(reader.whole(name))
