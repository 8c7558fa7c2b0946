"""Buffers that buckets use in turn: a pool that grows, and rings of fixed slots."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch

from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.torch_private import base_of


class SlotPool:
    """Bucket-sized buffers, handed out without ever waiting.

    A hook that waited for a collective would deadlock where one rank skips its backward, so a pool
    that has no free slot makes another. A slot is filled from `.grad`, which is freed with it, so
    there is at most one a bucket for each backward in flight. Once the pool has as many as the pace
    of the ranks asks for, nothing is allocated.

    Owns: every buffer it made, by dtype and device, each as large as the largest bucket of its
    kind.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.device, int], list[torch.Tensor]] = defaultdict(
            list
        )
        self._capacity: dict[tuple[torch.dtype, torch.device], int] = {}
        self._nbytes: dict[torch.device, int] = defaultdict(int)

    @property
    def nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of all slots, in use or free, by device."""
        return self._nbytes

    def reserve(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Say that buckets of this size will be asked for, so that all slots fit all of them."""
        known = self._capacity.get((dtype, device), 0)
        if numel > known:
            outgrown = self._free.pop((dtype, device, known), [])
            self._nbytes[device] -= sum(slot.nbytes for slot in outgrown)
            self._capacity[dtype, device] = numel

    def acquire(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a 1-d buffer of `numel` elements with undefined content."""
        capacity = self._capacity[dtype, device]
        free = self._free[dtype, device, capacity]
        if free:
            return free.pop()[:numel]
        whole = torch.empty(capacity, dtype=dtype, device=device)
        self._nbytes[device] += whole.nbytes
        return whole[:numel]

    def release(self, slot: torch.Tensor) -> None:
        """Take a buffer back; nothing may still read or write it."""
        base = base_of(slot)
        base = slot if base is None else base
        if base.numel() == self._capacity[base.dtype, base.device]:
            self._free[base.dtype, base.device, base.numel()].append(base)
        else:
            self._nbytes[base.device] -= base.nbytes


class Rings:
    """Slots of each kind, every one as large as the largest bucket (or shard) of its kind.

    Which bucket uses which slot, and what it waits for before it does, the schedule says. It deals
    slots out kind by kind, so no two kinds may share one, whatever dtype both have there.

    Owns: host slots in the parameters' own 16-bit formats, and slots on devices.
    Lifecycle: the `fit_*` while nothing is under way; nothing is allocated later.
    """

    def __init__(
        self, make_arena: Callable[[int], HostArena], *, num_staging: int, num_reduction: int
    ) -> None:
        """Begin without slots.

        Args:
            make_arena: gives host memory of so many bytes, page-locked where that was asked for.
            num_staging, num_reduction: slots of each kind, at least 1.
        """
        self._make_arena = make_arena
        self._arenas: dict[str, HostArena] = {}
        self.num_staging = num_staging
        self.num_reduction = num_reduction
        self._staging: dict[str, list[torch.Tensor]] = {}
        self._reduction: dict[str, list[torch.Tensor]] = {}

    @property
    def staging_nbytes(self) -> int:
        """Host bytes of the slots that parameters go up from."""
        return sum(
            len(slots) * padded_nbytes(slots[0].numel(), slots[0].dtype)
            for slots in self._staging.values()
        )

    @property
    def reduction_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots in which gradients are reduced, by device."""
        totals: Counter[torch.device] = Counter()
        for slots in self._reduction.values():
            totals[slots[0].device] += sum(slot.nbytes for slot in slots)
        return totals

    def fit_staging(self, kind: str, dtype: torch.dtype, numel: int) -> None:
        """Make a kind's host slots, in this dtype, large enough for such a shard."""
        slots = self._staging.get(kind)
        if slots is None or slots[0].numel() < numel:
            if kind in self._arenas:
                self._arenas[kind].close()
            arena = self._make_arena(self.num_staging * padded_nbytes(numel, dtype))
            self._arenas[kind] = arena
            self._staging[kind] = [arena.take(numel, dtype) for _ in range(self.num_staging)]

    def fit_reduction(
        self, kind: str, dtype: torch.dtype, device: torch.device, numel: int
    ) -> None:
        """Make a kind's slots, in this dtype on this device, large enough for such a bucket."""
        slots = self._reduction.get(kind)
        if slots is None or slots[0].numel() < numel:
            self._reduction[kind] = [
                torch.empty(numel, dtype=dtype, device=device) for _ in range(self.num_reduction)
            ]

    def staging_slot(self, kind: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a host slot."""
        return self._staging[kind][slot][:numel]

    def reduction_slot(self, kind: str, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a slot on a device."""
        return self._reduction[kind][slot][:numel]
