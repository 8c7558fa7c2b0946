"""The tensors that an update works on: gradient, master weight and moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload_adam.memory.arena import HostArena, padded_nbytes

_PATTERN_NUMEL = 1 << 20


@dataclass(frozen=True)
class Planes:
    """Four fp32 tensors of shape (numel,)."""

    gradient: torch.Tensor
    master_weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @property
    def numel(self) -> int:
        """Elements of each tensor."""
        return self.gradient.numel()


def allocate(
    numel: int, dtype: torch.dtype, num_tensors: int, huge_pages: bool
) -> list[torch.Tensor]:
    """Return uninitialized tensors of shape (numel,).

    Args:
        huge_pages: allocate as this package allocates its state, in a private mapping with
            MADV_HUGEPAGE; otherwise with `torch.empty`.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    if not huge_pages:
        return [torch.empty(numel, dtype=dtype) for _ in range(num_tensors)]
    arena = HostArena(num_tensors * padded_nbytes(numel, dtype))
    return [arena.allocate(numel, dtype) for _ in range(num_tensors)]


def make_planes(numel: int, huge_pages: bool) -> Planes:
    """Return random weights and gradients and zero moments. Every page is written once.

    Raises:
        HostMemoryError: the node does not have enough memory available.
    """
    planes = Planes(*allocate(numel, torch.float32, 4, huge_pages))
    fill_with_noise(planes.gradient)
    fill_with_noise(planes.master_weight, scale=1.0)
    planes.exp_avg.zero_()
    planes.exp_avg_sq.zero_()
    return planes


def fill_with_noise(target: torch.Tensor, scale: float = 0.01) -> None:
    """Fill with normal noise of this standard deviation.

    One block of noise is repeated: the values do not change the time, and drawing them is slow.
    """
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(min(_PATTERN_NUMEL, target.numel()), generator=generator) * scale
    for part in target.split(_PATTERN_NUMEL):
        part.copy_(pattern[: part.numel()])
