"""Which way each bucket takes between device and host, and the memory that this needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Schedule, plan_schedule
from offload_adam.memory.arena import HostArena
from offload_adam.step.backend import Backend
from offload_adam.step.bucket_state import BucketState
from offload_adam.step.landing import Landing
from offload_adam.step.reduction import GradientReduction
from offload_adam.transfer.rings import Rings
from offload_adam.transfer.streams import StreamsByDevice


class Routing:
    """Plans the schedule of an optimizer's buckets, and makes the slots and buffers for it.

    Owns: streams, rings and the buffers of the landing.
    Lifecycle: `plan` for every set of buckets, while nothing is under way.
    """

    def __init__(
        self,
        ranks: RankGroup,
        reduction: GradientReduction,
        backend: Backend,
        make_buffer: Callable[[int], HostArena],
    ) -> None:
        """Begin without buckets.

        Args:
            make_buffer: gives host memory of so many bytes, page-locked where that was asked for.
        """
        self.streams = StreamsByDevice(backend.make_streams)
        self.landing = Landing(ranks, reduction.slots, make_arena=make_buffer)
        self.rings = Rings(
            make_buffer,
            num_staging=backend.num_staging_slots,
            num_reduction=backend.num_reduce_slots,
        )

    @property
    def host_nbytes(self) -> int:
        """Host bytes of slots and buffers."""
        return self.rings.staging_nbytes + self.landing.nbytes

    @property
    def slot_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots on devices."""
        return self.rings.reduction_nbytes

    def plan(self, states: Sequence[BucketState]) -> Schedule:
        """Return the schedule of all buckets, having allocated slots and buffers for them."""
        for state in states:
            self._reserve(state)
        return plan_schedule(
            [state.plan for state in states],
            num_reduce_slots=self.rings.num_reduction,
            num_staging_slots=self.rings.num_staging,
        )

    def _reserve(self, state: BucketState) -> None:
        bucket, family = state.layout, state.layout.family
        if state.plan.uses_ring:
            self.rings.fit_reduction(family, state.gradient_dtype, state.device, bucket.numel)
        elif state.plan.is_offloaded and not state.plan.copies_straight:
            self.landing.reserve(state, state.gradient_dtype)
        if state.plan.stages_parameters:
            self.rings.fit_staging(family, state.dtype, bucket.shard_numel)
