"""Buffers in which buckets of gradients are reduced, used again from step to step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

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
