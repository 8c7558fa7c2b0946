"""Write a checkpoint: every rank its own shards, committed by one rename."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from offload_adam.checkpoint.files import (
    HostBytes,
    Part,
    RankEntry,
    RankFile,
    as_bytes,
    commit_files,
    discard,
    partial_name,
    rank_file_name,
    remove_abandoned,
)
from offload_adam.checkpoint.format import (
    DTYPE_NAMES,
    FORMAT_VERSION,
    Manifest,
    OptimizerEntry,
    TensorEntry,
    encode,
)
from offload_adam.coordinator.admission import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.membership import Membership
from offload_adam.errors import CheckpointError, PeerFailedError
from offload_adam.layout.budget import ROOM_ALIGNMENT_NBYTES
from offload_adam.layout.flat import align
from offload_adam.observe.place import HERE
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.state.state_shard import memory_order

_TOKEN_NAME = "token"


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write model and optimizer into a new folder that every rank sees. Collective.

    Each rank writes the ranges that it owns, straight from where they lie; a device's in copies of
    4 MiB. All of it goes to a folder of this save's own beside `path`, whose name ends in
    `.partial`, and one rename makes it a checkpoint when every rank's bytes are on the disk: a
    crash at any moment leaves earlier checkpoints as they are. Of several saves to one path one
    succeeds, and the others raise an error.

    Gradients are no part of it: of an accumulation in progress the weights and the state before it
    are saved, so save after a step.

    Args:
        extra: for `load_checkpoint` to return, as it is on rank 0: any nesting of lists, tuples,
            sets, dicts, numbers, text, bytes, and of tensors and NumPy arrays of up to 1 MiB. So
            the `state_dict()` of a scheduler, a sampler or a GradScaler, and states of random
            number generators. Types and values come back exactly, tensors on the host.

    Raises:
        CheckpointError: the path exists, now or when all is written; the folder is not shared by
            all ranks; or something of `extra`, of the optimizer's groups or of the model's state
            dict cannot be written. On every rank.
        OSError: on the rank where writing failed, a PeerError on the others. Nothing is left.
    """
    with optimizer.lock, HERE.at("checkpoint", patient=True):
        optimizer.synchronize()
        save = open_save(Path(path), model, optimizer, extra)
        with save.discarding():
            with raise_on_all_ranks(save.membership, "writing a checkpoint"):
                entry = save.write()
            save.commit(entry)


class Save:
    """A checkpoint that is being written, and is none yet.

    Owns: this rank's file, until `finish`, `close` or an error.
    Lifecycle: `write` at once; or `write_whole`, then `copy_bucket` and `write_bucket` for every
    one of `buckets`, `write_copies` and `finish`; then `commit`.

    Args:
        plain: all of the manifest but its tensors and files, as it was when the save began.
        rooms: for copies of the buckets that are updated first; they come last in the file.
    """

    def __init__(
        self,
        target: Path,
        partial: Path,
        membership: Membership,
        parts: Sequence[Part],
        plain: Manifest,
        rooms: Sequence[torch.Tensor] = (),
    ) -> None:
        self.membership = membership
        self._target = target
        self._partial = partial
        self._plain = plain
        self._whole = [part for part in parts if part.bucket is None]
        self._buckets: dict[int, list[Part]] = {}
        for part in parts:
            if part.bucket is not None:
                self._buckets.setdefault(part.bucket, []).append(part)
        # The bucket that the next update writes to comes first.
        self._buckets = dict(sorted(self._buckets.items(), reverse=True))
        in_order = [part for some in self._buckets.values() for part in some]
        self._copies = places_in(rooms, in_order)
        direct = [part for part in in_order if part.name not in self._copies]
        name = rank_file_name(membership.rank, membership.world_size)
        self._file = RankFile(self._partial, name, [*self._whole, *direct, *self._copies.values()])

    @property
    def buckets(self) -> list[int]:
        """The buckets that are read, in that order."""
        return list(self._buckets)

    def write(self) -> RankEntry:
        """Write all of this rank's file."""
        self.write_whole()
        for bucket in self._buckets:
            self.copy_bucket(bucket)
            self.write_bucket(bucket)
        self.write_copies()
        return self.finish()

    def write_whole(self) -> None:
        """Write what no update of the optimizer guards: frozen parameters and buffers."""
        self._file.write(self._whole)

    def copy_bucket(self, bucket: int, before_each: Callable[[], None] = lambda: None) -> bool:
        """Copy what there is room for of this rank's part of a bucket.

        Args:
            before_each: called before each tensor of it.

        Returns:
            Whether that is all of it: nobody reads the bucket any more.
        """
        copied = [part for part in self._buckets[bucket] if part.name in self._copies]
        for part in copied:
            before_each()
            copy_bytes(part, self._copies[part.name])
        return len(copied) == len(self._buckets[bucket])

    def write_bucket(self, bucket: int, before_each: Callable[[], None] = lambda: None) -> None:
        """Write from where it lies what has not been copied of this rank's part of a bucket.

        Args:
            before_each: called before each tensor of it.
        """
        for part in self._buckets[bucket]:
            if part.name not in self._copies:
                before_each()
                self._file.write([part])

    def write_copies(self, before_each: Callable[[], None] = lambda: None) -> None:
        """Write what has been copied, when all the rest has been written."""
        for copy in self._copies.values():
            before_each()
            self._file.write([copy])

    def finish(self) -> RankEntry:
        """Flush the file."""
        return self._file.finish()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def remove(self) -> None:
        """Remove this rank's file, of a checkpoint that nobody will commit."""
        self.close()
        self._file.path.unlink(missing_ok=True)

    def commit(self, entry: RankEntry) -> None:
        """Make it a checkpoint, once every rank has written. Collective."""
        texts = gather_texts(self.membership, entry.model_dump_json())
        with raise_on_all_ranks(self.membership, "committing a checkpoint"):
            if self.membership.rank == 0:
                entries = [RankEntry.model_validate_json(text) for text in texts]
                commit_files(self._partial, self._target, manifest_of(entries, self._plain))

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Remove all of it when every rank knows that it cannot become a checkpoint."""
        with _discarding(self._partial, self.membership):
            try:
                yield
            except BaseException:
                self.close()
                raise


def open_save(
    target: Path,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None,
    rooms: Sequence[torch.Tensor] = (),
) -> Save:
    """Check what is to be saved, and make the folder and every rank's file in it. Collective.

    Args:
        rooms: see `Save`.
    """
    membership = optimizer.membership
    with raise_on_all_ranks(membership, "preparing a checkpoint"):
        if optimizer.is_being_read:
            raise CheckpointError(
                "another checkpoint is being written in the background: wait for it first"
            )
        plain = encode(optimizer.plain_state(ParameterNames(model)), "optimizer")
        state = model_state(model, optimizer)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=optimizer.num_steps,
            world_size=membership.world_size,
            tensors={},
            files={},
            optimizer=OptimizerEntry.model_validate(plain),
            tied=state.tied,
            values={name: encode(value, name) for name, value in state.values.items()},
            extra=encode(dict(extra or {}), "extra"),
        )
    # Rank 0's name for the folder: two saves of one path must not write into one.
    own = partial_name(target.name) if membership.rank == 0 else ""
    partial = target.with_name(gather_texts(membership, own)[0])
    with _discarding(partial, membership):
        _open_folder(target, partial, membership)
        with raise_on_all_ranks(membership, "opening a checkpoint's files"):
            parts = _parts(model, optimizer, state)
            save = Save(target, partial, membership, parts, manifest, rooms)
    return save


@contextmanager
def _discarding(partial: Path, membership: Membership) -> Iterator[None]:
    """Remove a folder when every rank knows that nothing will come of it."""
    try:
        yield
    except BaseException as error:
        if membership.rank == 0 and not isinstance(error, PeerFailedError):
            discard(partial)
        raise


def require_shared(folder: Path, membership: Membership) -> None:
    """See on every rank a file that rank 0 writes into a folder, which it makes. Collective.

    Raises:
        CheckpointError: on every rank, naming those that do not see it.
        OSError: on rank 0 where it cannot be written, a PeerError on the others.
    """
    # A name of its own: another job may look for its token in the same folder.
    path = folder / f"{_TOKEN_NAME}-{gather_texts(membership, uuid.uuid4().hex)[0]}"
    with raise_on_all_ranks(membership, "opening a checkpoint"):
        if membership.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
    with raise_on_all_ranks(membership, "looking for rank 0's folder"):
        if not path.is_file():
            raise CheckpointError(
                f"{folder.parent} is not shared: this rank does not see what rank 0 has written"
            )
    if membership.rank == 0:
        path.unlink(missing_ok=True)


def _open_folder(target: Path, partial: Path, membership: Membership) -> None:
    """Make the folder on rank 0, and see on every rank that it is the same one."""
    with raise_on_all_ranks(membership, "opening a checkpoint"):
        if target.exists():
            raise CheckpointError(f"{target} exists: a checkpoint is never written over")
        if membership.rank == 0:
            remove_abandoned(target)
            partial.mkdir(parents=True)
    require_shared(partial, membership)


def _parts(model: nn.Module, optimizer: ShardedOptimizer, state: ModelState) -> list[Part]:
    """Return what this rank writes; what all have whole, and names without bytes, rank 0."""
    rank = optimizer.membership.rank
    if rank != 0 and not optimizer.is_sharded:
        return []
    sharded = list(sharded_parts(model, optimizer))
    parts = [part for part in sharded if part.end > part.start]
    if rank == 0:
        whole = state.whole | state.computed
        parts += [whole_part(name, tensor) for name, tensor in whole.items()]
        known = {part.name for part in parts}
        parts += [part for part in sharded if part.name not in known]
    return parts


def manifest_of(entries: Sequence[RankEntry], plain: Manifest) -> Manifest:
    """Put the ranks' parts together."""
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        for name, tensor in entry.tensors.items():
            before = tensors.get(name)
            if before is not None:
                tensor = before.model_copy(update={"pieces": [*before.pieces, *tensor.pieces]})
            tensors[name] = tensor
    files = {entry.name: entry.file for entry in entries}
    return plain.model_copy(update={"tensors": tensors, "files": files})


def places_in(rooms: Sequence[torch.Tensor], parts: Iterable[Part]) -> dict[str, Part]:
    """Return by name where copies of parts will lie: of as many, in order, as there is room for.

    A part that finds none does not keep the others out.

    Args:
        rooms: (n,) uint8 each, starting at a multiple of 128 bytes.
    """
    placed: dict[str, Part] = {}
    used = [0] * len(rooms)
    for part in parts:
        for number, room in enumerate(rooms):
            start, end = used[number], used[number] + part.data.nbytes
            if end <= room.nbytes:
                placed[part.name] = replace(part, data=room[start:end].view(part.data.dtype))
                used[number] = align(end, ROOM_ALIGNMENT_NBYTES)
                break
    return placed


def copy_bytes(part: Part, copy: Part) -> None:
    """Fill a copy, by the calling thread alone and without the interpreter's lock."""
    target = np.frombuffer(as_bytes(copy.data), dtype=np.uint8)
    done = 0
    for view in HostBytes(part.data):
        piece = np.frombuffer(view, dtype=np.uint8)
        np.copyto(target[done : done + piece.size], piece)
        done += piece.size


class ParameterNames:
    """A model's names of its parameters, a tied one under its first."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __call__(self, parameter: torch.Tensor) -> str:
        """Return the name of an optimizer's parameter.

        Raises:
            CheckpointError: it is not the model's.
        """
        name = self._names.get(id(parameter))
        if name is None:
            raise CheckpointError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not "
                "among the model's: give the model that the optimizer trains"
            )
        return name


def sharded_parts(model: nn.Module, optimizer: ShardedOptimizer) -> Iterator[Part]:
    """Yield this rank's ranges of all trained parameters and their state, bucket by bucket."""
    name_of = ParameterNames(model)
    for shard in optimizer.shards():
        name = name_of(shard.parameter)
        shape, order = tuple(shard.parameter.shape), memory_order(shard.parameter)
        tensors = {f"model/{name}": shard.weight}
        tensors |= {f"optimizer/{name}/{key}": plane for key, plane in shard.planes.items()}
        for full_name, data in tensors.items():
            yield Part(full_name, shape, order, shard.start, shard.end, data, shard.bucket)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model's state dict but for what the optimizer trains, by names in a checkpoint.

    whole: frozen parameters and saved buffers, the live tensors.
    computed: tensors that a module computes when it is saved, from which `load_state_dict` restores
        its state: `get_extra_state`, a `_save_to_state_dict` of its own, state-dict hooks.
    values: as `computed`, entries that are no tensors.
    tied: further names of live tensors, each with the one that the tensor is saved under.
    """

    whole: dict[str, torch.Tensor]
    computed: dict[str, torch.Tensor]
    values: dict[str, Any]
    tied: dict[str, str]


def model_state(model: nn.Module, optimizer: ShardedOptimizer) -> ModelState:
    """Divide a model's state dict into its live tensors and its computed entries.

    Raises:
        CheckpointError: a tensor of it is not initialized.
    """
    trained = {id(shard.parameter) for shard in optimizer.shards()}
    own = {id(p): name for name, p in model.named_parameters() if id(p) in trained}
    live = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    by_memory = {_memory(tensor): tensor for tensor in live.values()}
    by_memory.pop(None, None)
    computed_from_trained = set(own.values())
    found = ModelState({}, {}, {}, {})
    for name, value in model.state_dict(keep_vars=True).items():
        full_name = f"model/{name}"
        if not isinstance(value, torch.Tensor):
            found.values[full_name] = value
            continue
        if is_lazy(value):
            raise CheckpointError(f"{name!r} of the model is not initialized: run a forward first")
        # A hook may detach a live tensor, which makes another object of the same memory.
        tensor = live.get(id(value), by_memory.get(_memory(value)))
        if tensor is not None:
            first = own.setdefault(id(tensor), name)
            if first != name:
                found.tied[full_name] = f"model/{first}"
            elif id(tensor) not in trained:
                found.whole[full_name] = tensor.detach()
        elif name not in computed_from_trained:
            found.computed[full_name] = value.detach()
    return found


def _memory(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Return what two objects that are the same tensor have in common, None without memory."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.data_ptr() == 0:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def whole_part(name: str, tensor: torch.Tensor) -> Part:
    """Return a whole tensor as one part; a copy where its elements do not lie together."""
    if tensor.layout is not torch.strided:
        raise CheckpointError(
            f"{name} has layout {tensor.layout}: a checkpoint holds dense tensors"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
    order = memory_order(tensor)
    flat = tensor.permute(order).reshape(-1)
    return Part(name, tuple(tensor.shape), order, 0, tensor.numel(), flat)
