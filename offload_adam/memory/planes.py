"""The state planes of one bucket's shard: flat tensors that share one element index."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload_adam.kernels.codes import EXP_AVG, EXP_AVG_SQ, SQ_MIN_EXPONENT
from offload_adam.layout.flat import Segment, blocks_of
from offload_adam.layout.state_plan import StatePlan
from offload_adam.memory.arena import HostArena
from offload_adam.memory.codes import CodedMoment, Plane
from offload_adam.memory.split_master import join

SCALED_KEY = "scaled_exp_avg_sq"
"""Key of a second moment in codes."""

_DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}
_REMAINDER_DTYPES = {1: torch.int8, 2: torch.int16}


@dataclass(frozen=True, slots=True)
class StatePlanes:
    """This rank's Adam state of one bucket; most tensors are flat and `shard_numel` long.

    master_weight: float32; or bfloat16, the high half of a split master weight. If the plan has no
        such plane, the parameter's own shard.
    master_remainder: int16, the low half of a split master weight, or int8, the upper byte of it;
        None if it is not split.
    exp_avg, exp_avg_sq: float32, bfloat16, or uint8 for 8-bit codes.
    max_exp_avg_sq: float32, None without amsgrad.
    exponents: (blocks, 2) uint8, of 8-bit codes; see `kernels.adam.update`. None without codes.
    gradient_shard: the reduced gradient, None if the kernel reads `.grad` itself.
    """

    master_weight: torch.Tensor
    master_remainder: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None
    exponents: torch.Tensor | None
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

    def named(self, *, own_master: bool) -> dict[str, Plane]:
        """Return the planes that belong to the optimizer's state, by torch's keys.

        A second moment in codes is "scaled_exp_avg_sq": its values are divided by a scale.

        Args:
            own_master: the parameter is its own master weight, so there is no entry for it. The
                parameter is saved with the model, and a second copy might differ. For the same
                reason the high half of a split master weight has no entry.
        """
        planes: dict[str, Plane] = {"exp_avg": self.exp_avg}
        if self.exponents is None:
            planes["exp_avg_sq"] = self.exp_avg_sq
        else:
            of_second = self.exponents[:, EXP_AVG_SQ]
            planes[SCALED_KEY] = CodedMoment(self.exp_avg_sq, of_second, is_squared=True)
            if self.exp_avg.dtype == torch.uint8:
                of_first = self.exponents[:, EXP_AVG]
                planes["exp_avg"] = CodedMoment(self.exp_avg, of_first, is_squared=False)
        if self.max_exp_avg_sq is not None:
            planes["max_exp_avg_sq"] = self.max_exp_avg_sq
        if self.master_remainder is not None:
            planes["master_remainder"] = self.master_remainder
        elif not own_master:
            planes["master_weight"] = self.master_weight
        return planes

    def allocated(self, *, own_master: bool) -> dict[str, torch.Tensor]:
        """Return the planes of state in memory, by their categories in the ledger.

        Args:
            own_master: the parameter is its own master weight, or the high half of it.
        """
        planes = {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "max_exp_avg_sq": self.max_exp_avg_sq,
            "exponents": self.exponents,
            "master_remainder": self.master_remainder,
            "master_weight": None if own_master else self.master_weight,
        }
        return {name: plane for name, plane in planes.items() if plane is not None}


def allocate_planes(
    plan: StatePlan, arena: HostArena, shard: torch.Tensor, *, fills: bool = True
) -> StatePlanes:
    """Allocate one bucket's planes, zeroed, and fill the master weights from `shard`.

    Args:
        arena: for planes in host memory. Other planes are allocated on the shard's device.
        shard: (shard_numel,) this rank's part of the parameters. If they are their own master
            weights, this tensor is the plane.
        fills: False to leave what the memory of the arena holds.
    """

    numel, sizes = plan.bucket.shard_numel, plan.state

    def allocate(dtype: torch.dtype) -> torch.Tensor:
        if plan.location.is_host:
            return arena.allocate(numel, dtype)
        return torch.zeros(numel, dtype=dtype, device=shard.device)

    remainder = _REMAINDER_DTYPES.get(sizes.master_remainder)
    exponents_nbytes = blocks_of(numel) * sizes.exponents
    planes = StatePlanes(
        master_weight=allocate(_DTYPES[sizes.master_weight]) if sizes.master_weight else shard,
        master_remainder=None if remainder is None else allocate(remainder),
        exp_avg=allocate(_DTYPES[sizes.exp_avg]),
        exp_avg_sq=allocate(_DTYPES[sizes.exp_avg_sq]),
        max_exp_avg_sq=allocate(torch.float32) if sizes.max_exp_avg_sq else None,
        exponents=(
            arena.allocate(exponents_nbytes, torch.uint8).view(-1, sizes.exponents)
            if sizes.exponents
            else None
        ),
        gradient_shard=(
            allocate(gradient_dtype(shard.dtype, plan.gradient.shard_itemsize))
            if plan.gradient.shard_itemsize
            else None
        ),
    )
    if fills and plan.state.master_weight:
        planes.master_weight.copy_(shard)
    if fills and planes.exponents is not None:
        planes.exponents[:, EXP_AVG_SQ].fill_(SQ_MIN_EXPONENT)
    return planes


def gradient_dtype(dtype: torch.dtype, itemsize: int) -> torch.dtype:
    """Return the dtype of a gradient shard: its parameter's, or float32 if planned wider."""
    return dtype if itemsize == dtype.itemsize else torch.float32
