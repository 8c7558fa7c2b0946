"""Join the ranks that torchrun started, and leave them cleanly whatever happens in between."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from offload_adam.coordinator.membership import Membership, open_membership
from offload_adam.coordinator.records import Process
from offload_adam.coordinator.restarts import attempt, refuse_retry
from offload_adam.coordinator.watch import roll_call
from offload_adam.options import FailurePolicy

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_PR_SET_PDEATHSIG = 1
# What other launchers leave out of torchrun's variables has a default; these have none.
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks; alone it is rank 0 of 1.

    membership: for collectives of the job itself; watched, once the ranks have joined.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    membership: Membership = field(default_factory=Membership, compare=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Return the place that torchrun's variables give, or that of a process alone.

        Without WORLD_SIZE it is alone, whatever else is set.

        Raises:
            ValueError: naming the variables that are missing or make no sense, and what to do.
        """
        if "WORLD_SIZE" not in environment:
            return cls()
        problems = list(_problems_of(environment))
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}: start the ranks with torchrun, which sets all of these "
                "in the environment, or unset WORLD_SIZE to run one process alone"
            )
        return cls(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK") or 0),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE") or 1),
        )

    @property
    def device(self) -> torch.device:
        """The device of this rank's model: the GPU of its local rank, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


@contextmanager
def joined_world(
    timeout: timedelta = COLLECTIVE_TIMEOUT, patience: FailurePolicy | None = None
) -> Iterator[World]:
    """Open the default process group for the block under torchrun, and destroy all groups after it.

    A process alone joins nothing. `timeout` bounds every collective of the default group.

    Lifecycle: whatever holds a process group (an optimizer) is closed inside the block, for an
    object that outlives the groups aborts the process at its exit.

    Raises:
        PeerFailedError: naming the ranks that do not come.
        NotRetriedError: an earlier attempt ended with what a restart cannot mend.
    """
    world = World.from_environment()
    if world.device.type == "cuda":
        _use_own_gpu(world)
    if "WORLD_SIZE" not in os.environ:
        yield world
        return
    end_with_parent()
    patience = patience or FailurePolicy()
    _open_default_group(world, timeout, patience)
    try:
        membership = open_membership(None, patience)
        try:
            yield replace(world, membership=membership)
        finally:
            membership.release()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when torchrun's agent ends, however that ends.

    A killed agent cannot stop its workers, and they would go on alone.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request stood, and no signal will come
        os.kill(os.getpid(), signal.SIGTERM)


def _problems_of(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what keeps the variables from saying where this rank is and where it meets others."""
    missing = [name for name in _REQUIRED if not environment.get(name)]
    if missing:
        yield f"WORLD_SIZE asks for ranks that join, but {', '.join(missing)} is not set"
    given = {name: environment[name] for name in _NUMBERS if environment.get(name)}
    wrong = [f"{name}={value!r}" for name, value in given.items() if not value.isdecimal()]
    if wrong:
        yield f"{', '.join(wrong)} is not a whole number"
    elif not missing and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        yield f"RANK={given['RANK']} must be below WORLD_SIZE={given['WORLD_SIZE']}"


def _use_own_gpu(world: World) -> None:
    num_gpus = torch.cuda.device_count()
    if world.local_rank >= num_gpus:
        raise RuntimeError(
            f"local rank {world.local_rank} has no GPU of its own, for there are {num_gpus}: "
            f"start torchrun with --nproc-per-node={num_gpus}, or hide the GPUs from the run "
            "with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(world.device)


def _open_default_group(world: World, timeout: timedelta, patience: FailurePolicy) -> None:
    """Initialise the default group over a store that no earlier attempt has written to.

    torchrun's agent keeps one store through its restarts. Without a prefix of their own,
    restarted ranks read the addresses of the attempt that died. Ranks meet in the store first,
    because gloo and NCCL do not say which of them is missing.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    refuse_retry(store)
    store = dist.PrefixStore(f"attempt-{attempt()}", store)
    meeting = dist.PrefixStore("meeting", store)
    meeting.set(f"rank/{world.rank}", Process.own().host)
    stay = min(timeout, timedelta(seconds=patience.stuck_after))
    roll_call(meeting, world.rank, tuple(range(world.world_size)), stay, "the start of the run")
    on_cuda = world.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
        device_id=world.device if on_cuda else None,
    )
