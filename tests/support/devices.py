"""Parameters in host memory that an optimizer takes for a device's."""

from __future__ import annotations

from dataclasses import replace

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.step.build import Backend
from offload_adam.transfer.collectives import GroupCollectives, PendingCollective
from offload_adam.transfer.streams import HostStreams, Streams
from tests.support.cuda_runtime import StandInRuntime


class EagerCollectives(GroupCollectives):
    """Collectives that are over when they have been issued: no stream waits for one of gloo."""

    def __init__(self, ranks: RankGroup) -> None:
        super().__init__(ranks)
        self._ranks = ranks

    def mean(
        self, streams: Streams, buffer: torch.Tensor, part: tuple[int, int]
    ) -> PendingCollective:
        return self._finish(super().mean(streams, buffer, part))

    def gather(self, streams: Streams, flat: torch.Tensor) -> PendingCollective:
        return self._finish(super().gather(streams, flat))

    def _finish(self, pending: PendingCollective) -> PendingCollective:
        pending.wait(self._ranks)
        return replace(pending, work=None)


HOST_AS_DEVICE = Backend(
    is_device=lambda _: True,
    make_runtime=StandInRuntime,
    make_streams=lambda _: HostStreams(),
    make_collectives=EagerCollectives,
)
"""All paths of parameters on a GPU; copies are over when they have been issued."""
