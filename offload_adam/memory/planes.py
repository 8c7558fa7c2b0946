"""The state planes of one bucket's shard: flat tensors that share one element index."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload_adam.layout.flat import Segment
from offload_adam.layout.state_plan import StatePlan
from offload_adam.memory.arena import HostArena
from offload_adam.memory.split_master import join


@dataclass(frozen=True, slots=True)
class StatePlanes:
    """This rank's Adam state of one bucket; every tensor is flat and `shard_numel` long.

    master_weight: float32; or bfloat16, the high half of a split master weight. If the plan has no
        such plane, the parameter's own shard.
    master_remainder: int16, the low half of a split master weight; None if it is not split.
    exp_avg, exp_avg_sq: float32 or bfloat16.
    max_exp_avg_sq: float32, None without amsgrad.
    gradient_shard: the reduced gradient, None if the kernel reads `.grad` itself.
    """

    master_weight: torch.Tensor
    master_remainder: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None
    gradient_shard: torch.Tensor | None

    def master_of(
        self, segment: Segment, rows: torch.Tensor | None = None, width: int = 1
    ) -> torch.Tensor:
        """Return a segment's float32 master weights.

        Args:
            rows: (k,) int64, row numbers in the segment. None for all of its elements.
            width: elements of a row.

        Returns:
            (k, width), or (numel,) without `rows`. A copy if `rows` is given or weights are split.
        """

        def take(plane: torch.Tensor) -> torch.Tensor:
            part = segment.of(plane)
            return part if rows is None else part.view(-1, width)[rows]

        if self.master_remainder is None:
            return take(self.master_weight)
        return join(take(self.master_weight), take(self.master_remainder))

    def named(self, *, own_master: bool) -> dict[str, torch.Tensor]:
        """Return the planes that belong to the optimizer's state, by torch's keys.

        Args:
            own_master: the parameter is its own master weight, so there is no entry for it. The
                parameter is saved with the model, and a second copy might differ. For the same
                reason the high half of a split master weight has no entry.
        """
        planes = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.max_exp_avg_sq is not None:
            planes["max_exp_avg_sq"] = self.max_exp_avg_sq
        if self.master_remainder is not None:
            planes["master_remainder"] = self.master_remainder
        elif not own_master:
            planes["master_weight"] = self.master_weight
        return planes


def allocate_planes(plan: StatePlan, arena: HostArena, shard: torch.Tensor) -> StatePlanes:
    """Allocate one bucket's planes, zeroed, and fill the master weights from `shard`.

    Args:
        arena: for planes in host memory. Other planes are allocated on the shard's device.
        shard: (shard_numel,) this rank's part of the parameters. If they are their own master
            weights, this tensor is the plane.
    """

    def allocate(dtype: torch.dtype) -> torch.Tensor:
        if plan.location.is_host:
            return arena.allocate(plan.bucket.shard_numel, dtype)
        return torch.zeros(plan.bucket.shard_numel, dtype=dtype, device=shard.device)

    master = torch.bfloat16 if plan.bucket.splits_master else torch.float32
    moment = torch.bfloat16 if plan.bucket.has_bf16_moments else torch.float32
    planes = StatePlanes(
        master_weight=allocate(master) if plan.state.master_weight else shard,
        master_remainder=allocate(torch.int16) if plan.state.master_remainder else None,
        exp_avg=allocate(moment),
        exp_avg_sq=allocate(moment),
        max_exp_avg_sq=allocate(moment) if plan.state.max_exp_avg_sq else None,
        gradient_shard=(
            allocate(gradient_dtype(shard.dtype, plan.gradient.shard_itemsize))
            if plan.gradient.shard_itemsize
            else None
        ),
    )
    if plan.state.master_weight:
        planes.master_weight.copy_(shard)
    return planes


def gradient_dtype(dtype: torch.dtype, itemsize: int) -> torch.dtype:
    """Return the dtype of a gradient shard: its parameter's, or float32 if planned wider."""
    return dtype if itemsize == dtype.itemsize else torch.float32
