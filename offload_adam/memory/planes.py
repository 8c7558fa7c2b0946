"""The state planes of one bucket's shard: flat tensors that share one element index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from offload_adam.layout.budget import BucketPlanes
from offload_adam.layout.flat import Bucket


class Memory(Protocol):
    """Something that planes are taken from."""

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return (numel,) zeros."""
        ...


class DeviceMemory:
    """Memory of a device, for state beside its parameters; torch gives and frees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return (numel,) zeros."""
        return torch.zeros(numel, dtype=dtype, device=self._device)


@dataclass(frozen=True, slots=True)
class StatePlanes:
    """This rank's Adam state of one bucket; every tensor is flat and `shard_numel` long.

    master_weight: float32; for an fp32 parameter on the host the parameter's own shard.
    max_exp_avg_sq: float32, None without amsgrad.
    landed_gradient: the reduced gradient, None where it is read where autograd left it.
    """

    master_weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None
    landed_gradient: torch.Tensor | None

    def named(self, *, own_master: bool) -> dict[str, torch.Tensor]:
        """Return the planes that are state, by torch's keys.

        A parameter that is its own master weight has no `master_weight` entry: it is saved with the
        model, and a second copy could only contradict it.
        """
        planes = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.max_exp_avg_sq is not None:
            planes["max_exp_avg_sq"] = self.max_exp_avg_sq
        if not own_master:
            planes["master_weight"] = self.master_weight
        return planes


def allocate_planes(
    bucket: Bucket,
    planes: BucketPlanes,
    memory: Memory,
    *,
    own_master: torch.Tensor | None,
    landed_dtype: torch.dtype | None,
) -> StatePlanes:
    """Take one bucket's planes from an arena or a device, zeroed.

    Args:
        own_master: the parameter's own shard where it is the master weight.
        landed_dtype: dtype of the landed gradient, None where none is kept.
    """
    numel = bucket.shard_numel
    master = memory.take(numel, torch.float32) if own_master is None else own_master
    return StatePlanes(
        master_weight=master,
        exp_avg=memory.take(numel, torch.float32),
        exp_avg_sq=memory.take(numel, torch.float32),
        max_exp_avg_sq=memory.take(numel, torch.float32) if planes.amsgrad else None,
        landed_gradient=None if landed_dtype is None else memory.take(numel, landed_dtype),
    )
