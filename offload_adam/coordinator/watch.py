"""Each rank says that it lives and how far it is, and hears who does not."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections import deque
from datetime import timedelta

import torch.distributed as dist

from offload_adam.coordinator import judgement
from offload_adam.coordinator.judgement import Verdict
from offload_adam.coordinator.records import PeerRecord, Process, describe_place
from offload_adam.errors import PeerFailedError
from offload_adam.observe.place import HERE
from offload_adam.options import FailurePolicy

logger = logging.getLogger(__name__)

_VERDICT = "verdict"
_SUSPECT_AFTER_S = 2.0
_JOIN_S = 2.0


class PeerWatch:
    """Publishes this rank's place in the store, and watches the others there.

    Each rank watches the next one, so that a beat costs the store the same for any number of ranks;
    whoever finds a failure writes the verdict, which all read with their next beat. A rank whose
    own wait grows long, or breaks, looks at all of them.

    Owns: a thread, and a connection to the store that only this thread uses.
    Lifecycle: begins with `start`, when every rank's first record is in the store; ends with
        `leave`, which tells the others.
    Threads: everything but `start` and `leave` may be called by any thread.
    """

    def __init__(
        self, store: dist.Store, rank: int, global_ranks: tuple[int, ...], patience: FailurePolicy
    ) -> None:
        self.patience = patience
        self._store = store
        self._rank = rank
        self._ranks = global_ranks
        self._process = Process.own()
        self._verdict: Verdict | None = None
        self._broken: str | None = None
        self._accusation: Verdict | None = None
        self._wake = threading.Event()
        self._judged = threading.Event()
        self._ending = threading.Event()
        self._left = ""
        self._beat = 0
        self._moves, self._moved_s = -1, 0.0
        self._reached_s = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._askers: deque[threading.Event] = deque()
        self._places: tuple[PeerRecord, ...] = ()
        self._thread = threading.Thread(target=self._run, name="offload_adam-watch", daemon=True)

    def announce(self) -> None:
        """Publish the first record; the others' roll call waits for it."""
        self._publish(None)

    def start(self) -> None:
        """Begin to beat."""
        _watches.add(self)
        self._thread.start()

    def leave(self) -> None:
        """Tell the others that this rank has ended, with the error that it ends with. Idempotent.

        At exit, this must have happened: a thread that is in the store then aborts the process.
        """
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        self._left = "" if error is None else f"{type(error).__name__}: {error}"[:300]
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def places(self, wait_s: float = 1.0) -> tuple[PeerRecord, ...]:
        """Return every rank's last record, as they were a moment ago, or when last asked.

        Only the watch's own thread reads the store: it is asked, and waited for at most `wait_s`.
        """
        answered = threading.Event()
        self._askers.append(answered)
        self._wake.set()
        answered.wait(wait_s)
        return self._places

    @property
    def failure(self) -> Verdict | None:
        """The verdict that ends the run, None while nothing has failed."""
        if self._verdict is None:
            silence_s = time.monotonic() - self._reached_s
            # The thread itself may hang in a store that has gone silent.
            if not self._ending.is_set() and silence_s > self.patience.dead_after + 2.0:
                return self._unreachable(silence_s)
        return self._verdict

    def raise_failure(self) -> None:
        """Raise where a peer has failed.

        Raises:
            PeerFailedError: naming the ranks, where they were, and what to do.
        """
        failure = self.failure
        if failure is not None:
            raise self._error(failure)

    def explain(self, error: BaseException) -> PeerFailedError:
        """Find out which peer made a collective of ours fail, within about `dead_after`."""
        problem = str(error).strip().split("\n")[0][-200:]
        timed_out = "timed out" in problem.lower()
        self._broken = problem
        self._wake.set()
        beats_s = 3 * self.patience.beat_s
        self._judged.wait(beats_s if timed_out else self.patience.dead_after + beats_s)
        failure = self.failure or judgement.Verdict((), f"a collective failed: {problem}")
        return self._error(failure)

    def _condemn(self, verdict: Verdict) -> None:
        """Write the verdict where all ranks read it, unless another stands already."""
        try:
            written = self._store.compare_set(_VERDICT, "", verdict.to_json())
            verdict = Verdict.from_json(written)
        except (RuntimeError, ValueError) as error:
            logger.debug("the verdict could not be written: %s", error)
        self._verdict = verdict
        self._judged.set()

    def _error(self, verdict: Verdict) -> PeerFailedError:
        here = describe_place(HERE.step, HERE.phase, HERE.bucket)
        return PeerFailedError(
            f"{verdict.text} (This is rank {self._ranks[self._rank]}, in {here}.)", verdict.ranks
        )

    def _run(self) -> None:
        """Beat until this rank leaves."""
        while not self._ending.is_set():
            began_s = time.monotonic()
            try:
                self._publish(None)
                self._listen()
                self._answer()
                self._reached_s = time.monotonic()
            except RuntimeError as error:
                self._lose_store(error)
            self._wake.wait(self.patience.beat_s)
            self._wake.clear()
            if time.monotonic() - began_s > self.patience.dead_after / 2:
                self._seen.clear()  # this process itself was stopped, and judges nobody by that
        try:
            self._publish(self._left)
        except RuntimeError:
            logger.debug("the store was gone before this rank had left")

    def _answer(self) -> None:
        """Read all records where somebody has asked for them."""
        if self._askers:
            self._places = tuple(self._read(rank) for rank in range(len(self._ranks)))
        while self._askers:
            self._askers.popleft().set()

    def _publish(self, left: str | None) -> None:
        now_s = time.monotonic()
        if HERE.moves != self._moves:
            self._moves, self._moved_s = HERE.moves, now_s
        self._beat += 1
        record = PeerRecord.of(
            self._ranks[self._rank], self._process, self._beat, HERE, now_s - self._moved_s, left
        )
        self._store.set(f"rank/{self._rank}", record.to_json())

    def _listen(self) -> None:
        """Read the verdict, and look at the next rank, or at all of them where there is cause."""
        if self._verdict is not None:
            return
        if self._store.check([_VERDICT]):
            self._verdict = Verdict.from_json(self._store.get(_VERDICT))
            self._judged.set()
            return
        waited_s = time.monotonic() - self._moved_s if HERE.waiting else 0.0
        if self._broken is not None or waited_s > _SUSPECT_AFTER_S:
            found = self._look_at_all()
        else:
            found = self._look_at_next()
        found = found or self._accusation
        if found is not None:
            self._condemn(found)

    def _look_at_next(self) -> Verdict | None:
        """Look at the first rank behind this one that has not left."""
        for distance in range(1, len(self._ranks)):
            record = self._read((self._rank + distance) % len(self._ranks))
            if record.left is None:
                return self._sign_of_death(record)
        return None

    def _look_at_all(self) -> Verdict | None:
        others = [self._read(rank) for rank in range(len(self._ranks)) if rank != self._rank]
        for record in others:
            found = judgement.departed(record) if record.left is not None else None
            found = found or self._sign_of_death(record)
            if found is not None:
                return found
        own = self._read(self._rank)
        if self._broken is not None and "timed out" in self._broken.lower():
            return judgement.late(others, self._broken)
        return judgement.stuck([own, *others], self.patience.stuck_after)

    def _sign_of_death(self, record: PeerRecord) -> Verdict | None:
        if record.process.is_gone(self._process):
            # It may have left between its last record and this look.
            last = self._read(self._ranks.index(record.rank))
            return judgement.gone(last) if last.left is None else None
        now_s = time.monotonic()
        beat, seen_s = self._seen.get(record.rank, (-1, now_s))
        if beat != record.beat:
            self._seen[record.rank] = (record.beat, now_s)
            return None
        if now_s - seen_s > self.patience.dead_after:
            return judgement.silent(record, now_s - seen_s)
        return None

    def _read(self, rank: int) -> PeerRecord:
        return PeerRecord.from_json(self._store.get(f"rank/{rank}"))

    def _lose_store(self, error: RuntimeError) -> None:
        silence_s = time.monotonic() - self._reached_s
        logger.debug("the store does not answer: %s", error)
        if self._accusation is not None or silence_s > self.patience.dead_after:
            self._verdict = self._accusation or self._unreachable(silence_s)
            self._judged.set()

    def _unreachable(self, silence_s: float) -> Verdict:
        return Verdict(
            (),
            f"the store has been out of reach for {silence_s:.0f} s: the process that keeps it "
            "(under torchrun the agent on the first machine), or the network to it, is down.",
        )


_watches: weakref.WeakSet[PeerWatch] = weakref.WeakSet()


def accuse(verdict: Verdict) -> None:
    """End the run on all ranks with this verdict, whatever this process waits for."""
    for watch in list(_watches):
        watch._accusation = verdict
        watch._wake.set()


def roll_call(
    store: dist.Store, rank: int, global_ranks: tuple[int, ...], timeout: timedelta, what: str
) -> None:
    """Wait until every rank's first record is in the store.

    Raises:
        PeerFailedError: naming the ranks that have not come within `timeout`.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    pause_s = 0.001
    missing = [place for place in range(len(global_ranks)) if place != rank]
    while missing := [place for place in missing if not store.check([f"rank/{place}"])]:
        if time.monotonic() > deadline_s:
            absent = tuple(global_ranks[place] for place in missing)
            raise PeerFailedError(
                f"rank(s) {list(absent)} have not come to {what} within "
                f"{timeout.total_seconds():g} s, and the others wait for them: their own "
                "output says where they are",
                absent,
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
