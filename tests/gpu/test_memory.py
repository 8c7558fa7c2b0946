"""The exact number of pinned bytes, pinning that fails, and memory that does not grow."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from offload_adam import OffloadAdam
from offload_adam.memory.arena import HostArena
from offload_adam.memory.pinning import CudaRuntime, PinError
from tests.gpu.layers import gradients_of, make, train


@pytest.mark.parametrize("pin", ["all", "staging", "none"])
def test_exactly_the_requested_memory_is_pinned(pin: str) -> None:
    _, optimizer = make("cuda", pin=pin)
    held = optimizer.host_nbytes
    expected = {"all": held["state"] + held["staging"], "staging": held["staging"], "none": 0}
    assert optimizer.pinned_nbytes == expected[pin]
    planes = [state.planes.exp_avg for state in optimizer._alive().states]
    shards = [state.planes.gradient_shard for state in optimizer._alive().states]
    for plane in (*planes, *shards):
        assert plane is not None
        assert plane.is_pinned() == (pin == "all")
        assert plane[-1:].is_pinned() == (pin == "all")
    optimizer.close()
    assert not any(plane.is_pinned() for plane in planes)
    gc.collect()


def test_pinning_that_fails_leaves_no_cuda_error() -> None:
    arena = HostArena(3 * 4096, piece_nbytes=4096)
    tensor = arena.allocate(4096, torch.uint8)
    runtime = CudaRuntime(torch.device("cuda", 0))
    second = tensor.data_ptr() + 4096
    assert runtime.register(second, 4096) == 0
    with pytest.raises(PinError, match=r"piece 2 of 3.*ulimit -l"):
        arena.pin(runtime)
    assert not tensor.is_pinned()
    assert arena.pinned_nbytes == 0
    assert runtime.unregister(second) == 0
    # A pending CUDA error would be raised by the next launch.
    assert float(torch.ones(10, device="cuda").sum()) == 10.0
    arena.pin(runtime)
    assert tensor.is_pinned()
    arena.close()
    assert not tensor.is_pinned()


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_allocated_after_the_first_steps(overlap: bool) -> None:
    model, optimizer = make("cuda", overlap=overlap)
    train(model, optimizer, range(3), "cuda")
    given = gradients_of(model, 0, "cuda")

    def allocations() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    def backward() -> int:
        before = allocations()
        model(given).backward()
        return allocations() - before

    first = backward()
    optimizer.step()
    optimizer.synchronize()
    torch.cuda.synchronize()
    gc.collect()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    resident = psutil.Process().memory_info().rss
    for _ in range(20):
        assert backward() == first
        before = allocations()
        optimizer.step()
        optimizer.synchronize()
        assert allocations() == before
        optimizer.zero_grad()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments
    # Python's objects change the resident memory a little. A leaked buffer would add up over steps.
    assert psutil.Process().memory_info().rss - resident < 2 * 2**20


def test_small_gradients_share_copies_and_allocate_nothing() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16, device="cuda"))
        for _ in range(2000)
    ]
    optimizer = OffloadAdam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    for kind in ("Memcpy DtoH", "Memcpy HtoD"):
        # One of gradients or parameters. The step also compares parameters with their masters.
        assert 1 <= sum(kind in name for name in names) < 10
    optimizer.close()


@pytest.mark.parametrize("options", [{}, {"accumulate": "host"}], ids=str)
def test_backward_never_waits_for_the_device(options: dict[str, Any]) -> None:
    model, optimizer = make("cuda", overlap=True, **options)
    train(model, optimizer, range(3), "cuda")
    for step in range(3, 6):
        loss = model(gradients_of(model, step, "cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
        optimizer.zero_grad()
