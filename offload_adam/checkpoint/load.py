"""Read a checkpoint into a model and an optimizer, of any world size, every byte verified.

load_checkpoint
    read_manifest, _check       compare names, shapes, dtypes and groups; nothing is changed
    _read_in_place              read every range straight into the state, file by file
    _load_modules               let modules restore what they computed when they were saved
    load_plain                  groups, step counts and the rest that is no tensor
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from offload_adam.checkpoint.files import BlockMemory, VerifiedFile, as_bytes
from offload_adam.checkpoint.format import (
    BLOCK_NBYTES,
    DTYPE_NAMES,
    DTYPES,
    Manifest,
    TensorEntry,
    decoded_optimizer,
    read_manifest,
    sorted_pieces,
)
from offload_adam.checkpoint.optimizer_access import (
    ParameterNames,
    locked,
    plan_plain_state,
)
from offload_adam.checkpoint.save import ModelState, model_state
from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.errors import CheckpointError
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.state_shard import ParameterShard, inverse_order, memory_order, shards_of
from offload_adam.step.step import ShardedAdam

logger = logging.getLogger(__name__)

NUM_OPEN_FILES = 8
"""Files of a checkpoint that are open at once: a process may open no more than 1,024 on many a
machine, and a checkpoint has one for each rank."""


def load_checkpoint(
    path: str | os.PathLike[str], *, model: nn.Module, optimizer: ShardedOptimizer
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, whatever the world size then and now. Collective.

    Names, shapes, dtypes and groups are compared before anything is changed, and nothing is cast.
    Bytes are read straight into the state, file by file, and every block is verified. Besides the
    state a rank needs 4 blocks of 4 MiB, one more for state on a device, and one whole tensor where
    the order of its elements in memory has changed. Few files are open at once.
    Afterwards `model.load_state_dict` runs, with the entries that modules themselves add to a state
    dict (`get_extra_state`, hooks) and with the tensors that have been read.

    Returns:
        The `extra` that was saved, with its tensors on the host.

    Raises:
        CheckpointError: on every rank. Nothing is changed, unless the message names damage or
            `load_state_dict`: then a part is loaded, and another checkpoint must be loaded.
    """
    folder = Path(path)
    with locked(optimizer), PROGRESS.at("checkpoint", long_running=True), ExitStack() as stack:
        core = optimizer._settled_on_all_ranks("preparing to load a checkpoint")
        with raise_on_all_ranks(optimizer.ranks, "reading a checkpoint"):
            manifest = read_manifest(folder)
            reader = stack.enter_context(closing(CheckpointReader(folder, manifest)))
            name_of = ParameterNames(model)
            state = model_state(model, core)
            _check(manifest, name_of, core, state)
            plain = decoded_optimizer(manifest.optimizer.model_dump(), manifest.format_version)
            load_plain = plan_plain_state(optimizer, core, plain, name_of)
        with raise_on_all_ranks(optimizer.ranks, "loading a checkpoint"), torch.no_grad():
            core.external_edits.wait_for_snapshot()
            _read_in_place(reader, name_of, core, state)
            if _load_modules(reader, model, state):
                # load_state_dict may have overwritten weights with copies that a hook rounded.
                _read_in_place(reader, name_of, core, state)
            core.external_edits.sync_all()
            load_plain()
            core.num_steps = manifest.step
    return manifest.decoded_extra()


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Check the manifest and every byte of a checkpoint.

    Raises:
        CheckpointError: naming the file and the place.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    with closing(CheckpointReader(folder, manifest)) as reader:
        reader.verify()
    return manifest


class Read(NamedTuple):
    """One read: from byte `start` of a file into elements [low, high) of `target`."""

    file: str
    start: int
    target: torch.Tensor
    low: int
    high: int


class CheckpointReader:
    """The files of a checkpoint, few of them open at once, and the blocks that were read last.

    Owns: at most `NUM_OPEN_FILES` descriptors and `NUM_BLOCKS` blocks, until `close`.

    Raises:
        CheckpointError: a file is missing or has another length than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder
        self._memory = BlockMemory()
        self._open: OrderedDict[str, VerifiedFile] = OrderedDict()
        try:
            for name in manifest.files:
                self._file(name)
        except BaseException:
            self.close()
            raise

    def verify(self) -> None:
        """Check every byte."""
        for name in self.manifest.files:
            self._file(name).verify()

    def reads(self, name: str, target: torch.Tensor, start: int) -> Iterator[Read]:
        """Yield what brings elements [start, start + n) of a tensor, in its saved order.

        Args:
            target: (n,) of the saved dtype, on any device.
        """
        itemsize, end = target.element_size(), start + target.numel()
        for low, high, piece in sorted_pieces(self.manifest.tensors[name]):
            first, last = max(low, start), min(high, end)
            if first < last:
                at = piece.start + (first - low) * itemsize
                yield Read(piece.file, at, target, first - start, last - start)

    def read(self, reads: Iterable[Read]) -> None:
        """Read all of this, one file after the other from its start: no block is read twice."""
        for file, start, target, low, high in sorted(reads, key=itemgetter(0, 1)):
            part = target[low:high]
            for piece in part.split(BLOCK_NBYTES // part.element_size()):
                host = (
                    piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
                )
                self._file(file).read_into(as_bytes(host), start)
                start += host.nbytes
                if host is not piece:
                    piece.copy_(host)

    def fill(self, name: str, target: torch.Tensor, start: int) -> None:
        """Read elements [start, start + n) of a tensor, see `reads`."""
        self.read(self.reads(name, target, start))

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in its saved order, each view valid until the next."""
        entry = self.manifest.tensors[name]
        numel, dtype = prod(entry.shape), DTYPES[entry.dtype]
        buffer = torch.empty(min(numel, BLOCK_NBYTES // dtype.itemsize), dtype=dtype, device="cpu")
        for start in range(0, numel, max(1, buffer.numel())):
            part = buffer[: numel - start]
            self.fill(name, part, start)
            yield as_bytes(part)

    def whole(self, name: str) -> torch.Tensor:
        """Return a whole tensor in its logical shape, in the saved order in memory."""
        entry = self.manifest.tensors[name]
        flat = torch.empty(prod(entry.shape), dtype=DTYPES[entry.dtype], device="cpu")
        self.fill(name, flat, 0)
        return flat.view(entry.memory_shape).permute(inverse_order(entry.order))

    def close(self) -> None:
        """Close what is open. Idempotent."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, name: str) -> VerifiedFile:
        """Return a file, open until `NUM_OPEN_FILES` others have been asked for."""
        file = self._open.get(name)
        if file is None:
            if len(self._open) == NUM_OPEN_FILES:
                _, oldest = self._open.popitem(last=False)
                oldest.close()
            file = VerifiedFile(self._folder, name, self.manifest.files[name], self._memory)
            self._open[name] = file
        self._open.move_to_end(name)
        return file


def _check(
    manifest: Manifest, name_of: ParameterNames, core: ShardedAdam, state: ModelState
) -> None:
    """Check that a checkpoint is of this model and optimizer.

    Of entries that modules compute, only the names are compared: a module may save another shape
    each time.
    """
    expected: dict[str, torch.Tensor] = {}
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        expected[f"model/{name}"] = shard.parameter
        for key, plane in shard.planes.items():
            saved = _plane_name(manifest, name, key)
            expected.setdefault(saved, plane)
            _compare(manifest.tensors, saved, plane.dtype, shard.parameter.shape)
    expected |= state.whole
    for name, tensor in expected.items():
        if name.startswith("model/"):
            _compare(manifest.tensors, name, tensor.dtype, tensor.shape)
    by_module = {*state.computed, *state.values}
    for name in sorted(by_module - {*manifest.tensors, *manifest.values}):
        if manifest.format_version == 2 and name in state.values:
            logger.warning("The checkpoint of format 2 does not have %r: it is not changed", name)
            continue
        raise CheckpointError(f"the checkpoint has no {name!r}: build the model as it was")
    own = "/master_weight"  # surplus where the fp32 parameter is its own master weight now
    surplus = [n for n in manifest.tensors if n not in expected and not n.endswith(own)]
    surplus = [n for n in [*surplus, *manifest.values] if n not in by_module]
    if surplus:
        raise CheckpointError(
            f"the checkpoint has {surplus[0]!r}, which this model and optimizer do not have: "
            "build them as they were"
        )


def _plane_name(manifest: Manifest, name: str, key: str) -> str:
    """Return the saved name of a parameter's state tensor."""
    saved = f"optimizer/{name}/{key}"
    if key == "master_weight" and saved not in manifest.tensors:
        return f"model/{name}"  # the parameter was fp32, and so its own master weight
    return saved


def _compare(
    tensors: Mapping[str, TensorEntry],
    name: str,
    dtype: torch.dtype,
    shape: Iterable[int],
) -> None:
    entry = tensors.get(name)
    if entry is None:
        raise CheckpointError(f"the checkpoint has no {name!r}")
    if entry.dtype != DTYPE_NAMES[dtype]:
        raise CheckpointError(
            f"{name!r} is {entry.dtype} in the checkpoint and {DTYPE_NAMES[dtype]} here: nothing "
            "is cast on load; build the model in the same dtype"
        )
    if entry.shape != list(shape):
        raise CheckpointError(
            f"{name!r} has shape {entry.shape} in the checkpoint and {list(shape)} here"
        )


def _read_in_place(
    reader: CheckpointReader, name_of: ParameterNames, core: ShardedAdam, state: ModelState
) -> None:
    """Read all live tensors in place, those in the saved memory order in one pass over files."""
    loaded = set()
    reads: list[Read] = []
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        for key, plane in shard.planes.items():
            saved = _plane_name(reader.manifest, name, key)
            reads += _range_reads(reader, saved, shard, plane)
        if name not in loaded:
            loaded.add(name)
            reads += _whole_reads(reader, f"model/{name}", shard.parameter.detach())
    for name, tensor in state.whole.items():
        reads += _whole_reads(reader, name, tensor)
    reader.read(reads)


def _load_modules(reader: CheckpointReader, model: nn.Module, state: ModelState) -> bool:
    """Let modules take what they computed when they were saved.

    The other entries are the live tensors, which have been read: torch copies none onto itself. So
    a module finds all of its entries, and hooks run as with any state dict.

    Returns:
        Whether an entry is another tensor than the live one, and may have been copied over it.

    Raises:
        CheckpointError: a module does not take an entry.
    """
    values = reader.manifest.decoded_values()
    for name in {*state.computed, *state.values} & reader.manifest.tensors.keys():
        values[name] = reader.whole(name)
    current = model.state_dict(keep_vars=True)
    taken = {name: values.get(f"model/{name}", value) for name, value in current.items()}
    try:
        # Entries that a model leaves out of its own state dict are not missing.
        parameters = inspect.signature(model.load_state_dict).parameters
        # A model's own method may lack it.
        options = {"strict": False} if {"strict", "kwargs"} & parameters.keys() else {}
        result = model.load_state_dict(taken, **options)
    except Exception as error:  # a model's own method, or a hook
        raise CheckpointError(f"load_state_dict of the model rejects its state: {error}") from error
    unexpected = getattr(result, "unexpected_keys", ())
    left = sorted(name for name in unexpected if f"model/{name}" in values)
    if left:
        raise CheckpointError(
            f"load_state_dict of the model does not load {left[0]!r}, which its state dict has: "
            "give the model a hook that does"
        )
    live = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return any(id(value) not in live for value in taken.values())


def _range_reads(
    reader: CheckpointReader, name: str, shard: ParameterShard, target: torch.Tensor
) -> Iterable[Read]:
    """Return what brings a shard's range.

    Nothing where elements lie in another order now: it is read here, through a whole tensor.
    """
    order = memory_order(shard.parameter)
    if list(order) == reader.manifest.tensors[name].order:
        return reader.reads(name, target, shard.start)
    whole = reader.whole(name)
    target.copy_(whole.permute(order).reshape(-1)[shard.start : shard.end])
    return ()


def _whole_reads(reader: CheckpointReader, name: str, target: torch.Tensor) -> Iterable[Read]:
    """Return what brings a whole tensor straight into its memory, as `_range_reads`."""
    order = memory_order(target)
    flat = target.permute(order)
    if flat.is_contiguous() and list(order) == reader.manifest.tensors[name].order:
        return reader.reads(name, flat.view(-1), 0)
    target.copy_(reader.whole(name))
    return ()
