"""What keeps updates off the state that a checkpoint is still reading."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

import torch

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.waiting import SLICE_S, wait_until
from offload_adam.errors import CheckpointError


class SnapshotLock:
    """The buckets that one checkpoint in the background has still to read, and who waits for them.

    A reader takes the buckets one by one as they lie, or from copies that it has room for: whoever
    updates one waits until it is free.

    rooms: host memory for the reader's copies, uint8; a reading's for as long as it lasts.
    is_open: a reading has begun that is not settled.
    num_waits, waited_s: how often and how long updates have waited since `begin`.
    num_begun, num_finished: how many readings have begun, and how many are over, well or not; on
        the latter the ranks agree in each step.

    Lifecycle: `begin` by the training thread; `free` for each bucket and `finish` by the reader,
    whatever happens to it; `settle` by the training thread, and the next may begin.
    Threads: `wait_until_free` by any; the reader calls `free`, `finish` and `raise_if_invalidated`;
    all else the training thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[int] = set()
        self._unread_before: set[int] = set()
        self._invalidated_by = ""
        self._reader = 0
        self.is_open = False
        self.num_begun = 0
        self.num_finished = 0
        self.num_waits = 0
        self.waited_s = 0.0
        self.rooms: list[torch.Tensor] = []

    @property
    def room_nbytes(self) -> int:
        """Bytes of all rooms."""
        return sum(room.nbytes for room in self.rooms)

    def begin(self, buckets: Iterable[int]) -> None:
        """Hold these buckets; the reading's number is `num_begun` from now on."""
        assert not self.is_open, "one reading at a time"
        self._held = set(buckets)
        self._unread_before = set(self._held)
        self._invalidated_by = ""
        self.num_waits, self.waited_s = 0, 0.0
        self.is_open = True
        self.num_begun += 1

    def holds(self, bucket: int) -> bool:
        """Whether whoever writes a bucket would have to wait."""
        return bucket in self._held

    def wait_until_free(self, bucket: int) -> None:
        """Return when a bucket may be written."""
        if bucket not in self._held:
            return
        start_s = time.monotonic()
        with self._changed:
            if bucket not in self._held:
                return
            self.num_waits += 1
            self._wait_until(lambda: bucket not in self._held)
            self.waited_s += time.monotonic() - start_s

    def wait_until_all_free(self) -> None:
        """Return when nothing is being read."""
        with self._changed:
            self._wait_until(lambda: not self._held)
        self._unread_before = set()

    def free(self, bucket: int) -> None:
        """Let updates of a bucket go on: it has been read."""
        with self._changed:
            self._held.discard(bucket)
            self._changed.notify_all()

    def begin_reader(self) -> None:
        """Say that the calling thread is the reader."""
        self._reader = threading.get_ident()

    def finish(self) -> None:
        """Let everything go on: the reading is over."""
        with self._changed:
            self._held.clear()
            self.num_finished = self.num_begun
            self._changed.notify_all()

    def settle(self) -> None:
        """Mark the snapshot as finished, so that the next checkpoint may start."""
        self.is_open = self.num_begun > self.num_finished

    def note_changes(self, buckets: Collection[int]) -> None:
        """Hear which buckets' parameters the user has changed since the last call.

        What was still to be read then may have been read half before and half after the change.
        """
        if not self._unread_before.isdisjoint(buckets):
            self._invalidated_by = (
                "parameters were modified outside the optimizer while they were written: wait for "
                "the checkpoint before you change them, or write it without the background"
            )
        self._unread_before = set(self._held)

    def raise_if_invalidated(self) -> None:
        """Raise an error if the snapshot was invalidated.

        Raises:
            CheckpointError: saying what.
        """
        if self._invalidated_by:
            raise CheckpointError(self._invalidated_by)

    def abandon(self) -> None:
        """Let the reading end soon, and wait for that: the state is about to go."""
        if self.num_finished == self.num_begun:
            return
        self._invalidated_by = "the optimizer was closed before the checkpoint was written"
        if self._reader == threading.get_ident():
            return  # the last owner of the optimizer has gone on the reader's own thread
        with self._changed:
            self._changed.wait_for(lambda: self.num_finished == self.num_begun)

    def _wait_until(self, is_over: Callable[[], bool]) -> None:
        """Wait for the reader. The caller holds `_changed`."""
        # A rank whose reader writes to a slow disk is not hung: the wait counts as progress.
        wait_until(lambda: self._changed.wait_for(is_over, SLICE_S), check=PROGRESS.move)
