"""Buffers that buckets use in turn: a pool that grows, and rings of fixed slots."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import chain

import torch

from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.torch_private import base_of


class SlotPool:
    """Bucket-sized buffers, handed out without ever waiting.

    If a hook waited here for a collective, it would deadlock when one rank skips its backward. So a
    pool without a free slot allocates another. A slot is filled from `.grad`, which is freed with
    it, so there is at most one for each bucket and backward in flight. Once there are as many as
    the pace of the ranks requires, nothing is allocated.

    Owns: every buffer, by dtype and device, each as large as the largest bucket of these.
    """

    def __init__(self) -> None:
        self._capacity: dict[tuple[torch.dtype, torch.device], int] = {}
        self._free: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
        self._nbytes: dict[torch.device, int] = defaultdict(int)

    @property
    def nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of all slots, in use or free, by device."""
        return self._nbytes

    def reserve(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Announce buckets of this size; slots that are too small for them are freed."""
        if numel > self._capacity.get((dtype, device), 0):
            self._capacity[dtype, device] = numel
            outgrown = self._free.pop((dtype, device), [])
            self._nbytes[device] -= sum(slot.nbytes for slot in outgrown)

    def acquire(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a 1-d buffer of `numel` elements with undefined content."""
        free = self._free[dtype, device]
        if free:
            return free.pop()[:numel]
        slot = torch.empty(self._capacity[dtype, device], dtype=dtype, device=device)
        self._nbytes[device] += slot.nbytes
        return slot[:numel]

    def release(self, buffer: torch.Tensor) -> None:
        """Take back a buffer from `acquire`; nothing may still read or write it."""
        slot = base_of(buffer)
        assert slot is not None
        if slot.numel() == self._capacity[slot.dtype, slot.device]:
            self._free[slot.dtype, slot.device].append(slot)
        else:
            self._nbytes[slot.device] -= slot.nbytes


class Rings:
    """Slots for the buckets of each key, as large as the largest of these buckets (or shards).

    The schedule decides which bucket uses which slot, and what it waits for before that. It does so
    for each bucket key on its own, so no two keys share a slot.

    Owns: host slots in the parameters' own 16-bit formats, and slots on devices.
    Lifecycle: call `fit_staging` and `fit_reduction` while no copy or reduction is in flight;
        nothing is allocated later.
    """

    def __init__(
        self, make_arena: Callable[[int], HostArena], *, num_staging: int, num_reduction: int
    ) -> None:
        """Begin without slots.

        Args:
            make_arena: allocates host memory of so many bytes, page-locked where that is asked for.
            num_staging, num_reduction: slots for each key, at least 1.
        """
        self.num_staging = num_staging
        self.num_reduction = num_reduction
        self._make_arena = make_arena
        self._arenas: dict[str, HostArena] = {}
        self._staging: dict[str, list[torch.Tensor]] = {}
        self._reduction: dict[str, list[torch.Tensor]] = {}

    @property
    def staging_nbytes(self) -> int:
        """Host bytes of the slots from which parameters are copied to a device."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @property
    def reduction_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots in which gradients are reduced, by device."""
        totals: Counter[torch.device] = Counter()
        for slot in chain.from_iterable(self._reduction.values()):
            totals[slot.device] += slot.nbytes
        return totals

    def fit_staging(self, key: str, dtype: torch.dtype, numel: int) -> None:
        """Make the host slots of a bucket key large enough for a shard."""
        if _fits(self._staging, key, numel):
            return
        if key in self._arenas:
            self._arenas[key].close()
        arena = self._make_arena(self.num_staging * padded_nbytes(numel, dtype))
        self._arenas[key] = arena
        self._staging[key] = [arena.take(numel, dtype) for _ in range(self.num_staging)]

    def fit_reduction(self, key: str, dtype: torch.dtype, device: torch.device, numel: int) -> None:
        """Make the device slots of a bucket key large enough for a bucket."""
        if not _fits(self._reduction, key, numel):
            self._reduction[key] = [
                torch.empty(numel, dtype=dtype, device=device) for _ in range(self.num_reduction)
            ]

    def staging_slot(self, key: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a host slot."""
        return self._staging[key][slot][:numel]

    def reduction_slot(self, key: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a slot on a device."""
        return self._reduction[key][slot][:numel]


def _fits(slots: Mapping[str, list[torch.Tensor]], key: str, numel: int) -> bool:
    """Return whether a key has slots of at least so many elements."""
    return key in slots and slots[key][0].numel() >= numel
