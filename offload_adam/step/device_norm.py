"""Sums of squares of gradients on a device, in float64; the host waits once for many tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.torch_private import foreach_norm

PIECE_NUMEL = 1 << 22
"""Elements of a piece. torch allocates 8 bytes for each tensor and each 65536 elements of the
largest one: 512 bytes a piece."""


@dataclass(frozen=True, slots=True)
class DeviceNorms:
    """Norms that a device computes.

    owners: (k,) int64, index of the tensor that each piece is part of.
    norms: (k,) float64 on the device; None if k is 0.
    """

    owners: npt.NDArray[np.int64]
    norms: torch.Tensor | None


@torch.no_grad()
def start_norms(tensors: Sequence[torch.Tensor]) -> DeviceNorms:
    """Launch the kernels for the norms of 1-d tensors on one device. Never waits for it.

    Each element is read once, and squared and added in float64. No square of a float32 overflows:
    that of the largest is 1e77.
    """
    # The fast kernel takes tensors of one dtype.
    pieces: dict[torch.dtype, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for owner, tensor in enumerate(tensors):
        if tensor.numel() > 0:
            pieces[tensor.dtype] += [(owner, piece) for piece in tensor.split(PIECE_NUMEL)]
    norms: list[torch.Tensor] = []
    for members in pieces.values():
        norms += foreach_norm([piece for _, piece in members], 2, torch.float64)
    owners = [owner for members in pieces.values() for owner, _ in members]
    return DeviceNorms(np.array(owners, dtype=np.int64), torch.stack(norms) if norms else None)


def wait_for_squares(started: Sequence[DeviceNorms]) -> list[npt.NDArray[np.float64]]:
    """Return the sums of squares of the pieces, non-finite if an element is.

    Waits once for each device.

    Returns:
        For each of `started`, (k,) float64.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for one in started:
        if one.norms is not None:
            by_device[one.norms.device].append(one.norms)
    found = {
        device: iter(torch.cat(norms).cpu().split([n.numel() for n in norms]))
        for device, norms in by_device.items()
    }
    return [
        np.zeros(0) if one.norms is None else np.square(next(found[one.norms.device]).numpy())
        for one in started
    ]
