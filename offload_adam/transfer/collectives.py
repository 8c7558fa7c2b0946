"""The two collectives on a bucket: mean of the gradients, and all-gather of the parameters.

All are issued by the thread that runs backward or `step()`, in one order on every rank, on a
process group that nobody else uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from offload_adam.coordinator.membership import Membership

# The `*_single` names replace the `*_tensor` ones from torch 2.13 on; 2.11 has only the latter.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class PendingCollective:
    """A collective in flight, the memory it works on, and where this rank's part will lie.

    Holding `buffer` keeps the memory alive until the work is done.
    """

    work: dist.Work
    buffer: torch.Tensor
    shard: torch.Tensor

    def is_completed(self) -> bool:
        """Tell, without waiting, whether `shard` may be read."""
        return bool(self.work.is_completed())

    def wait(self, membership: Membership) -> None:
        """Wait for the collective, as long as all peers live; on a device only its stream waits.

        Raises:
            PeerFailedError: naming the ranks that have failed.
        """
        if self.buffer.device.type == "cpu":
            membership.wait(self.work)
        else:
            self.work.wait()


def mean_over_ranks(
    buffer: torch.Tensor, group: dist.ProcessGroup, part: tuple[int, int]
) -> PendingCollective:
    """Start averaging a bucket's gradients and return where this rank's part appears.

    float16 is divided before it is summed, or the sum of a few large gradients would overflow. On
    gloo the whole bucket is all-reduced and sliced, which is twice as fast as its reduce-scatter
    and gives the same bits; elsewhere it is reduce-scattered in place, unless every rank needs all
    of it.

    Args:
        buffer: (numel,) gradients of the bucket in the reduce dtype; overwritten.
        part: the range [start, end) that this rank needs: its shard, or the whole.
    """
    world_size = dist.get_world_size(group)
    operation = dist.ReduceOp.AVG
    if buffer.dtype == torch.float16:
        buffer.div_(world_size)
        operation = dist.ReduceOp.SUM
    shard = buffer[part[0] : part[1]]
    if dist.get_backend(group) == "gloo" or shard.numel() == buffer.numel():
        work = dist.all_reduce(buffer, operation, group=group, async_op=True)
    else:
        work = _reduce_scatter(shard, buffer, operation, group=group, async_op=True)
    assert work is not None
    return PendingCollective(work, buffer, shard)


def gather_shards(
    flat: torch.Tensor, group: dist.ProcessGroup, rank: int, world_size: int
) -> PendingCollective:
    """Start gathering every rank's shard of a bucket's parameters, in place.

    Args:
        flat: (numel,) the bucket; this rank's shard of it is up to date.
    """
    shard = flat.chunk(world_size)[rank]
    work = _all_gather(flat, shard, group=group, async_op=True)
    assert work is not None
    return PendingCollective(work, flat, shard)
