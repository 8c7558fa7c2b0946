"""Which ranks share an optimizer, and the process groups that it uses for itself."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import time
import uuid
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from offload_adam.coordinator.watch import PeerWatch, roll_call
from offload_adam.observe.place import HERE
from offload_adam.options import FailurePolicy

logger = logging.getLogger(__name__)

_SLICE = timedelta(seconds=0.5)
"""How long a wait is deaf: to peers that fail, and to Ctrl-C."""

_POLL_S = 1e-3


@dataclass
class Membership:
    """This process's place among the ranks that share the optimizer state.

    Owns: a gloo group for control messages, and one group a device type for buckets, none of them
    shared with the user's own collectives; and the watch over the peers. A world of one owns none.
    Lifecycle: groups are opened by every rank together (`open_membership`); `release` ends them.
    Threads: any may `wait`, each for work of its own.
    """

    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None
    data: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    global_ranks: tuple[int, ...] = (0,)
    timeout: timedelta = timedelta(minutes=30)
    watch: PeerWatch | None = None
    _unfinished: set[dist.Work] = field(default_factory=set)

    def open_data_groups(self, device_types: Iterable[str]) -> None:
        """Open the groups for buckets on these device types that are not open yet. Collective."""
        if self.world_size == 1:
            return
        for device_type in sorted(set(device_types) - set(self.data)):
            backend = "nccl" if device_type == "cuda" else "gloo"
            assert self.control is not None
            self.data[device_type] = _new_group(self.control, backend, self.timeout)

    def data_group(self, device: torch.device) -> dist.ProcessGroup:
        """Return the group for collectives on tensors of this device."""
        return self.data[device.type]

    def wait(self, work: dist.Work | None, *, on_device: bool = False) -> None:
        """Wait for a collective, as long as all peers live and get on.

        On host memory it costs nothing beside `work.wait()`: the wait ends with the work, and only
        one that takes long is cut into slices, between which peers are looked after and signals are
        served. On a device it is polled.

        Raises:
            PeerFailedError: naming the ranks that have failed, where they were, and what to do.
        """
        assert work is not None
        HERE.wait(True)
        # Whatever ends the wait early, Ctrl-C too, leaves its work here.
        self._unfinished.add(work)
        try:
            while not self._is_over(work, on_device):
                self.raise_failure()
            self._unfinished.discard(work)
        finally:
            HERE.wait(False)

    def raise_failure(self) -> None:
        """Raise where a peer has failed.

        Raises:
            PeerFailedError: naming the ranks that have failed, where they were, and what to do.
        """
        if self.watch is not None:
            self.watch.raise_failure()

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Reduce a host tensor over the ranks, in place. Collective."""
        if self.world_size > 1:
            self.wait(dist.all_reduce(tensor, operation, group=self.control, async_op=True))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's host tensor of one shape, in rank order. Collective."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        self.wait(dist.all_gather(gathered, tensor, group=self.control, async_op=True))
        return gathered

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give every rank the first one's host tensor, in place. Collective."""
        if self.world_size > 1:
            source = self.global_ranks[0]
            self.wait(dist.broadcast(tensor, source, group=self.control, async_op=True))

    def _is_over(self, work: dist.Work, on_device: bool) -> bool:
        """Wait for one slice; raise where the collective has failed."""
        try:
            if not on_device:
                work.wait(_SLICE)
            elif work.is_completed():
                work.wait()  # lets the current stream come after it
            else:
                # NCCL takes the end of a timeout for the end of its communicator.
                time.sleep(_POLL_S)
                return False
        except RuntimeError as error:
            if not work.is_completed():
                return False  # only the slice is over
            raise error if self.watch is None else self.watch.explain(error) from error
        return True

    def broadcast_data(self, tensor: torch.Tensor) -> None:
        """Give every rank the first one's tensor of any device, in place. Collective."""
        if self.world_size > 1:
            group = self.data_group(tensor.device)
            source = self.global_ranks[0]
            work = dist.broadcast(tensor, source, group=group, async_op=True)
            self.wait(work, on_device=tensor.is_cuda)

    def abort_devices(self) -> None:
        """End collectives on devices that a failed peer will never join.

        Whoever waits for such a device, to unpin memory or to exit, would wait for the backend's
        own timeout.
        """
        if self.watch is None or self.watch.failure is None:
            return
        for device_type, group in self.data.items():
            if device_type != "cpu":
                # Not in every version; without it the timeout has to do.
                with suppress(AttributeError, RuntimeError):
                    backend: Any = group._get_backend(torch.device(device_type))
                    backend.abort()

    def release(self) -> None:
        """End the groups. Idempotent, and safe after the default group has been destroyed."""
        groups = [group for group in (self.control, *self.data.values()) if group is not None]
        self.control = None
        self.data = {}
        if self.watch is not None:
            self.watch.leave()
        if self._unfinished:
            _abandon(groups)
        if not dist.is_initialized():
            return
        for group in groups:
            # Already destroyed with the default group, where that has been opened anew since.
            with suppress(ValueError):
                dist.destroy_process_group(group)


def check_process_group(process_group: object) -> None:
    """Refuse what is no process group; what `new_group` returns outside of one passes.

    Raises:
        TypeError: saying what was given.
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
        "process_group must be a torch.distributed.ProcessGroup, as new_group() returns it, or "
        f"None for the default group, not {process_group!r}"
    )


def is_distributed(process_group: dist.ProcessGroup | None) -> bool:
    """Tell whether training is distributed by any sign: either group, or the launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True
    if not _is_initialized():
        return False
    if dist.get_world_size() > 1:
        return True
    return process_group is not None and dist.get_world_size(process_group) > 1


def world_size_of(process_group: dist.ProcessGroup | None) -> int:
    """Return the size of the group that would be used.

    Raises:
        RuntimeError: under a launcher with more than one rank and no initialised group: every rank
            would train a model of its own.
    """
    if not _is_initialized():
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1:
            raise RuntimeError(
                f"WORLD_SIZE={launched}, but no process group is initialised, so every rank would "
                "train alone: call torch.distributed.init_process_group() first"
            )
        return 1
    return dist.get_world_size(process_group)


def open_membership(
    process_group: dist.ProcessGroup | None, patience: FailurePolicy | None = None
) -> Membership:
    """Open a control group of the optimizer's own over the ranks of `process_group`.

    Collective: every rank of the group calls it.

    Args:
        process_group: None for the default group. Without any group this is a world of one.
        patience: with peers that are silent or do not get on; None for the defaults.

    Raises:
        ValueError: this process is not in `process_group`.
        PeerFailedError: ranks did not come, by number.
    """
    if not _is_initialized() or dist.get_world_size(process_group) == 1:
        return Membership()
    if dist.get_world_size(process_group) < 1:
        raise ValueError(
            f"rank {dist.get_rank()} is not in process_group: make the optimizer on its ranks only"
        )
    base = process_group if process_group is not None else dist.group.WORLD
    assert base is not None
    ranks = tuple(dist.get_process_group_ranks(base))
    membership = Membership(
        rank=dist.get_rank(base),
        world_size=len(ranks),
        global_ranks=ranks,
        timeout=_timeout_of(base),
    )
    membership.watch = _open_watch(membership, patience or FailurePolicy())
    membership.control = _new_group(base, "gloo", membership.timeout)
    return membership


def _open_watch(membership: Membership, patience: FailurePolicy) -> PeerWatch | None:
    """Meet the other ranks in the store, and begin to watch them."""
    try:
        # A connection of its own: a store's client that waits keeps every other thread waiting.
        default: Any = c10d._get_default_store()
        connection = default.clone()
        connection.set_timeout(timedelta(seconds=patience.dead_after))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        logger.warning("ranks that fail will not be named: this store has no clone() (%s)", error)
        return None
    store = dist.PrefixStore(_meeting_place(membership.global_ranks), connection)
    watch = PeerWatch(store, membership.rank, membership.global_ranks, patience)
    watch.announce()
    stay = min(membership.timeout, timedelta(seconds=patience.stuck_after))
    roll_call(store, membership.rank, membership.global_ranks, stay, "the making of the optimizer")
    watch.start()
    return watch


def _meeting_place(ranks: tuple[int, ...]) -> str:
    """Return a prefix that these ranks, and no earlier ones, find without talking.

    They open their memberships in one order, so each counts to the same number, beginning anew with
    every default group.
    """
    counts = _openings.setdefault(dist.group.WORLD, {})
    number = next(counts.setdefault(ranks, itertools.count()))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"offload_adam/{attempt}/{'-'.join(map(str, ranks))}/{number}"


_openings: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], itertools.count[int]]] = (
    weakref.WeakKeyDictionary()
)


def _abandon(groups: Iterable[dist.ProcessGroup]) -> None:
    """Keep groups with a broken collective for ever.

    gloo's destructor waits, with the interpreter locked, until collectives that were begun have run
    into their timeout: a process whose peer has stopped would hang for as long.
    """
    for group in groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _new_group(base: dist.ProcessGroup, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Open another group over the ranks of `base`. Collective for these alone."""
    ranks = dist.get_process_group_ranks(base)
    if len(ranks) < dist.get_world_size():
        return _new_subgroup(base, ranks, backend, timeout)
    group = dist.new_group(ranks, timeout=timeout, backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _new_subgroup(
    base: dist.ProcessGroup, ranks: list[int], backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Open a group over some ranks under a name that has never been used, without the others.

    `new_group(use_local_synchronization=True)` would take its name from the number of groups that
    this process is in: ranks that are in different numbers of groups would never meet, and after a
    group that has been closed they would find the addresses that it has left in the store.
    """
    name: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=ranks[0], group=base)
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        dist.get_rank(base),
        ranks,
        dist.Backend(backend),
        c10d._get_default_store(),
        name[0],
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    assert isinstance(group, dist.ProcessGroup)
    return group


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return the timeout that the user gave the group, so that our waits are bounded alike."""
    for device_type in ("cpu", "cuda"):
        try:
            options = group._get_backend(torch.device(device_type)).options
        except RuntimeError:
            continue
        return timedelta(seconds=options._timeout.total_seconds())
    return timedelta(minutes=30)
