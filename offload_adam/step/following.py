"""Compare parameters with their master weights, and sync masters with parameters that changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from offload_adam.layout.flat import BLOCK_NUMEL
from offload_adam.step.bucket_state import BucketState

_PIECE = 2**18
"""Elements at a time: loading a checkpoint ends with this, and must not copy what it has loaded."""

_SAMPLE_BLOCKS = 128
"""Blocks of a bucket in one sample: up to 0.1 ms, where the update of 16 M elements takes 19 ms."""


def follow(state: BucketState, positions: Collection[int]) -> None:
    """Give exactly those master elements the parameter's value whose rounding differs from it.

    So a `clamp_` moves only what it clamped, and loading the weights that were saved with the
    optimizer loses none of the master's low bits. Bits are compared, so that NaN equals itself.

    Args:
        positions: the changed parameters, by their place in the bucket.
    """
    for position, master, parameter in _segments(state):
        if position in positions:
            for part, given in _pieces(master, parameter):
                differs = _differs(part, given)
                part[differs] = given[differs].float()


def differing(state: BucketState) -> list[int]:
    """Return the positions of parameters that no longer equal their rounded masters.

    Cost: one pass over this rank's shard of parameters and masters, and a D2H copy of the
        parameters where they are on a device and the state is not.
    """
    if state.own_master or all(
        _equal(*piece) for piece in _pieces(state.planes.master_weight, state.shard)
    ):
        return []
    return [
        position
        for position, master, parameter in _segments(state)
        if any(
            # The kernels keep a NaN's payload, torch does not.
            bool((_differs(part, given) & ~(part.isnan() & given.isnan())).any())
            for part, given in _pieces(master, parameter)
        )
    ]


def sample_differs(state: BucketState, turn: int) -> bool:
    """Tell whether parameters differ from their rounded masters in blocks spread over the shard.

    A shard of less than 256 blocks is compared as a whole.

    Args:
        turn: selects the blocks; consecutive turns visit all of them.
    """
    if state.own_master:
        return False
    master, parameter = state.planes.master_weight, state.shard
    stride = parameter.numel() // BLOCK_NUMEL // _SAMPLE_BLOCKS
    if stride > 1:
        chosen = slice(turn % stride, None, stride)
        master = master.view(-1, BLOCK_NUMEL)[chosen]
        parameter = parameter.view(-1, BLOCK_NUMEL)[chosen]
    return not _equal(master, parameter.to(master.device))


def _segments(state: BucketState) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield position, master weights and elements of each parameter in this rank's shard."""
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
        end = start + numel
        yield position, state.planes.master_weight[start:end], state.shard[start:end]


def _pieces(
    master: torch.Tensor, parameter: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both a piece at a time, the parameter's on the master's device."""
    for part, given in zip(master.split(_PIECE), parameter.split(_PIECE), strict=True):
        yield part, given.to(part.device)


def _equal(master: torch.Tensor, parameter: torch.Tensor) -> bool:
    return torch.equal(_bits(master.to(parameter.dtype)), _bits(parameter))


def _differs(master: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return _bits(master.to(parameter.dtype)) != _bits(parameter)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
