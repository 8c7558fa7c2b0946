"""Write a checkpoint while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from offload_adam.checkpoint.format import RankEntry
from offload_adam.checkpoint.optimizer_access import locked
from offload_adam.checkpoint.save import Save, open_save
from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.sharded_optimizer import ShardedOptimizer
from offload_adam.step.snapshot_lock import SnapshotLock


def begin_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any] | None = None,
) -> PendingCheckpoint:
    """Begin a checkpoint of the state as it is now, and let training go on. Collective.

    A thread copies the buckets that are updated first into the optimizer's snapshot buffer, as
    many as fit, and writes the others straight from the state. An update waits for a bucket that is
    neither copied nor written yet, so the saved bytes are those of this step. Besides this buffer
    (`snapshot_buffer_nbytes`) a rank needs 4 MiB for state on a device. Frozen parameters and
    buffers, which a forward may change, are written before this function returns.

    `commit_if_written`, called after every step, or `wait` makes it a checkpoint. If parameters are
    modified outside the optimizer meanwhile (`load_state_dict`, `clamp_`), the checkpoint fails.
    Modifications through `.data` or NumPy are not seen, so wait before them.

    Args: as `save_checkpoint`.

    Raises:
        CheckpointError: as `save_checkpoint`; another one has not been waited for.
        OSError: on the rank where writing failed; the others raise a PeerError. No file is left.
    """
    with locked(optimizer):
        core = optimizer._settled_on_all_ranks("preparing a checkpoint")
        lock = core.snapshot_lock
        with PROGRESS.at("checkpoint", long_running=True):
            save = open_save(Path(path), model, optimizer, core, extra, lock.buffers)
            with save.discarding():
                with raise_on_all_ranks(save.ranks, "writing a checkpoint"):
                    save.write_whole()
                core.external_edits.lock_snapshot(save.buckets)
                try:
                    return PendingCheckpoint(save, optimizer, lock)
                except BaseException:
                    # Updates must not wait for a thread that could not be started.
                    lock.finish_reading()
                    lock.close_snapshot()
                    raise


class PendingCheckpoint:
    """A checkpoint that a thread writes during training.

    num_waits, waited_s: how often updates of this rank waited for the thread, and for how long in
        total; set when the checkpoint is committed or has failed.

    Owns: the writing thread. Closing the optimizer abandons the checkpoint and ends the thread.
    Lifecycle: `commit_if_written` after every step, or `wait`; the same calls on every rank.
    Threads: only the thread that calls `step()`, since both are collective.
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
            Whether the checkpoint is committed now or was committed or failed before.

        Raises:
            CheckpointError, OSError, PeerError: as `wait`.
        """
        report = self._optimizer.last_step
        if self._is_over or report is None or report.notice.saved < self._number:
            return self._is_over
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until all ranks have written, and commit. Collective; does nothing the second time.

        Raises:
            CheckpointError: parameters were modified outside the optimizer meanwhile.
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
                # The thread still writes if the wait for it was interrupted.
                self._snapshot_lock.stop_reader("the wait for the checkpoint was interrupted")
                raise
            finally:
                self._snapshot_lock.close_snapshot()
                self.num_waits, self.waited_s = (
                    self._snapshot_lock.num_waits,
                    self._snapshot_lock.waited_s,
                )
            self._save.commit(entry)

    def _result(self) -> RankEntry:
        """Return what this rank has written, after a last check for modified parameters."""
        entry = self._writer.result()
        with self._optimizer._lock:
            self._optimizer._alive().external_edits.wait_for_snapshot()
        self._snapshot_lock.raise_if_invalidated()
        return entry


class _Writer:
    """The thread that writes one rank's file. It runs no kernel and no collective.

    It holds no reference to the optimizer: dropping the optimizer abandons the checkpoint.
    """

    def __init__(self, save: Save, snapshot_lock: SnapshotLock) -> None:
        self._save = save
        self._snapshot_lock = snapshot_lock
        self._entry: RankEntry | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def result(self) -> RankEntry:
        """Wait for the thread, and return its result or raise its error."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._entry is not None
        return self._entry

    def _run(self) -> None:
        try:
            self._snapshot_lock.set_reader()
            self._read(self._snapshot_lock.raise_if_invalidated)
            self._save.write_copies(self._snapshot_lock.raise_if_invalidated)
            self._snapshot_lock.raise_if_invalidated()
            self._entry = self._save.finish()
        except Exception as error:
            self._failure = error
            with suppress(OSError):
                self._save.remove()
        finally:
            self._snapshot_lock.finish_reading()

    def _read(self, before_each: Callable[[], None]) -> None:
        """Copy the buckets that fit, then write the others; free each for updates once read."""
        for bucket in self._save.buckets:
            if self._save.copy_bucket(bucket, before_each):
                self._snapshot_lock.release_bucket(bucket)
        for bucket in self._save.buckets:
            self._save.write_bucket(bucket, before_each)
            self._snapshot_lock.release_bucket(bucket)
