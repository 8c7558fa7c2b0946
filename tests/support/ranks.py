"""A pool of spawned gloo ranks, kept for the session so that a call costs milliseconds.

    def sum_of_ranks(rank: int, world_size: int, offset: int) -> float:
        value = torch.tensor(float(rank + offset))
        dist.all_reduce(value)
        return value.item()

    def test_sum(ranks: RankPool) -> None:
        assert ranks.run(sum_of_ranks, 2, 10) == [21.0, 21.0]

The function, its arguments and its result are pickled, so it must be at the top level of a module.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar, TypeVarTuple, overload

import torch.distributed as dist

from tests.support.rank_worker import IDLE, RELEASE, Call, Raised, serve

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

# Time limits in seconds: for the start of the processes, for the ranks that remain after one has
# failed, for leaving the process group, and for a hung rank to write its stacks.
_START_S = 100.0
_GRACE_S = 10.0
_TEARDOWN_S = 30.0
_STACKS_S = 10.0


class RankDied(Exception):
    """The `type` of a `RankError` whose process ended without an answer."""


class RankError(NamedTuple):
    """How one rank failed: its exception, `TimeoutError` if it hung, or `RankDied`.

    `traceback` is the rank's own traceback, or the stacks of its threads if it hung.
    """

    type: type[BaseException]
    message: str
    rank: int
    traceback: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.type.__name__}: {self.message}"


class RanksFailedError(Exception):
    """At least one rank failed; `errors` are in the order in which they became known."""

    def __init__(self, errors: Sequence[RankError]) -> None:
        self.errors = list(errors)
        super().__init__("\n\n".join(f"{error}\n{error.traceback}".rstrip() for error in errors))


class RankPool:
    """Runs functions on ranks 0 to world_size - 1.

    Owns: the processes, a store that they meet at, and a folder for the stacks of hung ranks.
    Lifecycle: a process starts with the first call that needs it, serves until `close()`, and is
    replaced after a call in which it died or hung.
    """

    def __init__(self) -> None:
        self._store: dist.TCPStore | None = None
        self._workers: list[_Worker] = []
        self._call_numbers = itertools.count()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @overload
    def run(
        self,
        function: Callable[[int, int, *Ts], R],
        world_size: int,
        *args: *Ts,
        timeout: float = 60.0,
        env: Mapping[str, str | None] | None = None,
        expect_errors: Literal[False] = False,
    ) -> list[R]: ...

    @overload
    def run(
        self,
        function: Callable[[int, int, *Ts], R],
        world_size: int,
        *args: *Ts,
        timeout: float = 60.0,
        env: Mapping[str, str | None] | None = None,
        expect_errors: Literal[True],
    ) -> list[R | RankError]: ...

    def run(
        self,
        function: Callable[[int, int, *Ts], R],
        world_size: int,
        *args: *Ts,
        timeout: float = 60.0,
        env: Mapping[str, str | None] | None = None,
        expect_errors: bool = False,
    ) -> Any:
        """Call `function(rank, world_size, *args)` on each rank and return the results by rank.

        The default process group is new for each call and left after it. RANK, LOCAL_RANK,
        WORLD_SIZE and LOCAL_WORLD_SIZE are set as torchrun sets them, `env` over them (None
        removes a variable), and all is put back after the call.

        Args:
            timeout: seconds after which ranks that have not answered are ended. When one rank
                fails, the others have 10 seconds at most, unless errors are expected.
            expect_errors: return a `RankError` in the place of a failed rank's result.

        Raises:
            RanksFailedError: a rank failed, and that was not expected.
        """
        workers = self._idle_workers(world_size)
        payload = pickle.dumps((function, args))
        number = next(self._call_numbers)
        try:
            for rank, worker in enumerate(workers):
                worker.send(Call(number, rank, world_size, env or {}, timeout, payload))
            outcomes = _collect(workers, timeout, timeout if expect_errors else _GRACE_S)
            outcomes |= _settle(workers, outcomes)
        finally:
            self._discard_busy()
        errors = [outcome for outcome in outcomes.values() if isinstance(outcome, RankError)]
        if errors and not expect_errors:
            raise RanksFailedError(errors)
        return [outcomes[rank] for rank in range(world_size)]

    def _idle_workers(self, world_size: int) -> list[_Worker]:
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for worker in self._workers:
            worker.idle = worker.idle and worker.process.is_alive()
        self._discard_busy()
        while len(self._workers) < world_size:
            self._workers.append(_Worker(self._store.port, Path(self._folder.name)))
        workers = self._workers[:world_size]
        deadline_s = time.monotonic() + _START_S
        try:
            for worker in workers:
                if not worker.becomes_idle(deadline_s):
                    raise RuntimeError(f"a rank's process did not start within {_START_S:.0f} s")
        finally:
            self._discard_busy()
        return workers

    def _discard_busy(self) -> None:
        """Kill every process that is still busy; the next call starts new ones."""
        for worker in self._workers:
            if not worker.idle:
                worker.kill()
        self._workers = [worker for worker in self._workers if worker.idle]

    def close(self) -> None:
        """End all processes. Returns within seconds, whatever they do."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(2.0)
            worker.kill()
        self._workers = []
        self._store = None
        self._folder.cleanup()


class _Worker:
    """One process of the pool, as the pool sees it."""

    def __init__(self, store_port: int, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self._stacks = Path(tempfile.mkstemp(dir=folder)[1])
        self.process = spawn.Process(
            target=serve, args=(theirs, store_port, self._stacks), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process closes the connection
        self.idle = False
        self.released = False

    def send(self, call: Call) -> None:
        self.idle = self.released = False
        self.connection.send(tuple(call))

    def release(self) -> None:
        """Let the rank leave its process group."""
        with contextlib.suppress(OSError):  # a process that has died has left already
            self.connection.send_bytes(RELEASE)
            self.released = True

    def outcome(self, rank: int) -> Any:
        """Return the outcome that has arrived, or a `RankError` if the process died."""
        try:
            # The connection of a dead process may still hold the outcome. If it does not, and a
            # child of that process keeps it open, reading would wait for the child.
            if not self.connection.poll():
                raise EOFError
            outcome = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return RankError(RankDied, self._cause_of_death(), rank, "")
        if isinstance(outcome, Raised):
            return RankError(outcome.type, outcome.message, rank, outcome.traceback)
        return outcome

    def _cause_of_death(self) -> str:
        self.process.join(5.0)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def becomes_idle(self, deadline_s: float) -> bool:
        """Wait until the process is idle; return False if it ends or the deadline passes first."""
        if not self.idle:
            with contextlib.suppress(EOFError, OSError):
                if self.connection.poll(max(0.0, deadline_s - time.monotonic())):
                    self.idle = self.connection.recv_bytes() == IDLE
        return self.idle

    def stacks(self) -> str:
        """Return where the threads of a process that hangs stand, as far as it can still say."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            self._await_stacks(time.monotonic() + _STACKS_S)
        return self._stacks.read_text()

    def _await_stacks(self, deadline_s: float) -> None:
        """Wait until the process has begun to write its stacks, and no longer writes."""
        before = -1
        while time.monotonic() < deadline_s and before != (now := self._stacks.stat().st_size):
            before = now or -1
            time.sleep(0.3)

    def kill(self) -> None:
        self.idle = False
        self.connection.close()
        self.process.kill()
        self.process.join(5.0)


def _collect(workers: Sequence[_Worker], timeout_s: float, grace_s: float) -> dict[int, Any]:
    """Return the outcomes by rank, in the order of their arrival; hung ranks come last."""
    outcomes: dict[int, Any] = {}
    waiting = dict(enumerate(workers))
    deadline_s = time.monotonic() + timeout_s
    while waiting and (left_s := deadline_s - time.monotonic()) > 0:
        # The sentinel as well: a child process of the rank may keep the connection open.
        ready = wait(
            [w.connection for w in waiting.values()]
            + [w.process.sentinel for w in waiting.values()],
            left_s,
        )
        for rank, worker in list(waiting.items()):
            if worker.connection not in ready and worker.process.sentinel not in ready:
                continue
            outcomes[rank] = worker.outcome(rank)
            del waiting[rank]
            if isinstance(outcomes[rank], RankError):
                # Leaving closes its connections, so the collectives of the other ranks fail.
                worker.release()
                deadline_s = min(deadline_s, time.monotonic() + grace_s)
    for rank, worker in waiting.items():
        outcomes[rank] = RankError(TimeoutError, "did not answer in time", rank, worker.stacks())
    return outcomes


def _settle(workers: Sequence[_Worker], outcomes: Mapping[int, Any]) -> dict[int, RankError]:
    """Let the successful ranks leave their process group; return an error for each that cannot."""
    succeeded = [r for r, outcome in outcomes.items() if not isinstance(outcome, RankError)]
    for rank in succeeded:
        workers[rank].release()
    deadline_s = time.monotonic() + _TEARDOWN_S
    errors = {}
    for rank, worker in enumerate(workers):
        if worker.released and not worker.becomes_idle(deadline_s) and rank in succeeded:
            message = "did not leave its process group; is a collective pending?"
            errors[rank] = RankError(TimeoutError, message, rank, worker.stacks())
    return errors
