"""Buffers that buckets share in turn: a pool that grows, and rings of fixed slots."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.torch_private import base_of


class SlotPool:
    """Bucket-sized buffers that are allocated on demand and reused.

    `acquire` never waits. A hook that waited for an earlier collective would deadlock if another
    rank skipped its backward. So if no slot is free, the pool allocates a new one. A slot takes the
    gradients of one bucket, so there is at most one for each bucket and backward in flight. After
    the first steps there are enough slots, and nothing is allocated.

    Owns: all buffers. Those of one dtype and device all fit the largest bucket of that dtype and
        device.
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
        """Make future slots large enough for `numel` elements, and free smaller ones."""
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
        """Return a buffer from `acquire` to the pool. No work in flight may use it any more."""
        slot = base_of(buffer)  # `acquire` returned a view
        assert slot is not None
        if slot.numel() == self._capacity[slot.dtype, slot.device]:
            self._free[slot.dtype, slot.device].append(slot)
        else:  # `reserve` has increased the capacity since: drop it
            self._nbytes[slot.device] -= slot.nbytes


@dataclass
class _Ring:
    """The slots of one bucket key.

    device: None for host memory.
    numels: by slot: elements of the largest bucket (or shard) that uses it.
    slots: by slot: the allocated buffer.
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
    """Staging and reduction slots that the buckets of each bucket key share in turn.

    The schedule assigns a slot to each bucket, and makes the bucket wait for the slot's previous
    user. Buckets with different keys never share a slot.

        bucket (one key, two slots)   0  1  2  3  4
        slot                          0  1  0  1  0

    Owns: staging slots on the host, for H2D copies of parameters in their own dtype; and reduction
        slots on devices, for gradients.
    Lifecycle: reserve a slot for every bucket, then call `allocate` while no copy or reduction is
        in flight. Nothing is allocated later.
    """

    def __init__(self, make_arena: Callable[[int], HostArena]) -> None:
        """Construct rings without slots.

        Args:
            make_arena: allocates this many bytes of host memory, pinned if pinning is configured.
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
        """Make a host slot of a bucket key large enough for a shard of `numel` elements."""
        self._staging.setdefault(key, _Ring(dtype)).reserve(slot, numel)

    def reserve_reduction(
        self, key: str, slot: int, dtype: torch.dtype, device: torch.device, numel: int
    ) -> None:
        """Make a device slot of a bucket key large enough for a bucket of `numel` elements."""
        self._reduction.setdefault(key, _Ring(dtype, device)).reserve(slot, numel)

    def allocate(self) -> None:
        """Allocate each slot that is missing or too small."""
        for ring in self._reduction.values():
            for slot in filter(ring.is_too_small, ring.numels):
                ring.slots[slot] = torch.empty(
                    ring.numels[slot], dtype=ring.dtype, device=ring.device
                )
        for key, ring in self._staging.items():
            if any(map(ring.is_too_small, ring.numels)):
                self._allocate_staging(key, ring)

    def _allocate_staging(self, key: str, ring: _Ring) -> None:
        # One arena holds all slots of a key, so all are allocated anew if one of them grows.
        if key in self._arenas:
            self._arenas[key].close()
        nbytes = sum(padded_nbytes(numel, ring.dtype) for numel in ring.numels.values())
        arena = self._arenas[key] = self._make_arena(nbytes)
        ring.slots = {
            slot: arena.allocate(numel, ring.dtype) for slot, numel in ring.numels.items()
        }

    def staging_slot(self, key: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first `numel` elements of a host slot."""
        return self._staging[key].slots[slot][:numel]

    def reduction_slot(self, key: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first `numel` elements of a slot on a device."""
        return self._reduction[key].slots[slot][:numel]
