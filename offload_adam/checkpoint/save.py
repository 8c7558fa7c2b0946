"""Write a checkpoint: every rank its own shards, committed by one rename."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_adam.checkpoint.content import (
    ModelState,
    ParameterNames,
    Part,
    model_state,
    sharded_parts,
    whole_part,
)
from offload_adam.checkpoint.encoding import encode
from offload_adam.checkpoint.files import VerifiedFile, flush_folder
from offload_adam.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    OptimizerEntry,
    TensorEntry,
    parse_manifest,
)
from offload_adam.checkpoint.partial import discard, partial_name, publish, remove_abandoned
from offload_adam.checkpoint.rank_file import RankEntry, RankFile, rank_file_name
from offload_adam.checkpoint.room import copy_bytes, places_in
from offload_adam.coordinator.admission import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import CheckpointError, PeerFailedError
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.sharded_optimizer.locking import serialized_by_optimizer

_TOKEN_NAME = "token"


@serialized_by_optimizer
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
    optimizer.synchronize()
    with PROGRESS.at("checkpoint", long_running=True):
        save = open_save(Path(path), model, optimizer, extra)
        with save.discarding():
            with raise_on_all_ranks(save.ranks, "writing a checkpoint"):
                entry = save.write()
            save.commit(entry)


@dataclass(frozen=True, slots=True)
class Written:
    """What of a checkpoint is no tensor, as it was when the save began, see `Manifest`."""

    step: int
    optimizer: OptimizerEntry
    tied: dict[str, str]
    values: dict[str, Any]
    extra: dict[str, Any]


class Save:
    """A checkpoint that is being written, and is none yet.

    Owns: this rank's file, until `finish`, `close` or an error.
    Lifecycle: `write` at once; or `write_whole`, then `copy_bucket` and `write_bucket` for every
    one of `buckets`, `write_copies` and `finish`; then `commit`.

    Args:
        rooms: for copies of the buckets that are updated first; they come last in the file.
    """

    def __init__(
        self,
        target: Path,
        partial: Path,
        ranks: RankGroup,
        parts: Sequence[Part],
        plain: Written,
        rooms: Sequence[torch.Tensor] = (),
    ) -> None:
        self.ranks = ranks
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
        name = rank_file_name(ranks.rank, ranks.world_size)
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
        texts = gather_texts(self.ranks, entry.model_dump_json())
        with raise_on_all_ranks(self.ranks, "committing a checkpoint"):
            if self.ranks.rank == 0:
                entries = [RankEntry.model_validate_json(text) for text in texts]
                commit_files(self._partial, self._target, manifest_of(entries, self._plain))

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Remove all of it when every rank knows that it cannot become a checkpoint."""
        with _discarding(self._partial, self.ranks):
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
    ranks = optimizer.ranks
    with raise_on_all_ranks(ranks, "preparing a checkpoint"):
        if optimizer.is_being_read:
            raise CheckpointError(
                "another checkpoint is being written in the background: wait for it first"
            )
        plain = encode(optimizer.plain_state(ParameterNames(model)), "optimizer")
        state = model_state(model, optimizer)
        written = Written(
            step=optimizer.num_steps,
            optimizer=OptimizerEntry.model_validate(plain),
            tied=state.tied,
            values={name: encode(value, name) for name, value in state.values.items()},
            extra=encode(dict(extra or {}), "extra"),
        )
    # Rank 0's name for the folder: two saves of one path must not write into one.
    own = partial_name(target.name) if ranks.rank == 0 else ""
    partial = target.with_name(gather_texts(ranks, own)[0])
    with _discarding(partial, ranks):
        _open_folder(target, partial, ranks)
        with raise_on_all_ranks(ranks, "opening a checkpoint's files"):
            parts = _parts(model, optimizer, state)
            save = Save(target, partial, ranks, parts, written, rooms)
    return save


@contextmanager
def _discarding(partial: Path, ranks: RankGroup) -> Iterator[None]:
    """Remove a folder when every rank knows that nothing will come of it."""
    try:
        yield
    except BaseException as error:
        if ranks.rank == 0 and not isinstance(error, PeerFailedError):
            discard(partial)
        raise


def require_shared(folder: Path, ranks: RankGroup) -> None:
    """See on every rank a file that rank 0 writes into a folder, which it makes. Collective.

    Raises:
        CheckpointError: on every rank, naming those that do not see it.
        OSError: on rank 0 where it cannot be written, a PeerError on the others.
    """
    # A name of its own: another job may look for its token in the same folder.
    path = folder / f"{_TOKEN_NAME}-{gather_texts(ranks, uuid.uuid4().hex)[0]}"
    with raise_on_all_ranks(ranks, "opening a checkpoint"):
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
    with raise_on_all_ranks(ranks, "looking for rank 0's folder"):
        if not path.is_file():
            raise CheckpointError(
                f"{folder.parent} is not shared: this rank does not see what rank 0 has written"
            )
    if ranks.rank == 0:
        path.unlink(missing_ok=True)


def _open_folder(target: Path, partial: Path, ranks: RankGroup) -> None:
    """Make the folder on rank 0, and see on every rank that it is the same one."""
    with raise_on_all_ranks(ranks, "opening a checkpoint"):
        if target.exists():
            raise CheckpointError(f"{target} exists: a checkpoint is never written over")
        if ranks.rank == 0:
            remove_abandoned(target)
            partial.mkdir(parents=True)
    require_shared(partial, ranks)


def _parts(model: nn.Module, optimizer: ShardedOptimizer, state: ModelState) -> list[Part]:
    """Return what this rank writes; what all have whole, and names without bytes, rank 0."""
    rank = optimizer.ranks.rank
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


def manifest_of(entries: Sequence[RankEntry], plain: Written) -> Manifest:
    """Put the ranks' parts together."""
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        for name, tensor in entry.tensors.items():
            before = tensors.get(name)
            if before is not None:
                tensor = before.model_copy(update={"pieces": [*before.pieces, *tensor.pieces]})
            tensors[name] = tensor
    return Manifest(
        format_version=FORMAT_VERSION,
        step=plain.step,
        world_size=len(entries),
        tensors=tensors,
        files={entry.name: entry.file for entry in entries},
        optimizer=plain.optimizer,
        tied=plain.tied,
        values=plain.values,
        extra=plain.extra,
    )


def commit_files(partial: Path, target: Path, manifest: Manifest) -> None:
    """Check that nothing is missing, write the manifest, and rename `partial` to `target`.

    Raises:
        CheckpointError: a file is not there: some rank has written to another disk, or to one that
            has gone since. Or another save has written to `target` meanwhile.
    """
    text = manifest.to_json()
    parse_manifest(text, str(target))
    for name, entry in manifest.files.items():
        VerifiedFile(partial, name, entry).close()
    with (partial / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    publish(partial, target)
    flush_folder(target.parent)
