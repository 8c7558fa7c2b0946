"""The state of one parameter on one rank, as tensors that share memory with the planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload_adam.parameters.gradients import in_memory_order
from offload_adam.step.box_tensor import memory_order
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.state_shard import StateShard


def local_range(state: BucketState, position: int) -> tuple[int, int]:
    """Return the range [start, end) of a parameter, in memory order, that this rank owns."""
    low, high = state.layout.shard_bounds(state.rank)
    placed = state.layout.placements[position]
    start = min(max(placed.start, low), placed.end)
    end = max(min(placed.end, high), start)
    return start - placed.start, end - placed.start


def local_state(state: BucketState, position: int) -> dict[str, torch.Tensor]:
    """Return torch's keys with views of this rank's state of one parameter.

    With one rank every tensor has the parameter's shape and strides; with more it is the 1-d range
    `local_range`, which may be empty. Each has a storage of its own over the shared memory, so that
    saving it does not write a whole plane.
    """
    entry = {"step": state.step_counts[position]}
    for key, plane in state.planes.named(own_master=state.own_master).items():
        entry[key] = _view(state, position, plane)
    return entry


def _view(state: BucketState, position: int, plane: torch.Tensor) -> torch.Tensor:
    start, end = local_range(state, position)
    parameter = state.parameters[position]
    if start == end:
        whole = state.layout.world_size == 1
        return torch.empty(parameter.shape if whole else 0, dtype=plane.dtype, device=plane.device)
    low, _ = state.layout.shard_bounds(state.rank)
    offset = state.layout.placements[position].start + start - low
    with torch.cuda.device_of(plane):  # DLPack exports from the current device alone
        part = torch.from_dlpack(plane[offset : offset + end - start])
    if state.layout.world_size == 1:
        return part.as_strided(parameter.shape, parameter.stride())
    return part


def state_shard(state: BucketState, position: int, local: torch.Tensor) -> StateShard:
    """Return a tensor of `local_state` as a part of the whole that knows its place."""
    parameter = state.parameters[position]
    start, _ = local_range(state, position)
    return StateShard(parameter.shape, memory_order(parameter), start, local)


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """Copies that have been checked and can no longer fail."""

    copies: list[tuple[torch.Tensor, torch.Tensor]]

    def apply(self) -> None:
        """Copy in place; a source may be the target itself."""
        for target, source in self.copies:
            target.copy_(source)


def plan_load(state: BucketState, position: int, saved: Mapping[str, Any]) -> PlannedLoad:
    """Check a saved state of one parameter and return the copies that load it.

    Args:
        saved: the keys of `local_state`, with tensors of the parameter's whole shape (from any
            world, or from torch's own Adam) or of this rank's ranges. What is missing is zero, as
            torch makes moments at the first step; a missing master weight is left to follow the
            parameter.

    Raises:
        ValueError: naming the parameter, for a shape that is neither.
    """
    copies = []
    for key, target in local_state(state, position).items():
        value = saved.get(key)
        if value is None:
            if key != "master_weight":
                copies.append((target, torch.zeros((), dtype=target.dtype, device=target.device)))
        elif key == "step":
            copies.append(
                (target, torch.tensor(float(value), dtype=target.dtype, device=target.device))
            )
        else:
            what = f"{key} of parameter {state.names[position]!r}"
            copies.append((target, _part_of(state, position, what, value, target)))
    return PlannedLoad(copies)


def _part_of(
    state: BucketState, position: int, what: str, value: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return the part of a saved tensor that belongs into `target`."""
    parameter = state.parameters[position]
    if isinstance(value, StateShard) and value.shape == parameter.shape:
        start, end = local_range(state, position)
        if not value.has_range_of(memory_order(parameter), start, end):
            raise ValueError(
                f"the saved {what} is {value!r}, and this rank needs elements [{start}, {end}). "
                "Load it through torch.distributed.checkpoint, or load a full_state_dict()"
            )
        return value.to_local()
    if (
        state.layout.world_size > 1
        and value.shape == parameter.shape
        and (value.shape != target.shape or value.dim() != 1)
    ):
        whole = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device
        )
        start, end = local_range(state, position)
        return in_memory_order(whole.copy_(value))[start:end]
    if value.shape != target.shape:
        raise ValueError(
            f"the saved {what} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
        )
    return value
