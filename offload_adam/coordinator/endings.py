"""How a process of a run ends: in bounded time after a failure, and saved after a signal."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup, attempt
from offload_adam.coordinator.verdicts import Verdict
from offload_adam.coordinator.waiting import SLICE_S, wait_for_ranks, wait_until
from offload_adam.coordinator.watchdog import accuse
from offload_adam.torch_private import connect_to_default_store

logger = logging.getLogger(__name__)

GRACE_S = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ANSWER_WITHIN_S = 5.0
EXIT_AT_ONCE = 128 + signal.SIGTERM
# A scheduler may signal a rank and torchrun's agent, which passes it on: that is one request.
ONE_REQUEST_S = 3.0
_POLL_S = 0.5
_PAUSE_S = 0.05
_LAST_WORDS_S = 2.0
_PREFIX = "offload_adam/preemption"


class EndingGuard:
    """Ends this process `GRACE_S` after a failure if it has not ended by itself.

    The training thread may hang in a collective that is not ours, where we cannot raise an error,
    or its clean-up may wait for dead peers.

    Owns: a thread, within the context, which encloses the work and the clean-up after it.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._exit_code: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="offload_adam-ending", daemon=True)

    def __enter__(self) -> EndingGuard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """After an error in the body, allow `GRACE_S` for clean-up and ignore further Ctrl-Cs."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._exit_code = 128 + signal.SIGINT if interrupted else 1
            raise

    def _run(self) -> None:
        wait_until(lambda: self._over.wait(SLICE_S) or self._must_end())
        if self._over.wait(GRACE_S):
            return
        failure = self._ranks.failure
        text = f"the clean-up took more than {GRACE_S:g} s" if failure is None else failure.text
        print(f"offload-adam: rank {self._ranks.rank}: {text}", file=sys.stderr, flush=True)
        os._exit(1 if self._exit_code is None else self._exit_code)

    def _must_end(self) -> bool:
        return self._exit_code is not None or self._ranks.failure is not None


class Preemption:
    """Takes SIGTERM and SIGUSR1 as a request to save and end after the current step.

    After a failure torchrun's agent also sends SIGTERM, to the surviving ranks. So a signal is a
    request only if every rank answers through the store; otherwise the run has failed.

    A second SIGTERM, `ONE_REQUEST_S` or more after the first signal, ends this process at once,
    unless a peer has failed: then the agent sent the SIGTERM, and the failure ends the run.

    Owns: a thread, and a connection to the store that only this thread uses.
    Threads: signals reach the thread through a wakeup descriptor. That works while the main thread
        is in a collective, and blocks no signal in other threads or child processes.
    """

    def __init__(self, ranks: RankGroup, what_stands: Callable[[], str]) -> None:
        self.is_requested = False
        self._what_stands = what_stands
        self._ranks = ranks
        self._store = _own_store() if ranks.world_size > 1 else None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._ending = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="offload_adam-preemption", daemon=True
        )

    def start(self) -> None:
        """Install the handlers and start the thread. Python allows this on the main thread only."""
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _wake_only) for number in SIGNALS}
        self._thread.start()

    def stop(self, *, deaf: bool) -> None:
        """Stop the thread and restore the previous handlers; `deaf` keeps ignoring the signals."""
        self._ending.set()
        signal.set_wakeup_fd(self._previous_fd)
        if not deaf:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        os.write(self._writer, b"\0")
        self._thread.join(ANSWER_WITHIN_S + 2 * _POLL_S)
        if not self._thread.is_alive():
            os.close(self._reader)
            os.close(self._writer)

    def _run(self) -> None:
        is_settled, told_s = False, None
        while not self._ending.is_set():
            names = self._received()
            if self._ending.is_set():
                return
            if told_s is not None and time.monotonic() - told_s > ONE_REQUEST_S:
                if signal.SIGTERM.name in names:
                    self._end_at_once()
            elif not is_settled:
                is_settled = self._settle(names[0] if names else None)
            if names and told_s is None:
                told_s = time.monotonic()

    def _settle(self, name: str | None) -> bool:
        """Act on a signal to this rank or another; return False if there was none."""
        try:
            if name is None and not (self._store and self._store.check(["asked"])):
                return False
            self._decide(name or "a signal to another rank")
        except RuntimeError as error:
            # The watch handles a failed store. With a signal besides, the run has failed.
            if name is None:
                return False
            accuse(Verdict((), f"Received {name}, and the store does not answer ({error})."))
        return True

    def _end_at_once(self) -> None:
        """Print what is lost and end this process, unless another rank has failed."""
        if self._has_failed():
            return
        # `what_stands` reads the disk, and the process may hang because of that disk.
        timer = threading.Timer(_LAST_WORDS_S, os._exit, (EXIT_AT_ONCE,))
        timer.daemon = True
        timer.start()
        print(
            f"offload-adam: rank {self._ranks.rank}: received SIGTERM again, exiting at once "
            f"in {PROGRESS.where}",
            file=sys.stderr,
            flush=True,
        )
        print(f"offload-adam: {self._what_stands()}", file=sys.stderr, flush=True)
        os._exit(EXIT_AT_ONCE)

    def _has_failed(self) -> bool:
        """Return whether a rank has failed; waits as long as the watch needs to detect that."""
        watch = self._ranks.watch
        if watch is None:
            return False
        # One beat until a peer sees the failure, one until this rank reads of it, and some slack.
        timeout_s = 2.5 * watch.failures.beat_s
        return wait_until(lambda: watch.failure is not None, pause_s=_PAUSE_S, timeout_s=timeout_s)

    def _received(self) -> list[str]:
        """Wait up to `_POLL_S` for our signals and return their names."""
        ready, _, _ = select.select([self._reader], [], [], _POLL_S)
        numbers = os.read(self._reader, 64) if ready else b""
        return [signal.Signals(n).name for n in numbers if n in SIGNALS]

    def _decide(self, name: str) -> None:
        """Accept the request if all ranks answer; otherwise fail the run."""
        silent = self._ranks_that_do_not_answer()
        if silent:
            text = (
                f"Received {name}, and rank(s) {silent} did not answer within {ANSWER_WITHIN_S:g} "
                "s. This run has failed, and no checkpoint is saved."
            )
            accuse(Verdict(tuple(silent), text))
            return
        logger.info(
            "Received %s, ending after this step. A SIGTERM %g s from now, or later, ends this "
            "process at once.",
            name,
            ONE_REQUEST_S,
        )
        self.is_requested = True

    def _ranks_that_do_not_answer(self) -> list[int]:
        store = self._store
        if store is None:
            return []
        store.set("asked", "")
        store.set(f"answer/{self._ranks.rank}", "")
        every = range(self._ranks.world_size)
        return wait_for_ranks(store, "answer", every, pause_s=_PAUSE_S, timeout_s=ANSWER_WITHIN_S)


@contextmanager
def preemptible(
    ranks: RankGroup, what_stands: Callable[[], str] = lambda: "its steps are lost"
) -> Iterator[Preemption]:
    """Take SIGTERM and SIGUSR1 in the body as requests to save and end.

    Args:
        what_stands: returns a sentence on what is saved and what is lost if the process ends at
            once. Called on another thread.
    """
    preemption = Preemption(ranks, what_stands)
    if threading.current_thread() is not threading.main_thread():
        yield preemption  # Python gives signals to the main thread only
        return
    preemption.start()
    try:
        yield preemption
    except BaseException:
        # After a failure the agent sends SIGTERM; it must not cut off our error message.
        preemption.stop(deaf=ranks.world_size > 1)
        raise
    preemption.stop(deaf=False)


def _wake_only(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wakeup descriptor has notified the thread."""


def _own_store() -> dist.Store:
    connection = connect_to_default_store(timedelta(seconds=ANSWER_WITHIN_S))
    return dist.PrefixStore(f"{_PREFIX}/{attempt()}", connection)
