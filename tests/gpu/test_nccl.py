"""NCCL with one rank: collectives on views in every dtype, waits, our groups, abort, destroy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.torch_private import (
    abort_collectives,
    all_gather,
    open_group,
    reduce_scatter,
)
from offload_adam.transfer.collectives import Collectives
from offload_adam.transfer.streams import CudaStreams

NUMEL = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[torch.device]:
    """Return the first GPU, with a default group whose communicator is already open."""
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


@pytest.mark.parametrize("offset", [0, 1, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_collectives_work_in_place_on_a_part_of_a_buffer(
    device: torch.device, dtype: torch.dtype, offset: int
) -> None:
    # Buckets and shards are views of larger buffers, and may start at an unaligned address.
    group = dist.new_group([0], backend="nccl")
    whole = torch.randn(NUMEL + 2 * 4096, device=device).to(dtype)
    before = whole.clone()
    view = whole[offset : offset + NUMEL]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # to notice deprecated names of collectives
        for operation in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            reduce_scatter(view, view, operation, group=group, async_op=True).wait()
            dist.all_reduce(view, operation, group=group, async_op=True).wait()
        all_gather(view, view, group=group, async_op=True).wait()
    torch.cuda.synchronize()
    assert torch.equal(whole, before)
    dist.destroy_process_group(group)


def test_a_group_of_all_ranks_has_the_requested_backend(device: torch.device) -> None:
    for backend, tensor in (("nccl", torch.ones(8, device=device)), ("gloo", torch.ones(8))):
        group = open_group(f"of {backend}", [0], 0, backend, timedelta(seconds=60))
        assert dist.get_backend(group) == backend
        assert dist.get_process_group_ranks(group) == [0]
        dist.all_reduce(tensor, group=group)
        dist.destroy_process_group(group)


def test_the_host_waits_for_work_on_the_device(device: torch.device) -> None:
    group = dist.new_group([0], backend="nccl")
    buffer = torch.ones(NUMEL, device=device)
    work = dist.broadcast(buffer, 0, group=group, async_op=True)
    RankGroup(world_size=2, data={"cuda": group}).wait(work, on_device=True)
    assert work is not None
    assert work.is_completed()


def test_our_group_can_be_used_aborted_and_destroyed(device: torch.device) -> None:
    subgroup = open_group("own", [0], 0, "nccl", timedelta(seconds=60))
    buffer = torch.ones(NUMEL, device=device)
    dist.all_reduce(buffer, group=subgroup)
    torch.cuda.synchronize()
    assert torch.equal(buffer, torch.ones_like(buffer))
    abort_collectives(subgroup, "cuda")
    dist.destroy_process_group(subgroup)


def test_an_abort_ends_a_collective_that_waits_for_the_device(device: torch.device) -> None:
    group = dist.new_group([0], backend="nccl")
    other = dist.new_group([0], backend="nccl")
    buffer = torch.ones(NUMEL, device=device)
    for each in (group, other):
        dist.all_reduce(buffer, group=each)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    dist.all_reduce(buffer, group=group, async_op=True)
    # `abort_collectives` suppresses errors, so a test with it would pass without an abort.
    backend: Any = group._get_backend(device)
    backend.abort()
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
    # The device and the other group still work.
    dist.all_reduce(buffer, group=other)
    torch.cuda.synchronize()
    assert torch.equal(buffer, torch.ones_like(buffer))
    dist.destroy_process_group(other)
