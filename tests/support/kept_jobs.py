"""Jobs of one process for each rank, with kept state, for tests that kill them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from offload_adam.errors import PeerFailedError
from tests.support.kept_training import Case, Digests, Training

_WAIT_S = 60.0
ATTACHING = "attaching"
PEER_FAILED = "peer failed"


class Resumed(NamedTuple):
    """What a rank has after construction, or at the end."""

    step: int
    digests: Digests


def _train_rank(connection: Connection, case: Case, folder: Path, rank: int) -> None:
    """Import and compile all that is needed, then train when told so.

    Receives the file at which the ranks meet, and the number of steps. Sends ATTACHING, a `Resumed`
    after construction and after all steps, or PEER_FAILED.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory(dir="/dev/shm") as unused:  # imports Numba, and loads the kernels
        Training(case._replace(num_ranks=1), Path(unused)).optimizer.close()
    store, num_steps = connection.recv()
    if case.num_ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=case.num_ranks
        )
    connection.send(ATTACHING)
    try:
        training = Training(case, folder, rank)
        connection.send(Resumed(training.step, training.digests()))
        for _ in range(num_steps):
            training.train()
        connection.send(Resumed(training.step, training.digests()))
    except PeerFailedError:
        connection.send(PEER_FAILED)
        raise


class Job:
    """The processes of all ranks. They import at once, and train after `begin`.

    Owns: the processes; `close` kills those that still run.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(case.num_ranks)]
        self._connections = [pipe[0] for pipe in pipes]
        self.processes = [
            spawn.Process(target=_train_rank, args=(pipe[1], case, folder, rank), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def begin(self, store: Path, num_steps: int) -> None:
        """Start the training, and wait until all ranks are about to construct the optimizer."""
        for connection in self._connections:
            connection.send((store, num_steps))
        assert self.receive() == [ATTACHING] * len(self.processes)

    def receive(self) -> list[Any]:
        """Return the next message of each rank."""
        return [self.receive_from(rank) for rank in range(len(self.processes))]

    def receive_from(self, rank: int) -> Any:
        """Return the next message of a rank."""
        assert self._connections[rank].poll(_WAIT_S), f"rank {rank} sends nothing"
        return self._connections[rank].recv()

    def kill(self, ranks: Sequence[int]) -> None:
        """Kill ranks, and check that the others notice, raise PeerFailedError and end."""
        for rank in ranks:
            self.processes[rank].kill()
        for rank, process in enumerate(self.processes):
            process.join(_WAIT_S)
            assert process.exitcode is not None, f"rank {rank} still runs"
            if rank not in ranks:
                *_, last = self._rest_of(rank)
                assert last == PEER_FAILED, f"rank {rank} sent {last}"
                assert process.exitcode == 1
        self.close()

    def _rest_of(self, rank: int) -> list[Any]:
        messages = []
        try:
            while True:
                messages.append(self._connections[rank].recv())
        except EOFError:
            return messages

    def close(self) -> None:
        """Kill what still runs. Idempotent."""
        for process in self.processes:
            process.kill()
            process.join(_WAIT_S)
        for connection in self._connections:
            connection.close()
