"""Slots that buckets use in turn: parameters go up from some, gradients are reduced in others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from offload_adam.memory.arena import HostArena, padded_nbytes

NUM_STAGING_SLOTS = 2
"""One is written by the kernel while the other is on its way to the device."""

NUM_REDUCE_SLOTS = 3
"""One is packed, one reduced, and one on its way to the host."""


class Rings:
    """Slots of each kind, every one as large as the largest bucket (or shard) of its kind.

    Which bucket uses which slot, and what it waits for before it does, the schedule says.

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
        self._arenas: dict[torch.dtype, HostArena] = {}
        self.num_staging = num_staging
        self.num_reduction = num_reduction
        self._staging: dict[torch.dtype, list[torch.Tensor]] = {}
        self._reduction: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}

    @property
    def staging_nbytes(self) -> int:
        """Host bytes of the slots that parameters go up from."""
        return sum(
            len(slots) * padded_nbytes(slots[0].numel(), dtype)
            for dtype, slots in self._staging.items()
        )

    @property
    def reduction_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots in which gradients are reduced, by device."""
        totals: dict[torch.device, int] = {}
        for (_, device), slots in self._reduction.items():
            totals[device] = totals.get(device, 0) + sum(slot.nbytes for slot in slots)
        return totals

    def fit_staging(self, dtype: torch.dtype, numel: int) -> None:
        """Make the host slots of a dtype large enough for such a shard."""
        slots = self._staging.get(dtype)
        if slots is None or slots[0].numel() < numel:
            if dtype in self._arenas:
                self._arenas[dtype].close()
            arena = self._make_arena(self.num_staging * padded_nbytes(numel, dtype))
            self._arenas[dtype] = arena
            self._staging[dtype] = [arena.take(numel, dtype) for _ in range(self.num_staging)]

    def fit_reduction(self, dtype: torch.dtype, device: torch.device, numel: int) -> None:
        """Make the slots on a device large enough for such a bucket."""
        slots = self._reduction.get((dtype, device))
        if slots is None or slots[0].numel() < numel:
            self._reduction[dtype, device] = [
                torch.empty(numel, dtype=dtype, device=device) for _ in range(self.num_reduction)
            ]

    def staging_slot(self, dtype: torch.dtype, slot: int, numel: int) -> torch.Tensor:
        """Return the first elements of a host slot."""
        return self._staging[dtype][slot][:numel]

    def reduction_slot(
        self, dtype: torch.dtype, device: torch.device, slot: int, numel: int
    ) -> torch.Tensor:
        """Return the first elements of a slot on a device."""
        return self._reduction[dtype, device][slot][:numel]
