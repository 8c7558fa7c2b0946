"""Writes a checkpoint in a thread while training continues."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from offload_adam.checkpoint.format import RankEntry
from offload_adam.checkpoint.optimizer_access import locked
from offload_adam.checkpoint.save import Save, open_save
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.step.snapshot_lock import SnapshotLock


def begin_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None = None,
) -> PendingCheckpoint:
    """Start a checkpoint of the current state, and return while a thread writes it. Collective.

    Frozen parameters and buffers, which a forward may modify, are written before this function
    returns. The thread then copies the buckets that are updated first into the snapshot buffer, as
    many as fit, and writes the others directly from the state. An update waits for a bucket that is
    neither copied nor written, so the checkpoint holds the state of this step.

    To commit the checkpoint, call `commit_if_written` after every step, or `wait`. If parameters
    are modified outside the optimizer before that (`load_state_dict`, `clamp_`), the checkpoint
    fails. Modifications through `.data` or NumPy are not detected: call `wait` before them.

    Args:
        path, model, optimizer, extra: as `save_checkpoint`.

    Raises:
        CheckpointError: as `save_checkpoint`; or another checkpoint is still being written.
        OSError: on the rank where writing failed; the others raise a PeerError. No file is left.

    Cost: `OffloadPolicy.snapshot_buffer_nbytes` of host memory, and 4 MiB for state on a device.
    """
    with locked(optimizer):
        core = optimizer._settled_on_all_ranks("preparing a checkpoint")
        lock = core.snapshot_lock
        with PROGRESS.at("checkpoint", long_running=True):
            save = open_save(Path(path), model, optimizer, core, extra, lock.buffers)
            with save.discarding():
                # A forward may modify these tensors without waiting, so they are written first.
                with raise_on_all_ranks(save.ranks, "writing a checkpoint"):
                    core.external_edits.reject_replaced()
                    save.write_whole()
                # From here on, updates wait for buckets that the thread has not read.
                core.external_edits.lock_snapshot(save.buckets)
                try:
                    return PendingCheckpoint(save, optimizer, lock)
                except BaseException:
                    # The thread could not be started: updates must not wait for it.
                    lock.finish_reading()
                    lock.close_snapshot()
                    raise


class PendingCheckpoint:
    """A checkpoint that a thread writes during training.

    Attributes:
        num_waits: how often updates of this rank waited for the thread. Set when the checkpoint is
            committed or has failed, as `waited_s`.
        waited_s: their total wait in seconds.

    Owns: the writing thread. Closing the optimizer cancels the checkpoint and ends the thread.
    Lifecycle: `commit_if_written` after every step, or `wait`; the same calls on every rank.
    Threads: only the training thread may call these methods, since both are collective.
    """

    def __init__(
        self, save: Save, optimizer: ShardedOptimizer, snapshot_lock: SnapshotLock
    ) -> None:
        self._save = save
        self._optimizer = optimizer
        self._snapshot_lock = snapshot_lock
        self._number = self._snapshot_lock.num_begun
        self._writer = _Writer(save, self._snapshot_lock)
        self._is_over = False
        self.num_waits = 0
        self.waited_s = 0.0

    def commit_if_written(self) -> bool:
        """Commit if the last step's all-reduce reported that every rank finished writing.

        Collective only when it commits, so call it on all ranks after the same step.

        Returns:
            Whether the checkpoint is over: this or an earlier call has committed it, or it failed.

        Raises:
            CheckpointError, OSError, PeerError: as `wait`.
        """
        # The all-reduce of each step carries the smallest number of finished snapshots of all
        # ranks. So all ranks see the same number and decide alike, without another collective.
        report = self._optimizer.last_step
        if self._is_over or report is None or report.notice.saved < self._number:
            return self._is_over
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until all ranks have written, and commit. Collective. A second call does nothing.

        Raises:
            CheckpointError: parameters were modified outside the optimizer in the meantime.
            OSError: on the rank where writing failed; the others raise a PeerError.
        """
        if self._is_over:
            return
        self._is_over = True
        with PROGRESS.at("checkpoint", long_running=True), self._save.discarding():
            try:
                with raise_on_all_ranks(self._save.ranks, "writing a checkpoint"):
                    entry = self._result()
            except BaseException:
                # After a KeyboardInterrupt the thread still writes, but `discarding` is about to
                # remove the folder.
                self._snapshot_lock.stop_reader("Waiting for the checkpoint was interrupted.")
                raise
            finally:
                self._snapshot_lock.close_snapshot()
                self.num_waits = self._snapshot_lock.num_waits
                self.waited_s = self._snapshot_lock.waited_s
            self._save.commit(entry)

    def _result(self) -> RankEntry:
        """Return this rank's part of the manifest, after a last check for modified parameters."""
        entry = self._writer.result()
        # Edits since the last step are not detected yet, but the written bytes may contain them.
        with self._optimizer._lock:
            self._optimizer._alive().external_edits.wait_for_snapshot()
        self._snapshot_lock.raise_if_invalidated()
        return entry


class _Writer:
    """The thread that writes one rank's file. It calls no kernel and no collective."""

    # No reference to the optimizer: deleting the optimizer must cancel the checkpoint.

    def __init__(self, save: Save, snapshot_lock: SnapshotLock) -> None:
        self._save = save
        self._snapshot_lock = snapshot_lock
        self._entry: RankEntry | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> RankEntry:
        """Wait for the thread; return its result or raise its error."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._entry is not None
        return self._entry

    def _run(self) -> None:
        try:
            self._snapshot_lock.set_reader()
            self._read()
            # An edit may have been detected while the last tensor was read.
            self._snapshot_lock.raise_if_invalidated()
            self._entry = self._save.finish()
        except Exception as error:
            self._failure = error
            with suppress(OSError):
                self._save.remove()
        finally:
            # Also after an error: otherwise updates would wait forever.
            self._snapshot_lock.finish_reading()

    def _read(self) -> None:
        """Copy the tensors that fit, then write all. Release each bucket once it is read."""
        check = self._snapshot_lock.raise_if_invalidated
        # All copies first: memory is faster than the disk, so these updates wait only briefly.
        for bucket in self._save.buckets:
            if self._save.copy_bucket(bucket, check):
                self._snapshot_lock.release_bucket(bucket)
        for bucket in self._save.buckets:
            self._save.write_bucket(bucket, check)
            self._snapshot_lock.release_bucket(bucket)
        self._save.write_copies(check)
