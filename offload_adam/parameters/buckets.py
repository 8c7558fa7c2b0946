"""Flat device buckets: model parameters become views of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload_adam.layout.flat import Bucket
from offload_adam.memory.arena import HostArena, padded_nbytes
from offload_adam.parameters.families import memory_strides


def adopt(bucket: Bucket, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Move the parameters of one bucket into one flat tensor, and return it.

    Each parameter is re-pointed through `.data`, so that it stays the same object with its own
    version counter. It gets a storage of its own over its part of the bucket: what saves or copies
    a parameter touches its bytes alone.

    Args:
        parameters: in the order of the bucket's placements; one dtype, one device.

    Returns:
        (bucket.numel,) on the parameters' device, zero in the padding.
    """
    first = parameters[0]
    flat = _allocate(bucket.numel, first.dtype, first.device)
    for placed, parameter in zip(bucket.placements, parameters, strict=True):
        if placed.numel > 0:
            with torch.cuda.device_of(flat):  # DLPack exports from the current device alone
                part = torch.from_dlpack(flat[placed.start : placed.end])
            view = part.as_strided(parameter.shape, memory_strides(parameter))
            view.copy_(parameter.data)
            parameter.data = view
    return flat


def _allocate(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on the host in huge pages, like the state that is updated beside them."""
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    return HostArena(padded_nbytes(numel, dtype), survives_fork=True).take(numel, dtype)
