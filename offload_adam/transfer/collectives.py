"""The two collectives on a bucket: mean of the gradients, and all-gather of the parameters.

All are issued by the thread that runs forward, backward or `step()`, in one order on every rank, on
a process group that nobody else uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.layout.schedule import Lane
from offload_adam.torch_private import all_gather, reduce_scatter
from offload_adam.transfer.streams import HostStreams, Streams


@dataclass(frozen=True, slots=True)
class PendingCollective:
    """A collective in flight, the memory it works on, and where this rank's part will lie.

    work: None if a stream waits for it; a wait for the stream's event is enough then.
    buffer: held, so that its memory lives until the work is done.
    """

    work: dist.Work | None
    buffer: torch.Tensor
    shard: torch.Tensor

    def is_completed(self) -> bool:
        """Return, without waiting, whether the host has nothing to wait for."""
        return self.work is None or bool(self.work.is_completed())

    def wait(self, ranks: RankGroup) -> None:
        """Block until it is over, or until a peer fails.

        Raises:
            PeerFailedError: naming the ranks that have failed.
        """
        if self.work is not None:
            ranks.wait(self.work, on_device=self.buffer.is_cuda)


class Collectives:
    """The collectives of one optimizer, on the process groups of its ranks."""

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks

    def mean(
        self, streams: Streams, buffer: torch.Tensor, part: tuple[int, int]
    ) -> PendingCollective:
        """Start averaging a bucket's gradients over the ranks.

        float16 is divided before it is summed: otherwise the sum of a few large gradients would
        overflow. On gloo the whole bucket is all-reduced and sliced, which is twice as fast as
        gloo's reduce-scatter and gives the same bits. Elsewhere the bucket is reduce-scattered in
        place, unless every rank needs all of it.

        Args:
            buffer: (numel,) gradients of the bucket in the reduce dtype; overwritten.
            part: the range [start, end) that this rank needs: its shard, or the whole.
        """
        group = self._ranks.data_group(buffer.device)
        shard = buffer[part[0] : part[1]]

        def start() -> Any:
            operation = dist.ReduceOp.AVG
            if buffer.dtype == torch.float16:
                buffer.div_(self._ranks.world_size)
                operation = dist.ReduceOp.SUM
            if dist.get_backend(group) == "gloo" or shard.numel() == buffer.numel():
                return dist.all_reduce(buffer, operation, group=group, async_op=True)
            return reduce_scatter(shard, buffer, operation, group=group, async_op=True)

        return _issue(Lane.REDUCE, streams, start, buffer, shard)

    def gather(self, streams: Streams, flat: torch.Tensor) -> PendingCollective:
        """Start gathering every rank's shard of a bucket's parameters, in place.

        Args:
            flat: (numel,) the bucket; this rank's shard of it is up to date.
        """
        group = self._ranks.data_group(flat.device)
        shard = flat.chunk(self._ranks.world_size)[self._ranks.rank]

        def start() -> Any:
            return all_gather(flat, shard, group=group, async_op=True)

        return _issue(Lane.GATHER, streams, start, flat, shard)


def _issue(
    lane: Lane,
    streams: Streams,
    start: Callable[[], Any],
    buffer: torch.Tensor,
    shard: torch.Tensor,
) -> PendingCollective:
    """Start a collective on its lane. On a device the lane waits for it, and the host does not."""
    if isinstance(streams, HostStreams):
        return PendingCollective(start(), buffer, shard)

    def start_and_wait() -> None:
        start().wait()

    streams.launch(lane, start_and_wait, reads=[buffer], writes=[buffer])
    return PendingCollective(None, buffer, shard)
