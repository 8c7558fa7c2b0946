"""NCCL with one rank: averages in every dtype, waits, and a group that is used and aborted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.torch_private import open_group, reduce_scatter
from offload_adam.transfer.collectives import Collectives
from offload_adam.transfer.streams import CudaStreams

NUMEL = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[torch.device]:
    """Return the first GPU, with a default group that has opened its communicator at once."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
        device_id=device,
    )
    yield device
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_collectives_of_one_rank_change_no_bit(device: torch.device, dtype: torch.dtype) -> None:
    group = dist.new_group([0], backend="nccl")
    ranks = RankGroup(data={"cuda": group})
    collectives, streams = Collectives(ranks), CudaStreams(device)
    buffer = torch.randn(NUMEL, device=device).to(dtype)
    before = buffer.clone()
    pending = collectives.mean(streams, buffer, (0, NUMEL))
    collectives.gather(streams, buffer)
    # `mean` never reduce-scatters a shard that is the whole buffer, so call it here.
    average = dist.ReduceOp.AVG
    reduce_scatter(buffer, buffer, average, group=group, async_op=True).wait()
    torch.cuda.synchronize()
    assert torch.equal(buffer, before)
    pending.wait(ranks)
    assert pending.is_completed()


def test_the_host_waits_for_work_on_the_device(device: torch.device) -> None:
    group = dist.new_group([0], backend="nccl")
    buffer = torch.ones(NUMEL, device=device)
    work = dist.broadcast(buffer, 0, group=group, async_op=True)
    RankGroup(world_size=2, data={"cuda": group}).wait(work, on_device=True)
    assert work is not None
    assert work.is_completed()


def test_a_group_of_our_own_is_used_aborted_and_destroyed(device: torch.device) -> None:
    subgroup = open_group("own", [0], 0, "nccl", timedelta(seconds=60))
    buffer = torch.ones(NUMEL, device=device)
    dist.all_reduce(buffer, group=subgroup)
    torch.cuda.synchronize()
    assert torch.equal(buffer, torch.ones_like(buffer))
    backend: Any = subgroup._get_backend(device)
    backend.abort()
    dist.destroy_process_group(subgroup)
