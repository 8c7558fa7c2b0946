"""The streams of an fp32 update, in huge pages as this package allocates or as `torch.empty` does.

Peers run on both: in memory as torch allocates it, which is what their users have, and in the same
pages as this package. Those that share a kind of memory share its planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from offload_adam.errors import HostMemoryError
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.units import format_nbytes

HUGE_PAGES = "huge pages"
ORDINARY = "torch.empty"
MEMORY_DEFINITIONS = {
    HUGE_PAGES: "an anonymous private mapping with MADV_HUGEPAGE, as this package's own state",
    ORDINARY: "what torch.empty gives",
    "..._huge_pages": "the peer of that name on memory of the same kind as this package's",
}


def named(name: str, memory: str) -> str:
    """Return a peer's name with its memory, where that is not what torch allocates by itself."""
    return name if memory == ORDINARY else f"{name}_huge_pages"


def allocate(numel: int, dtype: torch.dtype, num_streams: int, memory: str) -> list[torch.Tensor]:
    """Return uninitialised streams in one kind of memory.

    Raises:
        HostMemoryError: the node does not have that much memory available.
    """
    if memory == ORDINARY:
        return [torch.empty(numel, dtype=dtype) for _ in range(num_streams)]
    arena = HostArena(num_streams * padded_nbytes(numel, dtype))
    return [arena.take(numel, dtype) for _ in range(num_streams)]


_PATTERN_NUMEL = 1 << 20


@dataclass(frozen=True)
class Planes:
    """Four fp32 streams of one length.

    memory: HUGE_PAGES or ORDINARY.
    """

    gradient: torch.Tensor
    master_weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    memory: str

    @property
    def numel(self) -> int:
        """Return the elements of each stream."""
        return self.gradient.numel()


def make_planes(numel: int, memory: str) -> Planes:
    """Return zero moments and random weights and gradients, every page present.

    Raises:
        HostMemoryError: the node does not have that much memory available.
    """
    gradient, master_weight, exp_avg, exp_avg_sq = allocate(numel, torch.float32, 4, memory)
    fill_with_noise(gradient)
    fill_with_noise(master_weight, scale=1.0)
    exp_avg.zero_()
    exp_avg_sq.zero_()
    return Planes(gradient, master_weight, exp_avg, exp_avg_sq, memory)


def require_memory(nbytes: int) -> None:
    """Reject what the node cannot hold: `torch.empty` would be granted it, and end the process.

    Raises:
        HostMemoryError: that many bytes are not available.
    """
    available_nbytes = psutil.virtual_memory().available
    if nbytes > available_nbytes:
        raise HostMemoryError(
            f"this benchmark needs about {format_nbytes(nbytes)} of memory and "
            f"{format_nbytes(available_nbytes)} is available: measure fewer parameters"
        )


def fill_with_noise(target: torch.Tensor, scale: float = 0.01) -> None:
    """Fill with one repeated pattern of normal noise: the numbers do not matter, the time does."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(min(_PATTERN_NUMEL, target.numel()), generator=generator) * scale
    for part in target.split(_PATTERN_NUMEL):
        part.copy_(pattern[: part.numel()])
