"""Write a checkpoint while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from offload_adam.checkpoint.rank_file import RankEntry
from offload_adam.checkpoint.save import Save, open_save
from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.sharded_optimizer.locking import serialized_by_optimizer
from offload_adam.step.read_gate import ReadGate


@serialized_by_optimizer
def begin_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None = None,
) -> PendingCheckpoint:
    """Begin a checkpoint of the state as it is now, and let training go on. Collective.

    A thread copies the buckets that are updated first, as many as the optimizer's
    `checkpoint_room_nbytes` hold, and then writes the others as they lie. An update waits for a
    bucket that has neither been copied nor written yet: so the bytes are those of this step. Beyond
    the state and that room a rank needs 4 MiB, for what lies on a device. Frozen parameters and
    buffers, which forwards may change, are written before this returns.

    It becomes a checkpoint with `commit_if_written`, asked after every step, or with `wait`. A
    change of parameters from outside while it is being written (`load_state_dict`, `clamp_`) makes
    it fail; through `.data` or NumPy nobody sees that, so wait first.

    Args: as `save_checkpoint`.

    Raises:
        CheckpointError: as `save_checkpoint`; another one has not been waited for.
        OSError: on the rank where writing failed, a PeerError on the others. Nothing is left.
    """
    optimizer.synchronize()
    with PROGRESS.at("checkpoint", long_running=True):
        save = open_save(Path(path), model, optimizer, extra, optimizer.checkpoint_rooms)
        with save.discarding(), raise_on_all_ranks(save.ranks, "writing a checkpoint"):
            save.write_whole()
        return PendingCheckpoint(save, optimizer)


class PendingCheckpoint:
    """A checkpoint that is being written beside training, and is none until it is committed.

    num_waits, waited_s: how often updates of this rank have waited for it, and for how long in all;
        known when it is over.

    Owns: the thread that writes, until the optimizer is closed at the latest: that abandons it.
    Lifecycle: `commit_if_written` after every step, or `wait`, by every rank alike.
    """

    def __init__(self, save: Save, optimizer: ShardedOptimizer) -> None:
        self._save = save
        self._optimizer = optimizer
        self._gate = optimizer.begin_reading(save.buckets)
        self._number = self._gate.num_begun
        self._writer = _Writer(save, self._gate)
        self._is_over = False
        self.num_waits = 0
        self.waited_s = 0.0

    def commit_if_written(self) -> bool:
        """Make it a checkpoint if all ranks have written theirs, as the last step has agreed.

        Collective exactly then, so every rank calls it after the same steps.

        Returns:
            Whether it is over: committed, or failed before.

        Raises:
            CheckpointError, OSError, PeerError: as `wait`.
        """
        report = self._optimizer.last_step
        if self._is_over or report is None or report.notice.saved < self._number:
            return self._is_over
        self.wait()
        return True

    def wait(self) -> None:
        """Make it a checkpoint, once all ranks have written theirs. Collective; once.

        Raises:
            CheckpointError: it cannot become one, since what it reads was changed from outside.
            OSError: on the rank where writing failed, a PeerError on the others.
        """
        if self._is_over:
            return
        self._is_over = True
        with PROGRESS.at("checkpoint", long_running=True), self._save.discarding():
            try:
                with raise_on_all_ranks(self._save.ranks, "writing a checkpoint"):
                    entry = self._result()
            finally:
                self._gate.settle()
                self.num_waits, self.waited_s = self._gate.num_waits, self._gate.waited_s
            self._save.commit(entry)

    def _result(self) -> RankEntry:
        """Return what this rank has written, having looked for changes from outside once more."""
        entry = self._writer.result()
        self._optimizer.finish_reading()
        self._gate.raise_if_spoiled()
        return entry


class _Writer:
    """The thread that writes one rank's file; it launches no kernel and talks to no other rank."""

    def __init__(self, save: Save, gate: ReadGate) -> None:
        self._save = save
        self._gate = gate
        self._entry: RankEntry | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> RankEntry:
        """Wait for the thread, and return what it has written or raise what it has met."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._entry is not None
        return self._entry

    def _run(self) -> None:
        try:
            self._gate.begin_reader()
            self._read(self._gate.raise_if_spoiled)
            self._save.write_copies(self._gate.raise_if_spoiled)
            self._gate.raise_if_spoiled()
            self._entry = self._save.finish()
        except Exception as error:
            self._failure = error
            with suppress(OSError):
                self._save.remove()
        finally:
            self._gate.finish()

    def _read(self, before_each: Callable[[], None]) -> None:
        """Copy what there is room for, and write the rest, letting updates at what is read."""
        for bucket in self._save.buckets:
            if self._save.copy_bucket(bucket, before_each):
                self._gate.free(bucket)
        for bucket in self._save.buckets:
            self._save.write_bucket(bucket, before_each)
            self._gate.free(bucket)
