"""A bound on how a worker of the command line ends: no failure may leave a process behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from offload_adam.coordinator.ranks import RankGroup

GRACE_S = 10.0
_LOOK_S = 0.5


class EndingGuard:
    """Ends this process when it does not end by itself, `GRACE_S` after it should.

    The training thread may be deep in a library, in a collective that is not ours, where nothing
    can be raised; or its clean-up may wait for peers that are gone.

    Owns: a thread, within `guarding`.
    """

    def __init__(self) -> None:
        self._exit_code: int | None = None
        self._over = threading.Event()

    @contextmanager
    def guarding(self, ranks: RankGroup) -> Iterator[None]:
        """Guard the block and its end against failures that the rank group's watch reports."""
        arguments = (ranks,)
        threading.Thread(
            target=self._run, args=arguments, name="offload_adam-ending", daemon=True
        ).start()
        try:
            yield
        finally:
            self._over.set()

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Give what follows an error in this block `GRACE_S` to end, and ignore further Ctrl-Cs."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._exit_code = 128 + signal.SIGINT if interrupted else 1
            raise

    def _run(self, ranks: RankGroup) -> None:
        while not self._over.wait(_LOOK_S):
            watch = ranks.watch
            failure = None if watch is None else watch.failure
            if failure is None and self._exit_code is None:
                continue
            if not self._over.wait(GRACE_S):
                text = "the end of this process took too long" if failure is None else failure.text
                print(f"offload-adam: rank {ranks.rank}: {text}", file=sys.stderr, flush=True)
                os._exit(1 if self._exit_code is None else self._exit_code)
