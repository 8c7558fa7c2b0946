"""Heartbeats through the store: each rank publishes its progress and detects failed peers."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from offload_adam.coordinator.progress import PROGRESS, PeerRecord, Process
from offload_adam.coordinator.verdicts import (
    Verdict,
    dead_verdict,
    exited_verdict,
    hung_verdict,
    late_verdict,
    silent_verdict,
    unreachable_verdict,
)
from offload_adam.coordinator.waiting import wait_for_ranks
from offload_adam.errors import PeerFailedError
from offload_adam.options import FailurePolicy

logger = logging.getLogger(__name__)

_VERDICT = "verdict"
# A rank that waits longer in a collective reads all ranks' records at each heartbeat, not only the
# next rank's. Far above an ordinary wait, so that usual steps cost one read a beat, and far below
# `stuck_after`, which is judged from these records.
_SUSPECT_AFTER_S = 2.0
# Longest wait at exit for the heartbeat thread to publish that this rank leaves, which takes
# milliseconds. If the store hangs, the thread is a daemon and ends with the process.
_JOIN_S = 2.0


class PeerWatch:
    """Publishes this rank's record in the store and watches its peers' records.

        heartbeat of rank r:   set rank/r  ->  check verdict  ->  get rank/(r + 1)

    So a heartbeat makes a fixed number of store calls, for any number of ranks. A rank reads all
    ranks' records only if it waits long in a collective or its collective failed. A rank that
    detects a failure writes the verdict. All ranks read the verdict with their next heartbeat.

    Owns: a thread, and a connection to the store that only this thread uses.
    Lifecycle: `announce`, then `start` when every rank's first record is in the store. `leave`
        tells the peers that this rank ends.
    Threads: any thread may call all methods except `announce`, `start` and `leave`.
    """

    def __init__(
        self, store: dist.Store, rank: int, global_ranks: tuple[int, ...], failures: FailurePolicy
    ) -> None:
        self.failures = failures
        self._store = store
        self._rank = rank
        self._global_ranks = global_ranks
        self._process = Process.own()
        self._verdict: Verdict | None = None
        self._collective_error: str | None = None  # text of the error that a collective raised
        self._accusation: Verdict | None = None  # see `accuse`
        self._wake = threading.Event()
        self._has_verdict = threading.Event()
        self._ending = threading.Event()
        self._last_error = ""
        self._beat = 0
        self._moves, self._moved_s = -1, 0.0  # last `PROGRESS.moves`, and since when
        self._reached_s = time.monotonic()  # when the store last answered
        # By rank: number of the last heartbeat read, and this process's time when it was first
        # read. No other clock is used, so the clocks of the nodes need not agree.
        self._seen: dict[int, tuple[int, float]] = {}
        self._readers: deque[threading.Event] = deque()
        self._records: tuple[PeerRecord, ...] = ()
        self._thread = threading.Thread(target=self._run, name="offload_adam-watch", daemon=True)

    def announce(self) -> None:
        """Publish the first record, for which the peers' `roll_call` waits."""
        self._publish(None)

    def start(self) -> None:
        """Start the heartbeat thread."""
        _watches.add(self)
        self._thread.start()

    def leave(self) -> None:
        """Publish that this rank ends, and with which error, and stop the thread. Idempotent.

        Call it before the interpreter exits: a thread in a store call at exit aborts the process.
        """
        # `last_value` is the error that ended the main program, seen from an exit handler.
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        self._last_error = "" if error is None else f"{type(error).__name__}: {error}"[:300]
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def read_records(self, wait_s: float = 1.0) -> tuple[PeerRecord, ...]:
        """Return every rank's current record.

        Only the heartbeat thread reads the store, so this method asks that thread.

        Args:
            wait_s: seconds; without an answer by then, returns the records of the previous call.
        """
        answered = threading.Event()
        self._readers.append(answered)
        self._wake.set()
        answered.wait(wait_s)
        return self._records

    @property
    def failure(self) -> Verdict | None:
        """The verdict that ends the run, None while no rank has failed."""
        if self._verdict is None:
            silence_s = time.monotonic() - self._reached_s
            # The heartbeat thread itself may hang in a store that does not answer, so the calling
            # thread also decides, 2 s later than `_note_store_error` would.
            if not self._ending.is_set() and silence_s > self.failures.dead_after + 2.0:
                return unreachable_verdict(silence_s)
        return self._verdict

    def raise_failure(self) -> None:
        """Raise an error if a peer has failed.

        Raises:
            PeerFailedError: naming the failed ranks, their last phase, and what to do.
        """
        failure = self.failure
        if failure is not None:
            raise self._error(failure)

    def explain(self, error: BaseException) -> PeerFailedError:
        """Return an error that names the failed peer; wait for up to about `dead_after` to find it.

        Args:
            error: raised by a collective.
        """
        # The reason is at the end of the first line. A C++ backtrace may follow on further lines.
        problem = str(error).strip().split("\n")[0][-200:]
        timed_out = "timed out" in problem.lower()
        self._collective_error = problem
        self._wake.set()
        # A peer on another node counts as dead only after `dead_after` without a heartbeat. After a
        # timeout all peers may be alive, and the next check of all ranks decides. Three beats leave
        # time for that check.
        beats_s = 3 * self.failures.beat_s
        self._has_verdict.wait(beats_s if timed_out else self.failures.dead_after + beats_s)
        text = (
            f"A collective failed: {problem}. No rank was found dead; check the logs of all ranks."
        )
        failure = self.failure or Verdict((), text)
        return self._error(failure)

    def _publish_verdict(self, verdict: Verdict) -> None:
        """Write the verdict for all ranks; if the store has one already, use that one."""
        try:
            # An empty expected value writes only if the key is missing; returns what is stored.
            written = self._store.compare_set(_VERDICT, "", verdict.to_json())
            verdict = Verdict.from_json(written)
        except (RuntimeError, ValueError) as error:
            logger.debug("Could not write the verdict: %s", error)  # this rank ends all the same
        self._accept(verdict)

    def _accept(self, verdict: Verdict) -> None:
        """Take a verdict as final, and continue its ranks that are stopped on this machine.

        A continued rank reads the verdict and ends by itself. A stopped one would not receive
        torchrun's SIGTERM, and torchrun would kill it only 30 s later.
        """
        self._verdict = verdict
        self._has_verdict.set()
        for rank, global_rank in enumerate(self._global_ranks):
            if global_rank in verdict.ranks:
                self._read(rank).process.resume(self._process)

    def _error(self, verdict: Verdict) -> PeerFailedError:
        rank = self._global_ranks[self._rank]
        return PeerFailedError(
            f"{verdict.text} (This is rank {rank}, in {PROGRESS.where}.)", verdict.ranks
        )

    def _run(self) -> None:
        """Send heartbeats until this rank leaves."""
        while not self._ending.is_set():
            began_s = time.monotonic()
            try:
                self._publish(None)
                self._look_for_failures()
                self._answer_readers()
                self._reached_s = time.monotonic()
            except RuntimeError as error:
                self._note_store_error(error)
            self._wake.wait(self.failures.beat_s)
            self._wake.clear()
            if time.monotonic() - began_s > self.failures.dead_after / 2:
                # This process was suspended and read no heartbeats meanwhile. Forget the times of
                # the old ones, so that live peers do not count as silent.
                self._seen.clear()
        try:
            self._publish(self._last_error)
        except RuntimeError:
            logger.debug("Could not publish that this rank left: the store is closed")

    def _answer_readers(self) -> None:
        """Read all records if a thread waits in `read_records`, and wake that thread."""
        if self._readers:
            self._records = tuple(self._read(rank) for rank in range(len(self._global_ranks)))
        while self._readers:
            self._readers.popleft().set()

    def _publish(self, left: str | None) -> None:
        """Write this rank's record to the store; `left` is the field of `PeerRecord`."""
        now_s = time.monotonic()
        if PROGRESS.moves != self._moves:
            self._moves, self._moved_s = PROGRESS.moves, now_s
        self._beat += 1
        record = PeerRecord(
            self._global_ranks[self._rank],
            self._process,
            self._beat,
            replace(PROGRESS),
            now_s - self._moved_s,
            left,
        )
        self._store.set(f"rank/{self._rank}", record.to_json())

    def _look_for_failures(self) -> None:
        """Read the verdict. Without one, check the next rank, or all if a collective hangs."""
        if self._verdict is not None:
            return
        if self._store.check([_VERDICT]):
            self._accept(Verdict.from_json(self._store.get(_VERDICT)))
            return
        waited_s = time.monotonic() - self._moved_s if PROGRESS.waiting else 0.0
        if self._collective_error is not None or waited_s > _SUSPECT_AFTER_S:
            found = self._check_all_ranks()
        else:
            found = self._check_next_rank()
        found = found or self._accusation
        if found is not None:
            self._publish_verdict(found)

    def _check_next_rank(self) -> Verdict | None:
        """Check the next rank that has not left, in the order of ranks."""
        for distance in range(1, len(self._global_ranks)):
            record = self._read((self._rank + distance) % len(self._global_ranks))
            if record.left is None:
                return self._find_death(record)
        return None

    def _check_all_ranks(self) -> Verdict | None:
        """Check all ranks for failures of any kind: this rank waits for one of them."""
        others = [self._read(rank) for rank in range(len(self._global_ranks)) if rank != self._rank]
        for record in others:
            found = exited_verdict(record) if record.left is not None else None
            found = found or self._find_death(record)
            if found is not None:
                return found
        own = self._read(self._rank)
        if self._collective_error is not None and "timed out" in self._collective_error.lower():
            return late_verdict(others, self._collective_error)
        return hung_verdict([own, *others], self.failures.stuck_after)

    def _find_death(self, record: PeerRecord) -> Verdict | None:
        """Return a verdict if a rank's process is gone or its heartbeats have stopped."""
        if record.process.is_gone(self._process):
            # Between the first read and `is_gone`, the rank may have published that it leaves.
            last = self._read(self._global_ranks.index(record.rank))
            return dead_verdict(last) if last.left is None else None
        now_s = time.monotonic()
        beat, seen_s = self._seen.get(record.rank, (-1, now_s))
        if beat != record.beat:
            self._seen[record.rank] = (record.beat, now_s)
            return None
        if now_s - seen_s > self.failures.dead_after:
            return silent_verdict(record, now_s - seen_s)
        return None

    def _read(self, rank: int) -> PeerRecord:
        return PeerRecord.from_json(self._store.get(f"rank/{rank}"))

    def _note_store_error(self, error: RuntimeError) -> None:
        """End the run if the store has not answered for `dead_after`, or after an accusation."""
        silence_s = time.monotonic() - self._reached_s
        logger.debug("The store does not answer: %s", error)
        if self._accusation is not None or silence_s > self.failures.dead_after:
            self._verdict = self._accusation or unreachable_verdict(silence_s)
            self._has_verdict.set()


_watches: weakref.WeakSet[PeerWatch] = weakref.WeakSet()


def accuse(verdict: Verdict) -> None:
    """End the run on all ranks with this verdict. Any thread may call it, also during a wait."""
    for watch in list(_watches):
        watch._accusation = verdict
        watch._wake.set()


def roll_call(
    store: dist.Store, rank: int, global_ranks: tuple[int, ...], timeout: timedelta, what: str
) -> None:
    """Wait until every rank's first record is in the store.

    Args:
        what: the action that the ranks' records stand for, such as "join the run".

    Raises:
        PeerFailedError: naming the ranks whose record is missing after `timeout`.
    """
    timeout_s = timeout.total_seconds()
    peers = [peer for peer in range(len(global_ranks)) if peer != rank]
    # Polls less often the longer the wait: 1000 ranks may wait for one slow rank.
    missing = wait_for_ranks(
        store,
        "rank",
        peers,
        pause_s=0.001,
        longest_pause_s=0.2,
        timeout_s=timeout_s,
    )
    if missing:
        absent = tuple(global_ranks[peer] for peer in missing)
        raise PeerFailedError(
            f"Timed out after {timeout_s:g} s waiting for rank(s) {list(absent)} to {what}. "
            "Check the logs of these ranks.",
            absent,
        )
