"""The two collectives on a bucket: mean of the gradients, and all-gather of the parameters.

The thread that runs forward, backward or `step()` issues them, in the same order on every rank.
They run on a process group that only the optimizer uses.
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
    """A collective in flight, its memory, and this rank's part of its result.

    work: the host waits for it. None on CUDA: there the lane's stream waits for the collective, so
        the event that is recorded on the stream afterwards covers it.
    buffer: the collective's memory; this reference keeps it alive until the work is complete.
    shard: a view of `buffer`.
    """

    work: dist.Work | None
    buffer: torch.Tensor
    shard: torch.Tensor

    def is_completed(self) -> bool:
        """Return, without waiting, whether `wait` would return at once."""
        return self.work is None or bool(self.work.is_completed())

    def wait(self, ranks: RankGroup) -> None:
        """Block until the collective is complete; return at once if a stream waits for it.

        Raises:
            PeerFailedError: naming the failed ranks.
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
        """Start averaging a bucket's gradients over the ranks. Collective.

        Args:
            buffer: (numel,) gradients of the bucket in the reduce dtype; overwritten.
            part: the range [start, end) that this rank needs: its shard, or the whole bucket.
        """
        group = self._ranks.data_group(buffer.device)
        shard = buffer[part[0] : part[1]]

        def start() -> Any:
            operation = dist.ReduceOp.AVG
            if buffer.dtype == torch.float16:
                # Divide first: the sum of a few large gradients would overflow float16.
                buffer.div_(self._ranks.world_size)
                operation = dist.ReduceOp.SUM
            # On gloo an all-reduce is twice as fast as a reduce-scatter and gives the same bits.
            if dist.get_backend(group) == "gloo" or shard.numel() == buffer.numel():
                return dist.all_reduce(buffer, operation, group=group, async_op=True)
            return reduce_scatter(shard, buffer, operation, group=group, async_op=True)

        return _issue(Lane.REDUCE, streams, start, buffer, shard)

    def gather(
        self, streams: Streams, flat: torch.Tensor, members: tuple[int, ...] | None = None
    ) -> PendingCollective:
        """Start an all-gather of a bucket's parameters, in place. Collective.

        Args:
            flat: (numel,) the bucket; this rank has updated its own shard of it.
            members: the ranks that share the bucket, if not all; see `RankGroup.open_part`.
        """
        if members is None:
            group = self._ranks.data_group(flat.device)
        else:
            group = self._ranks.parts[flat.device.type, members]
        shard = flat.chunk(group.size())[group.rank()]

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
    # The collectives of `HostStreams` are gloo's: their thread works while the host continues.
    if isinstance(streams, HostStreams):
        return PendingCollective(start(), buffer, shard)

    def start_and_wait() -> None:
        # The backend runs the collective on its own stream. This wait makes the lane's stream wait
        # for that stream, and returns at once.
        start().wait()

    streams.launch(lane, start_and_wait, reads=[buffer], writes=[buffer])
    return PendingCollective(None, buffer, shard)
