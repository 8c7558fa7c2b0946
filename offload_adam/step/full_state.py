"""Put the shards of every rank back together into whole tensors, on rank 0."""

from __future__ import annotations

import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.step.bucket_state import BucketState


def gather_bucket(
    state: BucketState, ranks: RankGroup
) -> dict[int, dict[str, torch.Tensor]] | None:
    """Return the whole state of one bucket's parameters by their index, on rank 0 only. Collective.

    Tensors are copies, fp32, in each parameter's shape. One bucket is whole at a time, besides what
    rank 0 keeps.
    """
    whole: dict[int, dict[str, torch.Tensor]] = {
        index: {"step": state.step_counts[position].clone()}
        for position, index in enumerate(state.indices.tolist())
    }
    planes = state.planes.named(own_master=state.own_master)
    for key, plane in planes.items():
        flat = _gather_plane(plane, ranks, state.layout.world_size)
        if flat is None:
            continue
        for position, index in enumerate(state.indices.tolist()):
            placed = state.layout.placements[position]
            parameter = state.parameters[position]
            values = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=plane.dtype, device="cpu"
            )
            values.as_strided((placed.numel,), (1,)).copy_(flat[placed.start : placed.end])
            whole[index][key] = values.contiguous()
    return whole if ranks.rank == 0 else None


def _gather_plane(plane: torch.Tensor, ranks: RankGroup, num_shards: int) -> torch.Tensor | None:
    """Return all ranks' shards of one plane end to end, on rank 0 only."""
    if num_shards == 1:
        return plane
    if plane.numel() == 0:
        return plane if ranks.rank == 0 else None
    plane = plane.cpu()  # the control group's collectives are of host memory
    parts: list[torch.Tensor] | None = None
    flat = None
    if ranks.rank == 0:
        flat = torch.empty(plane.numel() * ranks.world_size, dtype=plane.dtype, device="cpu")
        parts = list(flat.chunk(ranks.world_size))
    rank_0 = ranks.global_ranks[0]
    ranks.wait(dist.gather(plane, parts, dst=rank_0, group=ranks.control, async_op=True))
    return flat
