"""The ranks that share an optimizer, and the process groups that only the optimizer uses."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.verdicts import Verdict
from offload_adam.coordinator.waiting import SLICE_S, wait_until
from offload_adam.coordinator.watchdog import PeerWatch, roll_call
from offload_adam.options import FailurePolicy
from offload_adam.printable import show
from offload_adam.torch_private import (
    abort_collectives,
    connect_to_default_store,
    open_group,
    timeout_of,
)

logger = logging.getLogger(__name__)

_SLICE = timedelta(seconds=SLICE_S)
# Seconds between two queries of a collective on a device: much longer than a query takes, and much
# shorter than a collective.
_POLL_S = 2e-4


@dataclass
class RankGroup:
    """Rank, size and process groups of the ranks that share the optimizer state.

    Owns: a gloo group for control messages, one group per device type for buckets, and the watch
        over the peers. The user's collectives run on other groups. A world of one owns nothing.
    Lifecycle: call `open_rank_group` on every rank; `release` closes the groups.
    Threads: any thread may `wait`, each for its own work.

    rank: this process's rank in the user's group, whose order may differ from the default group's.
    control: the gloo group, None after `release`.
    data: the group for buckets, by device type.
    parts: groups of some of the ranks, by device type and ranks of the default group.
    global_ranks: for each rank of the user's group, its rank in the default group.
    name: the same on these ranks, and never used by another rank group.
    timeout: of every collective, as the user set it for the group.
    watch: None in a world of one, or if the store does not support one.
    """

    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None
    data: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    parts: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = field(default_factory=dict)
    global_ranks: tuple[int, ...] = (0,)
    name: str = ""
    timeout: timedelta = timedelta(minutes=30)
    watch: PeerWatch | None = None
    _unfinished: set[dist.Work] = field(default_factory=set)

    def to_global(self, ranks: Iterable[int]) -> list[int]:
        """Translate ranks of the user's group into ranks of the default group, for messages."""
        return [self.global_ranks[rank] for rank in ranks]

    def open_data_groups(self, device_types: Iterable[str]) -> None:
        """Open the groups for buckets on device types that have none yet. Collective."""
        if self.world_size == 1:
            return
        # Sorted, because every rank must open the groups in the same order.
        for device_type in sorted(set(device_types) - set(self.data)):
            backend = "nccl" if device_type == "cuda" else "gloo"
            self.data[device_type] = _open_group(self, device_type, backend)

    def open_part(self, device_type: str, members: tuple[int, ...]) -> None:
        """Open a group of some of the ranks, if there is none yet. Collective for its members.

        Args:
            members: ranks of the default group, in the group's order.
        """
        if len(members) > 1 and (device_type, members) not in self.parts:
            name = f"{self.name}/{device_type}/{members}"
            backend = "nccl" if device_type == "cuda" else "gloo"
            rank = members.index(self.global_ranks[self.rank])
            group = open_group(name, members, rank, backend, self.timeout)
            self.parts[device_type, members] = group

    def data_group(self, device: torch.device) -> dist.ProcessGroup:
        """Return the group for collectives on tensors of this device."""
        self._require_open()
        return self.data[device.type]

    def wait(self, work: dist.Work | None, *, on_device: bool = False) -> None:
        """Wait for a collective, and raise an error if a peer has failed by the end of the wait.

        A wait for a collective on host memory is cut into slices of `SLICE_S`. A wait shorter than
        a slice costs no more than `work.wait()`. A collective on a device is polled.

        Args:
            work: returned by a collective with `async_op=True`.
            on_device: the collective works on device memory.

        Raises:
            PeerFailedError: naming the failed ranks, their last phase, and what to do.
        """
        assert work is not None
        PROGRESS.wait(True)
        # If an error or Ctrl-C ends the wait early, the work stays in this set: see `release`.
        self._unfinished.add(work)
        try:
            is_over = partial(self._is_over, work, on_device)
            self.wait_until(is_over, pause_s=_POLL_S if on_device else 0.0)
            self._unfinished.discard(work)
        finally:
            PROGRESS.wait(False)
        # A stopped rank that is continued after its verdict may complete the collective.
        self.raise_failure()

    def wait_until(
        self,
        is_over: Callable[[], bool],
        *,
        pause_s: float = 0.0,
        longest_pause_s: float | None = None,
    ) -> None:
        """Wait for a condition that may depend on other ranks.

        Args: as those of `waiting.wait_until`.

        Raises:
            PeerFailedError: naming the failed ranks, their last phase, and what to do.
        """
        wait_until(
            is_over, check=self.raise_failure, pause_s=pause_s, longest_pause_s=longest_pause_s
        )

    @property
    def failure(self) -> Verdict | None:
        """The verdict on the failed ranks, None while all ranks run."""
        return None if self.watch is None else self.watch.failure

    def raise_failure(self) -> None:
        """Raise an error if a peer has failed.

        Raises:
            PeerFailedError: naming the failed ranks, their last phase, and what to do.
        """
        if self.watch is not None:
            self.watch.raise_failure()

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Name the failed peer if a collective of torch itself fails in the body.

        Raises:
            PeerFailedError: in place of the error of DDP's or FSDP2's collective.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo raises a plain RuntimeError, as a mistake in the user's model may.
            is_collective = isinstance(error, dist.DistError) or "/gloo/" in str(error)
            if self.watch is None or not is_collective:
                raise
            raise self.watch.explain(error) from error

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Reduce a host tensor over the ranks, in place. Collective."""
        if self.world_size > 1:
            self.wait(dist.all_reduce(tensor, operation, group=self._open_control(), async_op=True))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's host tensor in rank order; all have the same shape. Collective."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        self.wait(dist.all_gather(gathered, tensor, group=self._open_control(), async_op=True))
        return gathered

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's host tensor to every rank, in place. Collective."""
        if self.world_size > 1:
            source = self.global_ranks[0]
            self.wait(dist.broadcast(tensor, source, group=self._open_control(), async_op=True))

    def _open_control(self) -> dist.ProcessGroup:
        """Return the control group."""
        self._require_open()
        assert self.control is not None  # torch would take None as the default group
        return self.control

    def _require_open(self) -> None:
        # `destroy_process_group` destroys our groups, too.
        if self.control is None or not dist.is_initialized():
            raise RuntimeError(
                "The process groups of this optimizer are closed. Construct a new optimizer to "
                "continue training."
            )

    def _is_over(self, work: dist.Work, on_device: bool) -> bool:
        """Return whether a collective is complete, after at most one slice on host memory.

        Raises:
            PeerFailedError, or RuntimeError without a watch: the collective has failed.
        """
        try:
            if not on_device:
                work.wait(_SLICE)
            elif work.is_completed():
                work.wait()  # makes the current stream wait for the collective's stream
            else:
                return False  # polled: `wait(timeout)` would make NCCL abort its communicator
        except RuntimeError as error:
            # gloo raises the same error for a wait that timed out and for a failed collective.
            if not work.is_completed():
                return False
            raise error if self.watch is None else self.watch.explain(error) from error
        return True

    def broadcast_data(self, tensor: torch.Tensor) -> None:
        """Copy rank 0's tensor, on any device, to every rank, in place. Collective."""
        if self.world_size > 1:
            group = self.data_group(tensor.device)
            source = self.global_ranks[0]
            work = dist.broadcast(tensor, source, group=group, async_op=True)
            self.wait(work, on_device=tensor.is_cuda)

    def abort_devices(self) -> None:
        """Abort the collectives on devices if a peer has failed: that peer never joins them.

        Without this, unpinning memory and exiting would wait until the backend's own timeout.
        """
        if self.failure is None:
            return
        of_parts = ((device_type, group) for (device_type, _), group in self.parts.items())
        for device_type, group in (*self.data.items(), *of_parts):
            if device_type != "cpu":
                abort_collectives(group, device_type)

    def release(self) -> None:
        """Close the groups. Idempotent, and safe after the default group has been destroyed."""
        every = (self.control, *self.data.values(), *self.parts.values())
        groups = [group for group in every if group is not None]
        self.control = None
        self.data, self.parts = {}, {}
        if self.watch is not None:
            # Before the groups close: a peer whose collective fails on the closed connection then
            # reads in the store that this rank has left.
            self.watch.leave()
        if self._unfinished:
            _leak(groups)
        if not dist.is_initialized():
            return
        for group in groups:
            # torch destroys our groups with the default group, and raises ValueError for them if a
            # new default group is open by now.
            with suppress(ValueError):
                dist.destroy_process_group(group)


def check_process_group(process_group: object) -> None:
    """Check that `process_group` is a process group, None, or `GroupMember.NON_GROUP_MEMBER`.

    Raises:
        TypeError: quoting the argument.
    """
    if process_group is None or (
        dist.is_available()
        and (
            isinstance(process_group, dist.ProcessGroup)
            or process_group == dist.GroupMember.NON_GROUP_MEMBER
        )
    ):
        return
    raise TypeError(
        "process_group must be a torch.distributed.ProcessGroup or None, not "
        f"{show(process_group)}. Pass the result of torch.distributed.new_group(), or None for "
        "the default group."
    )


def is_distributed(process_group: dist.ProcessGroup | None) -> bool:
    """Return whether the launcher, the default group or `process_group` has several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True
    if not is_initialized():
        return False
    if dist.get_world_size() > 1:
        return True
    return process_group is not None and dist.get_world_size(process_group) > 1


def world_size_of(process_group: dist.ProcessGroup | None) -> int:
    """Return the size of `process_group`, of the default group for None, or 1 without any group.

    Raises:
        RuntimeError: a launcher started several ranks, but no group is initialized, so every rank
            would train its own model.
    """
    if not is_initialized():
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1:
            raise RuntimeError(
                f"WORLD_SIZE={launched}, but no process group is initialized, so every rank would "
                "train its own model. Call torch.distributed.init_process_group() first."
            )
        return 1
    return dist.get_world_size(process_group)


def open_rank_group(
    process_group: dist.ProcessGroup | None, failures: FailurePolicy = FailurePolicy()
) -> RankGroup:
    """Open a rank group over the ranks of `process_group`, with its own control group. Collective.

    Args:
        process_group: None for the default group. Without a default group, the result is a world
            of one.
        failures: time limits after which a peer counts as failed.

    Raises:
        ValueError: this process is not in `process_group`.
        PeerFailedError: naming the ranks that did not call this function in time.
    """
    if not is_initialized() or dist.get_world_size(process_group) == 1:
        return RankGroup()
    if dist.get_world_size(process_group) < 1:
        raise ValueError(
            f"Rank {dist.get_rank()} is not in process_group. Construct the optimizer only on the "
            "ranks of process_group."
        )
    base = process_group if process_group is not None else dist.group.WORLD
    assert base is not None
    global_ranks = tuple(dist.get_process_group_ranks(base))
    ranks = RankGroup(
        rank=dist.get_rank(base),
        world_size=len(global_ranks),
        global_ranks=global_ranks,
        name=_unused_name(global_ranks),
        timeout=timeout_of(base),
    )
    ranks.watch = _open_watch(ranks, failures)
    ranks.control = _open_group(ranks, "control", "gloo")
    return ranks


def _open_watch(ranks: RankGroup, failures: FailurePolicy) -> PeerWatch | None:
    """Wait until all ranks have published a record, then start to watch them.

    Returns:
        None, with a warning in the log, if the default group's store cannot be cloned.
    """
    try:
        # The watch needs its own connection: while one thread waits in a store client, the client
        # blocks all other threads.
        connection = connect_to_default_store(timedelta(seconds=failures.dead_after))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        if ranks.rank == 0:  # all ranks have the same kind of store
            logger.warning(
                "Not watching other ranks, so errors will not name failed ranks: "
                "the default group's store has no clone() (%s)",
                error,
            )
        return None
    store = dist.PrefixStore(ranks.name, connection)
    watch = PeerWatch(store, ranks.rank, ranks.global_ranks, failures)
    watch.announce()
    join_timeout = min(ranks.timeout, timedelta(seconds=failures.stuck_after))
    roll_call(store, ranks.rank, ranks.global_ranks, join_timeout, "construct the optimizer")
    watch.start()
    return watch


def attempt() -> int:
    """Return how many times torchrun has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _unused_name(ranks: tuple[int, ...]) -> str:
    """Return a name that is the same on these ranks and is never reused; without communication.

    All ranks open their rank groups in the same order, so each counts to the same number. The count
    restarts with every default group.
    """
    counts = _openings.setdefault(dist.group.WORLD, {})
    number = next(counts.setdefault(ranks, itertools.count()))
    # A digest, because the name begins every key in the store and there may be 1000 ranks.
    digest = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    return f"offload_adam/{attempt()}/{digest}/{number}"


_openings: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], itertools.count[int]]] = (
    weakref.WeakKeyDictionary()
)


def _leak(groups: Iterable[dist.ProcessGroup]) -> None:
    """Leak groups with an unfinished collective.

    gloo's destructor holds the GIL until all started collectives have timed out. With a dead peer,
    that would freeze this process for the group's timeout, 30 minutes by default.
    """
    for group in groups:
        # A reference that nobody drops: the interpreter's exit does not run the destructor either.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def is_initialized() -> bool:
    """Return whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def _open_group(ranks: RankGroup, purpose: str, backend: str) -> dist.ProcessGroup:
    """Open a process group with a rank group's ranks, in its order. Collective for these only.

    `dist.new_group` does not fit, for three reasons. It is collective for all ranks of the default
    group. It sorts the ranks, so all-gathers would exchange shards if the user's group is unsorted.
    With `use_local_synchronization=True` it is collective for the members only, but derives the
    name from the number of this process's groups: ranks in different numbers of groups would hang.
    """
    name = f"{ranks.name}/{purpose}"
    return open_group(name, ranks.global_ranks, ranks.rank, backend, ranks.timeout)
