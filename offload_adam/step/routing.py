"""Which way each bucket takes between device and host, and the memory that this needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Route, Schedule, plan_schedule
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
        *,
        pins_buffers: bool,
    ) -> None:
        """Begin without buckets.

        Args:
            make_buffer: gives host memory of so many bytes, page-locked where that was asked for.
            pins_buffers: it was: then what is not page-locked itself is copied through a buffer.
        """
        self.streams = StreamsByDevice(backend.make_streams)
        self.landing = Landing(ranks, reduction.slots, make_arena=make_buffer)
        self.rings = Rings(
            make_buffer,
            num_staging=backend.num_staging_slots,
            num_reduction=backend.num_reduce_slots,
        )
        self._reduction = reduction
        self._pins_buffers = pins_buffers

    @property
    def host_nbytes(self) -> int:
        """Host bytes of slots and buffers."""
        return self.rings.staging_nbytes + self.landing.nbytes

    @property
    def slot_nbytes(self) -> Mapping[torch.device, int]:
        """Bytes of the slots on devices."""
        return self.rings.reduction_nbytes

    def plan(self, states: Sequence[BucketState]) -> tuple[list[Route], Schedule]:
        """Return the routes and the schedule of all buckets, having made room for them."""
        routes = [self._route(state) for state in states]
        for state, route in zip(states, routes, strict=True):
            self._make_room(state, route)
        schedule = plan_schedule(
            routes,
            num_reduce_slots=self.rings.num_reduction,
            num_staging_slots=self.rings.num_staging,
        )
        return routes, schedule

    def _make_room(self, state: BucketState, route: Route) -> None:
        arrives = self._reduction.arrival_dtype(state.dtype)
        if route.in_ring:
            numel = state.layout.numel
            self.rings.fit_reduction(route.kind, arrives, state.device, numel)
        elif state.offloaded and self.streams.of(state.device).is_asynchronous:
            self.landing.reserve(state, arrives)
        if route.staged:
            self.rings.fit_staging(route.kind, state.dtype, state.layout.shard_numel)

    def _route(self, state: BucketState) -> Route:
        layout = state.layout
        arrives = self._reduction.arrival_dtype(state.dtype)
        reduces = self._reduction.reduces and layout.numel > 0
        # A slot of a ring is emptied by a copy that is issued at once: the next bucket that uses it
        # could not wait for any other.
        to_device = state.offloaded and self.streams.of(state.device).is_asynchronous
        at_once = to_device and self.landing.goes_straight(
            state, arrives, adds=self._reduction.accumulates
        )
        return Route(
            layout,
            reduces=reduces,
            gathers=layout.world_size > 1 and layout.numel > 0,
            offloaded=state.offloaded,
            staged=(state.offloaded and state.dtype != torch.float32)
            or (to_device and self._pins_buffers and not state.pinned),
            hosted=state.hosted,
            in_ring=reduces and at_once,
            kind=f"{state.dtype}@{state.device}",
        )
