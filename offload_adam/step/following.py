"""Let master weights follow parameters that were changed from outside."""

from __future__ import annotations

from collections.abc import Collection

import torch

from offload_adam.step.bucket_state import BucketState

_PIECE = 2**18
"""Elements at a time: loading a checkpoint ends with this, and must not copy what it has loaded."""


def follow(state: BucketState, positions: Collection[int]) -> None:
    """Give exactly those master elements the parameter's value whose rounding differs from it.

    So a `clamp_` moves only what it clamped, and loading the weights that were saved with the
    optimizer loses none of the master's low bits. Bits are compared, so that NaN equals itself.

    Args:
        positions: the changed parameters, by their place in the bucket.
    """
    if state.own_master:
        return
    segments = state.segments
    rows = zip(
        segments.positions.tolist(),
        segments.shard_starts.tolist(),
        segments.numels.tolist(),
        strict=True,
    )
    for position, start, numel in rows:
        if position in positions:
            master = state.planes.master_weight[start : start + numel]
            parameter = state.shard[start : start + numel]
            for part, given in zip(master.split(_PIECE), parameter.split(_PIECE), strict=True):
                _follow_piece(part, given.to(part.device))


def _follow_piece(master: torch.Tensor, parameter: torch.Tensor) -> None:
    differs = _bits(master.to(parameter.dtype)) != _bits(parameter)
    master[differs] = parameter[differs].float()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
