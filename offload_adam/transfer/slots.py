"""Buffers that buckets use in turn: a pool that grows, and rings of fixed slots."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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


@dataclass
class _Ring:
    """The slots of one bucket key.

    numels: elements that each slot must have: those of the largest bucket (or shard) that uses it.
    device: None for host memory.
    """

    dtype: torch.dtype
    device: torch.device | None = None
    numels: dict[int, int] = field(default_factory=dict)
    slots: dict[int, torch.Tensor] = field(default_factory=dict)

    def reserve(self, slot: int, numel: int) -> None:
        self.numels[slot] = max(numel, self.numels.get(slot, 0))

    def is_too_small(self, slot: int) -> bool:
        return slot not in self.slots or self.slots[slot].numel() < self.numels[slot]


class Rings:
    """Slots that the buckets of each key use in turn.

    The schedule decides which bucket uses which slot, and what it waits for before that. It does so
    for each bucket key on its own, so no two keys share a slot.

    Owns: host slots in the parameters' own 16-bit formats, and slots on devices.
    Lifecycle: reserve a slot for every bucket, then call `allocate`, while no copy or reduction is
        in flight; nothing is allocated later.
    """

    def __init__(self, make_arena: Callable[[int], HostArena]) -> None:
        """Begin without slots.

        Args:
            make_arena: allocates host memory of so many bytes, page-locked where that is asked for.
        """
        self._make_arena = make_arena
        self._arenas: dict[str, HostArena] = {}
        self._staging: dict[str, _Ring] = {}
        self._reduction: dict[str, _Ring] = {}

    @property
    def staging_nbytes(self) -> int:
        """Host bytes of the slots from which parameters are copied to a device."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @property
    def reduction_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots into which gradients are packed, by device."""
        totals: Counter[torch.device] = Counter()
        for ring in self._reduction.values():
            for slot in ring.slots.values():
                totals[slot.device] += slot.nbytes
        return totals

    def reserve_staging(self, key: str, slot: int, dtype: torch.dtype, numel: int) -> None:
        """Announce that a shard of a bucket key uses this host slot."""
        self._staging.setdefault(key, _Ring(dtype)).reserve(slot, numel)

    def reserve_reduction(
        self, key: str, slot: int, dtype: torch.dtype, device: torch.device, numel: int
    ) -> None:
        """Announce that a bucket of a key uses this slot on its device."""
        self._reduction.setdefault(key, _Ring(dtype, device)).reserve(slot, numel)

    def allocate(self) -> None:
        """Allocate each slot that is not there, or is too small, in its final size."""
        for ring in self._reduction.values():
            for slot in filter(ring.is_too_small, ring.numels):
                ring.slots[slot] = torch.empty(
                    ring.numels[slot], dtype=ring.dtype, device=ring.device
                )
        for key, ring in self._staging.items():
            if any(map(ring.is_too_small, ring.numels)):
                self._allocate_staging(key, ring)

    def _allocate_staging(self, key: str, ring: _Ring) -> None:
        if key in self._arenas:
            self._arenas[key].close()
        nbytes = sum(padded_nbytes(numel, ring.dtype) for numel in ring.numels.values())
        arena = self._arenas[key] = self._make_arena(nbytes)
        ring.slots = {slot: arena.take(numel, ring.dtype) for slot, numel in ring.numels.items()}

    def staging_slot(self, key: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a host slot."""
        return self._staging[key].slots[slot][:numel]

    def reduction_slot(self, key: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a slot on a device."""
        return self._reduction[key].slots[slot][:numel]
