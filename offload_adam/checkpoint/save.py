"""Writes a checkpoint: every rank writes its own shards, and one rename commits them.

save_checkpoint, save_optimizer_state
    open_save       check the values to save; create a partial folder and this rank's file in it
    Save.write      write this rank's file (background.py writes it bucket by bucket instead)
    Save.commit     gather the ranks' entries; rank 0 writes the manifest and renames the folder
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offload_adam.checkpoint.commit import (
    commit_files,
    discard,
    make_folder,
    partial_name,
    remove_abandoned,
    require_new,
)
from offload_adam.checkpoint.format import (
    FORMAT_VERSION,
    Manifest,
    OptimizerEntry,
    Piece,
    RankEntry,
    TensorEntry,
)
from offload_adam.checkpoint.optimizer_access import ParameterNames, locked, plain_state
from offload_adam.checkpoint.rank_file import Part, RankFile, as_bytes, host_bytes, rank_file_name
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.dtypes import DTYPE_NAMES, in_order, is_wrapper, parts_of, saveable
from offload_adam.encoding import encode
from offload_adam.errors import CheckpointError, PeerFailedError
from offload_adam.fsdp_private import is_dtensor, local_of
from offload_adam.layout.budget import ALIGNMENT_NBYTES
from offload_adam.layout.flat import align
from offload_adam.memory.codes import Plane
from offload_adam.params.local_shard import is_counted, reject_distinct
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.boxes import boxes_of_part, inverse_order, memory_order
from offload_adam.state.state_shard import shards_of
from offload_adam.step.step import ShardedAdam
from offload_adam.torch_private import is_lazy

WEIGHTS_PREFIX = "model/"
"""Begins the names of the model's tensors in a checkpoint; those of the state have another."""


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save model and optimizer into a new folder on a file system that all ranks share. Collective.

    Each rank writes its own shards directly from host memory; shards on a device are copied in
    blocks of 4 MiB. The files are written to a folder next to `path` whose name ends in `.partial`.
    When the files of all ranks are on the disk, the folder is renamed to `path`. So a crash at any
    time leaves `path` complete or missing, and other checkpoints unchanged. If several processes
    save to one path, one succeeds and the others raise an error.

    Gradients are not saved. During an accumulation the checkpoint holds the weights and the state
    from before it, so save after a step.

    Args:
        path: the same on every rank. Nothing may exist there yet; missing parent folders are
            created.
        model: has all parameters of `optimizer`. Its whole state dict is saved, frozen parameters
            and buffers included: dense tensors of any dtype but quantized ones, such as
            `torch.qint8`, plain or sharded by FSDP2 and tensor parallelism. Parameters keep their
            names in `model`, so pass `ddp.module` instead of a DDP wrapper if the checkpoint is to
            load without DDP.
        optimizer: its groups, step counts and state are saved.
        extra: returned by `load_checkpoint`; rank 0's is saved. Any nesting of lists, tuples, sets,
            dicts, numbers, text, bytes, and of tensors and NumPy arrays of at most 1 MiB each. For
            example the `state_dict()` of a scheduler, a sampler or a GradScaler, and states of
            random number generators. Types and values are restored exactly, tensors on the host.

    Raises:
        CheckpointError: on every rank. The path exists, at the beginning or at the rename; the
            ranks do not share the folder; a value in `extra`, in the parameter groups or in the
            model's state dict cannot be saved; or a parameter group has replicas="distinct".
        OSError: on the rank where writing failed; the others raise a PeerError. No file is left.
    """
    _save(Path(path), model, optimizer, extra, weights=True)


def save_optimizer_state(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    label: str,
) -> None:
    """Save the optimizer's state as `save_checkpoint` does, but without the model. Collective.

    For tools that save the model themselves. `load_optimizer_state` loads it.

    Args:
        path: as in `save_checkpoint`.
        model: gives the parameters their names.
        label: `load_optimizer_state` checks that it is given the same text.

    Raises:
        CheckpointError, OSError: as `save_checkpoint`.
    """
    _save(Path(path), model, optimizer, {"label": label}, weights=False)


def _save(
    path: Path,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None,
    *,
    weights: bool,
) -> None:
    with locked(optimizer):
        core = optimizer._settled_on_all_ranks("preparing a checkpoint")
        with PROGRESS.at("checkpoint", long_running=True):
            save = open_save(path, model, optimizer, core, extra, weights=weights)
            with save.discarding():
                # An error on one rank ends the save on all ranks, so that none waits for it below.
                with raise_on_all_ranks(save.ranks, "writing a checkpoint"):
                    entry = save.write()
                save.commit(entry)


def open_save(
    target: Path,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    core: ShardedAdam,
    extra: Mapping[str, Any] | None,
    buffers: Sequence[torch.Tensor] = (),
    *,
    weights: bool = True,
) -> Save:
    """Check the values to save, and open a partial folder and this rank's file. Collective.

    Args:
        buffers: see `Save`.
        weights: save the model too. If False, `extra` gets the dtypes of the trained parameters,
            which no tensor of the checkpoint shows.
    """
    ranks = optimizer.ranks
    with raise_on_all_ranks(ranks, "preparing a checkpoint"):
        if core.snapshot_lock.is_open:
            raise CheckpointError(
                "Another checkpoint is being written in the background. Wait for it first: call "
                "its `wait`."
            )
        name_of = ParameterNames(model, core)
        plain = encode(plain_state(optimizer, core, name_of), "optimizer")
        state = model_state(model, core, optimizer.param_groups) if weights else ModelState()
        if not weights:
            extra = {**(extra or {}), "dtypes": parameter_dtypes(core, name_of)}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=core.num_steps,
            world_size=ranks.world_size,
            tensors={},
            files={},
            optimizer=OptimizerEntry.model_validate(plain),
            tied=state.tied,
            values={name: encode(value, name) for name, value in state.values.items()},
            extra=encode(dict(extra or {}), "extra"),
        )
    # Rank 0 chooses the random name. Two saves of one path never write to the same folder.
    own = partial_name(target.name) if ranks.rank == 0 else ""
    partial = target.with_name(gather_texts(ranks, own)[0])
    with _discarding(partial, ranks):
        _open_folder(target, partial, ranks)
        with raise_on_all_ranks(ranks, "opening a checkpoint's files"):
            parts = _parts(model, core, state, weights=weights)
            save = Save(target, partial, ranks, parts, manifest, buffers)
    return save


@contextmanager
def _discarding(partial: Path, ranks: RankGroup) -> Iterator[None]:
    """Remove the partial folder if the body raises an error, which it does on every rank."""
    try:
        yield
    except BaseException as error:
        # If a peer died, other ranks may not know it yet and still write into the folder. The next
        # save to this path removes the folder.
        if ranks.rank == 0 and not isinstance(error, PeerFailedError):
            discard(partial)
        raise


def require_shared(folder: Path, ranks: RankGroup) -> None:
    """Check that every rank sees the same folder, by a file that rank 0 creates. Collective.

    Raises:
        CheckpointError: on every rank, naming the ranks that do not see the file.
        OSError: on rank 0, if it cannot create the file; the others raise a PeerError.
    """
    # A random name: another job may check the same folder at the same time.
    path = folder / f"token-{gather_texts(ranks, uuid.uuid4().hex)[0]}"
    with raise_on_all_ranks(ranks, "opening a checkpoint"):
        if ranks.rank == 0:
            make_folder(folder)
            path.touch()
    # The first block has ended on every rank, so the file exists by now.
    with raise_on_all_ranks(ranks, "looking for rank 0's folder"):
        if not path.is_file():
            raise CheckpointError(
                f"{folder.parent} is not shared: this rank does not see a file of rank 0. "
                "Use a folder on a file system that all ranks share."
            )
    # The second block has ended on every rank, so no rank still looks for the file.
    if ranks.rank == 0:
        path.unlink(missing_ok=True)


def _open_folder(target: Path, partial: Path, ranks: RankGroup) -> None:
    """Create the partial folder on rank 0, and check that every rank sees it."""
    with raise_on_all_ranks(ranks, "opening a checkpoint"):
        require_new(target)
        if ranks.rank == 0:
            # Free the disk space of killed saves before this save needs it.
            remove_abandoned(target)
            make_folder(target.parent)
            partial.mkdir()
    require_shared(partial, ranks)


class Save:
    """A checkpoint in progress: this rank's file in a partial folder, and the commit.

    Owns: this rank's open file, until `finish`, `close` or an error.
    Lifecycle: `write`, then `commit`. In the background: `write_whole`; `copy_bucket` for each of
    `buckets`; `write_bucket` for each; `write_copies`, `finish` and `commit`. The three methods
    with an argument `before_each` call it before each tensor; its error ends the write.

    Args:
        parts: the tensors that this rank writes.
        manifest: without tensors and files, which `commit` adds.
        buffers: the optimizer's snapshot buffers, for copies of the buckets that are updated first.
            The copies are at the end of the file.
    """

    def __init__(
        self,
        target: Path,
        partial: Path,
        ranks: RankGroup,
        parts: Sequence[Part],
        manifest: Manifest,
        buffers: Sequence[torch.Tensor],
    ) -> None:
        self.ranks = ranks
        self._target = target
        self._partial = partial
        self._manifest = manifest
        self._whole = [part for part in parts if part.bucket is None]
        self._buckets: dict[int, list[Part]] = {}
        for part in parts:
            if part.bucket is not None:
                self._buckets.setdefault(part.bucket, []).append(part)
        # Buckets are numbered in backward order. Overlapped updates run in forward order, so they
        # modify the last bucket first.
        self._buckets = dict(sorted(self._buckets.items(), reverse=True))
        in_order = [part for bucket in self._buckets.values() for part in bucket]
        self._copies = _place_copies(buffers, in_order)
        direct = [part for part in in_order if part.name not in self._copies]
        # The order in which the background thread writes. The header has it from the beginning.
        name = rank_file_name(ranks.rank, ranks.world_size)
        self._file = RankFile(self._partial, name, [*self._whole, *direct, *self._copies.values()])

    @property
    def buckets(self) -> list[int]:
        """Bucket numbers, last first: the order in which overlapped updates modify them."""
        return list(self._buckets)

    def write(self) -> RankEntry:
        """Write this rank's file at once, directly from the state."""
        assert not self._copies, "copies need `copy_bucket` and `write_copies`"
        self.write_whole()
        for bucket in self._buckets:
            self.write_bucket(bucket)
        return self.finish()

    def write_whole(self) -> None:
        """Write the tensors that the optimizer does not update: frozen parameters and buffers."""
        self._file.write(self._whole)

    def copy_bucket(self, bucket: int, before_each: Callable[[], None]) -> bool:
        """Copy the tensors of a bucket that have a place in a snapshot buffer.

        Returns:
            Whether all tensors of the bucket are copied, so that it may be updated.
        """
        copied = [part for part in self._buckets[bucket] if part.name in self._copies]
        for part in copied:
            before_each()
            copy_bytes(part, self._copies[part.name])
        return len(copied) == len(self._buckets[bucket])

    def write_bucket(self, bucket: int, before_each: Callable[[], None] = lambda: None) -> None:
        """Write the tensors of a bucket that are not copied, directly from the state."""
        for part in self._buckets[bucket]:
            if part.name not in self._copies:
                before_each()
                self._file.write([part])

    def write_copies(self, before_each: Callable[[], None]) -> None:
        """Write the copies, after all other tensors."""
        for copy in self._copies.values():
            before_each()
            self._file.write([copy])

    def finish(self) -> RankEntry:
        """Flush the file to the disk and close it."""
        return self._file.finish()

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()

    def remove(self) -> None:
        """Remove this rank's file. The checkpoint cannot be committed afterwards."""
        self.close()
        self._file.path.unlink(missing_ok=True)

    def commit(self, entry: RankEntry) -> None:
        """Gather all ranks' entries; rank 0 writes the manifest and renames the folder.

        Collective.
        """
        # A rank has an entry only after its fsync. So when rank 0 has them all, all files are on
        # the disk. If the rename fails, rank 0's error is raised on every rank.
        texts = gather_texts(self.ranks, entry.model_dump_json())
        with raise_on_all_ranks(self.ranks, "committing a checkpoint"):
            if self.ranks.rank == 0:
                entries = [RankEntry.model_validate_json(text) for text in texts]
                commit_files(self._partial, self._target, manifest_of(entries, self._manifest))

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Close this rank's file and remove the folder if the body raises an error."""
        with _discarding(self._partial, self.ranks):
            try:
                yield
            except BaseException:
                self.close()
                raise


def manifest_of(entries: Sequence[RankEntry], manifest: Manifest) -> Manifest:
    """Return `manifest` with the tensors and files of all ranks.

    Raises:
        CheckpointError: a tensor has another shape, dtype or order in memory on some ranks.
    """
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        for name, tensor in entry.tensors.items():
            before = tensors.get(name)
            if before is not None:
                if (before.dtype, before.shape) != (tensor.dtype, tensor.shape):
                    raise CheckpointError(
                        f"{name!r} is {before.dtype} {before.shape} on some ranks and "
                        f"{tensor.dtype} {tensor.shape} on others. Construct the same model on all "
                        "ranks."
                    )
                pieces = [_reordered(name, piece, tensor, before) for piece in tensor.pieces]
                tensor = before.model_copy(update={"pieces": [*before.pieces, *pieces]})
            tensors[name] = tensor
    files = {entry.name: entry.file for entry in entries}
    return manifest.model_copy(update={"tensors": tensors, "files": files})


def _reordered(name: str, piece: Piece, own: TensorEntry, other: TensorEntry) -> Piece:
    """Return a piece of one rank with its dimensions in the order of another rank."""
    if own.order == other.order:
        return piece
    box = piece.box.permuted(inverse_order(own.order))
    # Ranks may see a dimension of one index in another place among the rest.
    orders = [[dim for dim in entry.order if box.sizes[dim] != 1] for entry in (own, other)]
    if orders[0] != orders[1]:
        raise CheckpointError(
            f"{name!r} has its elements in another order in memory on some ranks. Give its local "
            "parts the same memory format on all ranks."
        )
    offsets, sizes = box.permuted(other.order)
    return piece.model_copy(update={"offsets": list(offsets), "sizes": list(sizes)})


def _place_copies(buffers: Sequence[torch.Tensor], parts: Iterable[Part]) -> dict[str, Part]:
    """Assign memory in snapshot buffers to copies of parts; return these copies by name.

    Parts are placed in order. A part that does not fit is left out, but smaller ones may follow.

    Args:
        buffers: (n,) uint8 each, starting at a multiple of 128 bytes.
    """
    placed: dict[str, Part] = {}
    used = [0] * len(buffers)
    for part in parts:
        for number, buffer in enumerate(buffers):
            start, end = used[number], used[number] + part.data.nbytes
            if end <= buffer.nbytes:
                placed[part.name] = replace(part, data=buffer[start:end].view(part.data.dtype))
                # Aligned, so that a view of any dtype is possible.
                used[number] = align(end, ALIGNMENT_NBYTES)
                break
    return placed


def copy_bytes(part: Part, copy: Part) -> None:
    """Copy the data of a part into that of `copy`, on the host."""
    # NumPy copies on the calling thread alone and releases the GIL. torch would copy with all its
    # threads, on the cores that training uses.
    assert isinstance(copy.data, torch.Tensor)
    target = np.frombuffer(as_bytes(copy.data), dtype=np.uint8)
    done = 0
    for view in host_bytes(part.data):
        piece = np.frombuffer(view, dtype=np.uint8)
        np.copyto(target[done : done + piece.size], piece)
        done += piece.size


def parameter_dtypes(core: ShardedAdam, name_of: ParameterNames) -> dict[str, str]:
    """Return the dtype of each trained parameter, by its name."""
    return {
        name_of(shard.parameter): DTYPE_NAMES[shard.parameter.dtype]
        for shard in shards_of(core.states)
    }


def _parts(model: nn.Module, core: ShardedAdam, state: ModelState, *, weights: bool) -> list[Part]:
    """Return the tensors that this rank writes."""
    rank = core.ranks.rank
    sharded = [
        part
        for part in sharded_parts(model, core)
        if weights or not part.name.startswith(WEIGHTS_PREFIX)
    ]
    parts = [part for part in sharded if part.data.numel()]
    whole = {name: tensor for name, tensor in state.whole.items() if name in state.counted}
    parts += [whole_part(name, tensor) for name, tensor in whole.items()]
    if rank == 0:
        parts += [whole_part(name, tensor) for name, tensor in state.computed.items()]
        # Every tensor must be in the manifest, also one without elements on any rank.
        names = {part.name for part in parts}
        parts += [part for part in sharded if part.name not in names]
    return parts


def sharded_parts(model: nn.Module, core: ShardedAdam) -> Iterator[Part]:
    """Yield this rank's parts of all trained parameters and of their state, bucket by bucket.

    A part that another rank writes has no elements.
    """
    name_of = ParameterNames(model, core)
    for shard in shards_of(core.states):
        name = name_of(shard.parameter)
        shape, boxes = tuple(shard.parameter.shape), shard.boxes() if shard.counted else []
        tensors: dict[str, Plane] = {WEIGHTS_PREFIX + name: shard.weight}
        tensors |= {f"optimizer/{name}/{key}": plane for key, plane in shard.planes.items()}
        for full_name, data in tensors.items():
            own = data if shard.counted else data[:0]
            yield Part(full_name, shape, shard.order, boxes, own, shard.bucket)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model's state dict without the trained parameters, by names in the checkpoint.

    whole: frozen parameters and persistent buffers; the live tensors. A tensor that consists of
        several has several entries, see `dtypes.parts_of`. Some may be DTensors.
    counted: names of `whole` of which this rank saves the elements that it has.
    computed: tensors that a module computes for its state dict, and that `load_state_dict` restores
        it from: `get_extra_state`, an overridden `_save_to_state_dict`, state-dict hooks.
    values: like `computed`, but entries that are not tensors.
    tied: other names of tied tensors, each with the name under which the tensor is saved.
    """

    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def model_state(
    model: nn.Module, core: ShardedAdam, groups: Sequence[Mapping[str, Any]]
) -> ModelState:
    """Divide a model's state dict into live tensors and computed entries.

    Args:
        groups: the optimizer's parameter groups, whose option "replicas" also applies to frozen
            parameters.

    Raises:
        CheckpointError: a tensor is lazy and not initialized yet, or a checkpoint cannot hold it.
    """
    # First, because FSDP2 then drops what it has gathered, and the model shows its DTensors.
    entries = model.state_dict(keep_vars=True)
    # A buffer is in no group: the other ranks have copies, as of buffers that are not sharded.
    replicas: dict[int, Any] = {id(buffer): "copies" for buffer in model.buffers()}
    replicas |= {id(p): group.get("replicas") for group in groups for p in group["params"]}
    trained = {id(shard.parameter) for shard in shards_of(core.states)}
    first_names = {id(p): name for name, p in model.named_parameters() if id(p) in trained}
    trained_names = {*first_names.values()}
    live = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    by_memory = {memory_key(tensor): tensor for tensor in live.values()}
    by_memory.pop(None, None)  # tensors without memory are not comparable
    found = ModelState()
    for name, value in entries.items():
        full_name = f"model/{name}"
        if not isinstance(value, torch.Tensor):
            found.values[full_name] = value
            continue
        if is_lazy(value):
            raise CheckpointError(
                f"{name!r} of the model is not initialized. Run a forward pass first."
            )
        # A hook may have detached a live tensor: another object with the same memory.
        tensor = live.get(id(value), by_memory.get(memory_key(value)))
        if tensor is not None:
            first = first_names.setdefault(id(tensor), name)
            if first == name and id(tensor) not in trained:
                parts = dict(parts_of(full_name, tensor))
                found.whole.update(parts)
                if _is_counted(core, name, tensor, replicas.get(id(tensor))):
                    found.counted.update(parts)
            # No saved tensor has the name of a wrapper that consists of several.
            elif first != name and (is_dtensor(tensor) or not is_wrapper(tensor)):
                found.tied[full_name] = f"model/{first}"
        # A hook may return a copy of a trained parameter, for example a rounded one. The parameter
        # itself is saved under this name.
        elif name not in trained_names:
            found.computed[full_name] = saveable(full_name, value)
    return found


def _is_counted(core: ShardedAdam, name: str, tensor: torch.Tensor, replicas: Any) -> bool:
    """Return whether this rank saves its elements of a tensor that the optimizer does not train.

    Raises:
        CheckpointError: it is not known whether other ranks have the same elements, or they do not.
    """
    if replicas == "distinct":
        reject_distinct(name)
    try:
        return is_counted(core.ranks, name, tensor, replicas)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def memory_key(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Return a key that is equal for two views of the same elements; None without memory."""
    tensor = local_of(tensor)
    if is_lazy(tensor) or is_wrapper(tensor) or tensor.layout is not torch.strided:
        return None
    if tensor.is_nested or tensor.data_ptr() == 0:
        return None
    # A conjugate or negated view has other values in the same memory.
    values = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return tensor.data_ptr(), tensor.shape, tensor.stride(), *values


def whole_part(name: str, tensor: torch.Tensor) -> Part:
    """Return this rank's elements of a tensor that is `saveable`, or of a DTensor, as one part.

    Its values are copied if they are not contiguous in memory. They are a view if the tensor is
    dense in any order of dimensions, such as channels_last.
    """
    local = local_of(tensor).detach()
    order = memory_order(local)
    boxes = boxes_of_part(tensor, order, 0, local.numel())
    return Part(name, tuple(tensor.shape), order, boxes, in_order(local, order))
