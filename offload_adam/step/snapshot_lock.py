"""`SnapshotLock`: updates wait while a background checkpoint still reads their bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.waiting import SLICE_S, wait_until
from offload_adam.errors import CheckpointError


class SnapshotLock:
    """Makes updates wait for the buckets that a background checkpoint has not read yet.

    A reader thread copies each bucket to a buffer or writes it to a file, then releases it.

    buffers: snapshot buffers in host memory, uint8, for the copies of one snapshot at a time.
    is_open: from `acquire_buckets` until `close_snapshot`.
    num_waits, waited_s: how often and how long updates have waited since `acquire_buckets`.
    num_begun: how many snapshots have begun.
    num_finished: how many of them the reader has finished or given up. In each step the ranks agree
        on this number.

    Lifecycle: `acquire_buckets` in the training thread; `release_bucket` for each bucket and
    `finish_reading` in the reader, also after an error; `close_snapshot` in the training thread.
    Threads: any thread may call `wait_until_free`. The reader calls `set_reader`, `release_bucket`,
    `finish_reading` and `raise_if_invalidated`; only the training thread calls the other methods.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[int] = set()  # buckets that the reader has not released yet
        self._unread_before: set[int] = set()  # `_held` as of the last `note_changes`
        self._invalidated_by = ""
        self._reader = 0
        self.is_open = False
        self.num_begun = 0
        self.num_finished = 0
        self.num_waits = 0
        self.waited_s = 0.0
        self.buffers: list[torch.Tensor] = []

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of all snapshot buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def acquire_buckets(self, buckets: Iterable[int]) -> None:
        """Begin a snapshot of these buckets; its number is `num_begun` after this call."""
        assert not self.is_open, "one snapshot at a time"
        self._held = set(buckets)
        self._unread_before = set(self._held)
        self._invalidated_by = ""
        self.num_waits, self.waited_s = 0, 0.0
        self.is_open = True
        self.num_begun += 1

    def holds(self, bucket: int) -> bool:
        """Return whether an update of a bucket has to wait."""
        # No lock: only the training thread adds buckets, and `wait_until_free` looks again.
        return bucket in self._held

    def wait_until_free(self, bucket: int) -> None:
        """Wait until the reader has released a bucket."""
        if bucket not in self._held:  # the usual case, without taking the lock
            return
        start_s = time.monotonic()
        with self._changed:
            if bucket not in self._held:
                return
            self.num_waits += 1
            self._wait_until(lambda: bucket not in self._held)
            self.waited_s += time.monotonic() - start_s

    def wait_until_all_free(self) -> None:
        """Wait until the reader has released all buckets."""
        with self._changed:
            self._wait_until(lambda: not self._held)
        self._unread_before = set()

    def release_bucket(self, bucket: int) -> None:
        """Let updates of a bucket continue: the reader has copied or written it."""
        with self._changed:
            self._held.discard(bucket)
            self._changed.notify_all()

    def set_reader(self) -> None:
        """Record the calling thread as the reader."""
        self._reader = threading.get_ident()

    def finish_reading(self) -> None:
        """Release all buckets: the reader has finished or failed."""
        with self._changed:
            self._held.clear()
            self.num_finished = self.num_begun
            self._changed.notify_all()

    def close_snapshot(self) -> None:
        """Let the next snapshot begin, if the reader has finished this one."""
        self.is_open = self.num_begun > self.num_finished

    def note_changes(self, buckets: Collection[int]) -> None:
        """Invalidate the snapshot if the user has modified parameters before they were read.

        Args:
            buckets: those with parameters that were modified since the last call.
        """
        # The time of the modification is unknown. A bucket that was unread at the last call may
        # have been read in part before the modification and in part after it.
        if not self._unread_before.isdisjoint(buckets):
            self._invalidated_by = (
                "Parameters were modified outside the optimizer while a background checkpoint "
                "still read them. Wait for the checkpoint before you modify them, or write it with "
                "save_checkpoint()."
            )
        self._unread_before = set(self._held)

    def raise_if_invalidated(self) -> None:
        """Raise an error if the snapshot was invalidated.

        Raises:
            CheckpointError: naming the reason.
        """
        if self._invalidated_by:
            raise CheckpointError(self._invalidated_by)

    def stop_reader(
        self, reason: str = "The optimizer was closed before the checkpoint was written."
    ) -> None:
        """Invalidate the snapshot and wait until the reader has stopped, if one is running.

        Args:
            reason: message of the error that waiting for the checkpoint raises.
        """
        if self.num_finished == self.num_begun:
            return
        self._invalidated_by = reason
        if self._reader == threading.get_ident():
            # The reader has dropped the last reference to the optimizer: it cannot wait for itself.
            return
        with self._changed:
            self._changed.wait_for(lambda: self.num_finished == self.num_begun)

    def _wait_until(self, is_over: Callable[[], bool]) -> None:
        """Wait for the reader. The caller holds `_changed`."""
        # A rank whose reader writes to a slow disk is not hung: the wait counts as progress.
        wait_until(lambda: self._changed.wait_for(is_over, SLICE_S), check=PROGRESS.move)
