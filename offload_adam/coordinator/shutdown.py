"""Exit of a run's process: in bounded time after a failure, with a checkpoint after a signal."""

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

# Seconds for the clean-up after an error. Then the process is ended. Clean-up takes milliseconds
# unless it waits for a dead peer, which never returns; torchrun itself kills after 30 s.
GRACE_S = 10.0
# Schedulers send SIGTERM before they end a job; Slurm's `--signal=USR1` sends SIGUSR1 instead.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Seconds. A rank's thread reads requests every `_POLL_S`, so a live rank answers well within this
# time.
ANSWER_WITHIN_S = 5.0
# The exit code that a shell reports for a process ended by SIGTERM.
EXIT_AT_ONCE = 128 + signal.SIGTERM
# Seconds. A scheduler may signal both a rank and torchrun's agent, which forwards the signal to the
# rank. Two signals within this time are therefore one request.
ONE_REQUEST_S = 3.0
_POLL_S = 0.5
_PAUSE_S = 0.05
# Longest wait in seconds for `describe_lost_steps`, which reads the disk, before the process exits.
_DISK_TIMEOUT_S = 2.0
_PREFIX = "offload_adam/preemption"


class EndingGuard:
    """Context manager: end this process if it is still running `GRACE_S` after a failure.

    Needed because the training thread may hang in one of the user's collectives, where we cannot
    raise an error, or in a clean-up that waits for dead peers.

    Owns: a thread that runs while the context is open. Open the context around the training and
        its clean-up.
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
        """After an error in the body, allow `GRACE_S` for clean-up and ignore further Ctrl-Cs.

        Python allows `signal.signal` on the main thread only.
        """
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if threading.current_thread() is threading.main_thread():
                # A second Ctrl-C would interrupt the clean-up that the first one started.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._exit_code = 128 + signal.SIGINT if interrupted else 1
            raise

    def _run(self) -> None:
        wait_until(lambda: self._over.wait(SLICE_S) or self._must_end())
        if self._over.wait(GRACE_S):
            return
        failure = self._ranks.failure
        text = failure.text if failure else f"Clean-up after an error took more than {GRACE_S:g} s."
        print(f"offload-adam: rank {self._ranks.rank}: {text}", file=sys.stderr, flush=True)
        # Not sys.exit: it raises in this thread only, and interpreter exit would wait for the hang.
        os._exit(1 if self._exit_code is None else self._exit_code)

    def _must_end(self) -> bool:
        return self._exit_code is not None or self._ranks.failure is not None


class Preemption:
    """Treats SIGTERM and SIGUSR1 as a request to save and end after the current step.

    After a rank fails, torchrun's agent also sends SIGTERM, to the surviving ranks. So a signal
    counts as a request only if every rank answers through the store. If one does not answer, the
    run has failed.

        rank that got a signal      store               every rank
        set "asked"             ->  asked           ->  reads it within `_POLL_S`
        set "answer/<rank>"     ->  answer/0..n-1   <-  set "answer/<rank>"
        all answered within `ANSWER_WITHIN_S`: `is_requested` becomes True; otherwise `accuse`

    A second SIGTERM, `ONE_REQUEST_S` or more after the first signal, ends this process at once.
    But if a peer has failed, the agent sent that SIGTERM, and the failure ends the run.

    Attributes:
        is_requested: whether the training loop is to save and end after this step.

    Owns: a thread, and a connection to the store that only this thread uses.
    Threads: the thread reads signals from a wakeup descriptor. A Python handler would not run while
        the main thread is in a collective. Blocking the signals for `sigwait` would also block them
        in other threads and in child processes.
    """

    def __init__(self, ranks: RankGroup, describe_lost_steps: Callable[[], str]) -> None:
        self.is_requested = False
        self._describe_lost_steps = describe_lost_steps
        self._ranks = ranks
        self._store = _own_store() if ranks.world_size > 1 else None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # `set_wakeup_fd` requires it
        self._ending = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="offload_adam-preemption", daemon=True
        )

    def start(self) -> None:
        """Install the handlers and start the thread. Python allows this on the main thread only."""
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _wake_only) for number in SIGNALS}
        self._thread.start()

    def stop(self, *, ignore_signals: bool) -> None:
        """Stop the thread and restore the previous handlers.

        Args:
            ignore_signals: ignore further signals instead of restoring their handlers.
        """
        self._ending.set()
        signal.set_wakeup_fd(self._previous_fd)
        if not ignore_signals:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        os.write(self._writer, b"\0")  # ends the thread's `select` at once
        self._thread.join(ANSWER_WITHIN_S + 2 * _POLL_S)
        if not self._thread.is_alive():  # else leak them: a new file could reuse their numbers
            os.close(self._reader)
            os.close(self._writer)

    def _run(self) -> None:
        """Decide on the first request of any rank; exit on a late second SIGTERM to this rank."""
        is_handled, first_signal_s = False, None
        while not self._ending.is_set():
            names = self._received()
            if self._ending.is_set():
                return
            if first_signal_s is not None and time.monotonic() - first_signal_s > ONE_REQUEST_S:
                if signal.SIGTERM.name in names:
                    self._end_at_once()
            elif not is_handled:
                is_handled = self._handle_request(names[0] if names else None)
            if names and first_signal_s is None:
                first_signal_s = time.monotonic()

    def _handle_request(self, name: str | None) -> bool:
        """Accept or reject a request to end; return False if no rank has received a signal.

        Args:
            name: the signal that this rank received, None for none.
        """
        try:
            if name is None and not (self._store and self._store.check(["asked"])):
                return False
            self._decide(name or "a signal to another rank")
        except RuntimeError as error:
            # Without a signal, the watch detects a failed store. After a signal, a failed store
            # means that torchrun's agent, which hosts it, is ending: the run has failed.
            if name is None:
                return False
            text = (
                f"Received {name}, and the store does not answer ({error}). This run has failed, "
                "and no checkpoint is saved."
            )
            accuse(Verdict((), text))
        return True

    def _end_at_once(self) -> None:
        """Print what is lost and end this process, unless another rank has failed."""
        if self._has_failed():
            return
        # `describe_lost_steps` reads the disk. If the process hangs because the disk does not
        # answer, the timer ends it.
        timer = threading.Timer(_DISK_TIMEOUT_S, os._exit, (EXIT_AT_ONCE,))
        timer.daemon = True
        timer.start()
        print(
            f"offload-adam: rank {self._ranks.rank}: Received SIGTERM again, exiting at once "
            f"in {PROGRESS.where}",
            file=sys.stderr,
            flush=True,
        )
        print(f"offload-adam: {self._describe_lost_steps()}", file=sys.stderr, flush=True)
        os._exit(EXIT_AT_ONCE)

    def _has_failed(self) -> bool:
        """Return whether a rank has failed; waits as long as the watch needs to detect that."""
        watch = self._ranks.watch
        if watch is None:
            return False
        # One beat until a peer writes the verdict, one until this rank reads it, and some slack.
        timeout_s = 2.5 * watch.failures.beat_s
        return wait_until(lambda: watch.failure is not None, pause_s=_PAUSE_S, timeout_s=timeout_s)

    def _received(self) -> list[str]:
        """Wait up to `_POLL_S` for our signals and return their names."""
        ready, _, _ = select.select([self._reader], [], [], _POLL_S)
        numbers = os.read(self._reader, 64) if ready else b""
        return [signal.Signals(n).name for n in numbers if n in SIGNALS]

    def _decide(self, name: str) -> None:
        """Accept the request if all ranks answer; otherwise end the run on all ranks."""
        silent = self._silent_ranks()
        if silent:
            text = (
                f"Received {name}, and rank(s) {silent} did not answer within {ANSWER_WITHIN_S:g} "
                "s. This run has failed, and no checkpoint is saved. Check the logs of these ranks."
            )
            accuse(Verdict(tuple(silent), text))
            return
        logger.info(
            "Received %s, ending after this step. A SIGTERM after %g s or more ends this process "
            "at once.",
            name,
            ONE_REQUEST_S,
        )
        self.is_requested = True

    def _silent_ranks(self) -> list[int]:
        store = self._store
        if store is None:
            return []
        store.set("asked", "")
        store.set(f"answer/{self._ranks.rank}", "")
        every = range(self._ranks.world_size)
        return wait_for_ranks(store, "answer", every, pause_s=_PAUSE_S, timeout_s=ANSWER_WITHIN_S)


@contextmanager
def preemptible(
    ranks: RankGroup,
    describe_lost_steps: Callable[[], str] = lambda: "the steps of this run are lost",
) -> Iterator[Preemption]:
    """Treat SIGTERM and SIGUSR1 in the body as requests to save and end.

    Args:
        describe_lost_steps: returns a sentence that names the newest checkpoint and the steps that
            are lost if the process ends at once. Called on another thread.
    """
    preemption = Preemption(ranks, describe_lost_steps)
    if threading.current_thread() is not threading.main_thread():
        yield preemption  # inactive: Python installs signal handlers on the main thread only
        return
    preemption.start()
    try:
        yield preemption
    except BaseException:
        # After a failure torchrun's agent sends SIGTERM. With the previous handler restored, it
        # would end this process before our error message is printed.
        preemption.stop(ignore_signals=ranks.world_size > 1)
        raise
    preemption.stop(ignore_signals=False)


def _wake_only(number: int, frame: FrameType | None) -> None:
    """Do nothing, but keep the signal's default action from ending the process.

    The wakeup descriptor has notified the thread already.
    """


def _own_store() -> dist.Store:
    # The store survives torchrun's restarts. The prefix separates this attempt's keys from earlier
    # ones.
    connection = connect_to_default_store(timedelta(seconds=ANSWER_WITHIN_S))
    return dist.PrefixStore(f"{_PREFIX}/{attempt()}", connection)
