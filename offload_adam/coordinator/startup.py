"""Join the ranks that torchrun started, and close all groups at the end, also after errors."""

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

from offload_adam.coordinator.launcher import launched, whole_number
from offload_adam.coordinator.progress import Process
from offload_adam.coordinator.ranks import RankGroup, attempt, open_rank_group
from offload_adam.coordinator.watchdog import roll_call
from offload_adam.errors import NotRetriedError
from offload_adam.options import FailurePolicy
from offload_adam.printable import show
from offload_adam.torch_private import default_store, store_without_prefixes

_MARK = "offload_adam/not_retried"  # prefix of the store's key for an error that is final
_SHARED_GPU = "shared_gpu"
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; Python has no name for it
# Other launchers set only some of torchrun's variables. These have no default.
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Rank and world size of this process; without torchrun it is rank 0 of 1.

    ranks: for the job's own collectives, with a watch over the peers inside `joined_world`.
    ranks_per_batch: number of consecutive ranks that train on the same batch, by tensor
        parallelism.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    ranks: RankGroup = field(default_factory=RankGroup, compare=False)
    ranks_per_batch: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Return the world that torchrun's variables describe; without WORLD_SIZE, a world of one.

        Raises:
            ValueError: naming the missing or invalid variables.
        """
        problems = list(_problems_of(environment)) if "WORLD_SIZE" in environment else []
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. Start the ranks with torchrun, which sets all of these "
                "in the environment, or unset WORLD_SIZE to run one process alone."
            )
        return cls(
            rank=launched("RANK", environment),
            world_size=launched("WORLD_SIZE", environment),
            local_rank=launched("LOCAL_RANK", environment),
            local_world_size=launched("LOCAL_WORLD_SIZE", environment),
        )

    @property
    def data_rank(self) -> int:
        """Index of this rank's batch among those of all ranks."""
        return self.rank // self.ranks_per_batch

    @property
    def data_world_size(self) -> int:
        """Number of different batches that the ranks train on at a time."""
        return self.world_size // self.ranks_per_batch

    @property
    def device(self) -> torch.device:
        """The device of this rank's model: a GPU, or the CPU if no GPU is visible.

        With several visible GPUs, it is the one whose index is the local rank.
        """
        if torch.cuda.is_available():
            # Slurm's --gpus-per-task and Ray make one GPU visible to each rank, with index 0.
            return torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)
        return torch.device("cpu")


@contextmanager
def joined_world(
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    failures: FailurePolicy = FailurePolicy(),
    *,
    opens_alone: bool = False,
) -> Iterator[World]:
    """Open the default process group for the body, and destroy all groups after it.

    Args:
        timeout: of every collective of the default group.
        failures: time limits after which a peer counts as failed.
        opens_alone: without torchrun, open a group of this process alone. Otherwise open nothing.

    Lifecycle: close all objects that hold a process group (an optimizer) inside the body. An object
        that outlives the groups aborts the process at exit.

    Raises:
        PeerFailedError: naming the ranks that did not join in time.
        RuntimeError: this rank's GPU is not visible; or, on all ranks, two ranks use the same GPU.
        NotRetriedError: an earlier attempt ended with an error that a restart cannot fix.
    """
    world = World.from_environment()
    if world.device.type == "cuda":
        _use_own_gpu(world)
    if "WORLD_SIZE" in os.environ:
        end_with_parent()
        _open_default_group(world, timeout, failures)
    elif opens_alone:
        _init_default_group(world, dist.HashStore(), timeout)
    else:
        yield world
        return
    try:
        ranks = open_rank_group(None, failures)
        try:
            yield replace(world, ranks=ranks)
        finally:
            ranks.release()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when torchrun's agent ends.

    An agent that is killed cannot stop its workers, which would continue to train without it.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # the agent ended before prctl, which sends no signal then
        os.kill(os.getpid(), signal.SIGTERM)


def _problems_of(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a phrase for each problem with torchrun's variables."""
    missing = [name for name in _REQUIRED if not environment.get(name)]
    if missing:
        yield f"WORLD_SIZE is in the environment, but {', '.join(missing)} is not set, or is empty"
    given = {name: environment[name] for name in _NUMBERS if environment.get(name)}
    numbers = {name: whole_number(value) for name, value in given.items()}
    wrong = [f"{name}={show(given[name])}" for name, number in numbers.items() if number is None]
    if wrong:
        yield f"{', '.join(wrong)} is not a whole number below 2**31"
    elif not missing and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        yield f"RANK={given['RANK']} must be below WORLD_SIZE={given['WORLD_SIZE']}"
    if numbers.get("LOCAL_WORLD_SIZE") == 0:
        yield "LOCAL_WORLD_SIZE=0 must be at least 1"


def _use_own_gpu(world: World) -> None:
    """Make this rank's GPU the current device; raise an error if it is not visible."""
    num_gpus = torch.cuda.device_count()
    if world.device.index >= num_gpus:
        raise RuntimeError(
            f"Local rank {world.local_rank} has no GPU: it sees {num_gpus} GPU(s). Start "
            f"torchrun with --nproc-per-node={num_gpus}, set CUDA_VISIBLE_DEVICES to one GPU for "
            "each rank, or train on the CPU with an empty CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(world.device)


def _claim_gpu(meeting: dist.Store, world: World) -> None:
    """Record in the store that this rank uses its GPU, or an error if another rank already does.

    If one GPU is visible to each rank, it has index 0 on all of them, so the UUID is compared. A
    GPU without a UUID is accepted; if two ranks share it, NCCL raises an error later.
    """
    gpu = torch.cuda.get_device_properties(world.device)
    if not hasattr(gpu, "uuid"):
        return
    own = str(world.rank)
    user = meeting.compare_set(f"gpu/{gpu.uuid}", "", own).decode()
    if user != own:
        meeting.set(
            _SHARED_GPU,
            f"Ranks {user} and {own} use the same GPU, {gpu.name} with UUID {gpu.uuid} on "
            f"{Process.own().host}. Start one rank for each GPU of a node, and make all GPUs or a "
            "different one visible to each rank (CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-task).",
        )


def _open_default_group(world: World, timeout: timedelta, failures: FailurePolicy) -> None:
    """Wait for all ranks in the store, then initialize the default group.

    gloo and NCCL do not name the ranks that are missing; `roll_call` does.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    reject_retry(store)
    # torchrun's agent keeps one store across restarts. Without this prefix, restarted ranks would
    # read the addresses of the previous attempt.
    store = dist.PrefixStore(f"attempt-{attempt()}", store)
    meeting = dist.PrefixStore("meeting", store)
    if world.device.type == "cuda":
        # Before the roll call: when it returns, every rank has claimed its GPU.
        _claim_gpu(meeting, world)
    meeting.set(f"rank/{world.rank}", Process.own().host)
    join_timeout = min(timeout, timedelta(seconds=failures.stuck_after))
    roll_call(meeting, world.rank, tuple(range(world.world_size)), join_timeout, "join the run")
    if meeting.check([_SHARED_GPU]):
        raise RuntimeError(meeting.get(_SHARED_GPU).decode())
    _init_default_group(world, store, timeout)


def _init_default_group(world: World, store: dist.Store, timeout: timedelta) -> None:
    on_cuda = world.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
        device_id=world.device if on_cuda else None,
    )


def reject_retry(store: dist.Store) -> None:
    """Raise an error if an earlier attempt ended with an error that `final` marked.

    Raises:
        NotRetriedError: quoting that error.
    """
    agent_store = store_without_prefixes(store)  # torchrun's agent keeps it across restarts
    if attempt() > 0 and agent_store.check([_mark()]):
        raise NotRetriedError(
            "Not retrying, because a restart cannot fix this error: "
            f"{agent_store.get(_mark()).decode()}"
        )


@contextmanager
def final(*kinds: type[Exception]) -> Iterator[None]:
    """Record errors of these types in the store as final; after a restart `reject_retry` raises."""
    try:
        yield
    except kinds as error:
        if dist.is_initialized():
            store = store_without_prefixes(default_store())
            store.set(_mark(), f"{type(error).__name__}: {error}")
        raise


def _mark() -> str:
    """Return the store's key for a final error of this run."""
    return f"{_MARK}/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
