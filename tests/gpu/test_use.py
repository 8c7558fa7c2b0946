"""Uses of the optimizer on a GPU: loss scaling, DDP, CUDA graphs, more than one device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from offload_adam import OffloadAdam, OffloadPolicy
from tests.gpu.layers import Layers, assert_same_bits, bits, gradients_of, make, train


def test_a_grad_scaler_skips_a_step_with_an_infinite_gradient() -> None:
    model = torch.nn.Linear(64, 8, device="cuda")
    optimizer = OffloadAdam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16, growth_interval=1000)
    skipped = []
    for step in range(4):
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.full((4, 64), 1.0, device="cuda")).float().square().mean()
        scaler.scale(loss).backward()
        if step == 1:
            assert model.weight.grad is not None
            model.weight.grad[0, 0] = torch.inf
        before = model.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        skipped.append(optimizer.last_step.skipped)
        assert torch.equal(before, model.weight) == skipped[-1]
    assert skipped == [False, True, False, False]
    assert scaler.get_scale() == 2.0**15


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_the_optimizer_uses_the_gradients_that_ddp_averaged() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)]
    reference = torch.nn.Sequential(*layers).cuda()
    wrapped = DistributedDataParallel(copy.deepcopy(reference))
    optimizer = OffloadAdam(wrapped.parameters(), lr=1e-2, gradient_reduction="external")
    oracle = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    for step in range(5):
        torch.manual_seed(step)
        data = torch.randn(16, 32, device="cuda")
        for model, one in ((wrapped, optimizer), (reference, oracle)):
            one.zero_grad()
            model(data).square().mean().backward()
            one.step()
    for found, expected in zip(wrapped.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    optimizer.close()


def test_capturing_the_copies_in_a_graph_raises() -> None:
    model, optimizer = make("cuda", overlap=True)
    train(model, optimizer, range(3), "cuda")
    given = gradients_of(model, 3, "cuda")
    optimizer.synchronize()  # outside of the graph, since the wait cannot be captured
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match=r"graph is being captured.*without module="),
    ):
        model(given).backward()
    optimizer.close()


def test_a_forward_is_captured_after_synchronize_and_follows_the_updates() -> None:
    model, optimizer = make("cuda", overlap=True)
    train(model, optimizer, range(3), "cuda")
    given = gradients_of(model, 3, "cuda")
    optimizer.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(given)
    for step in range(3, 6):
        train(model, optimizer, range(step, step + 1), "cuda")
        optimizer.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, model(given))
    optimizer.close()


def test_no_memory_is_added_if_a_part_of_the_state_stays_on_the_gpu() -> None:
    model, optimizer = make("cuda", overlap=True, offload_fraction=0.5)
    train(model, optimizer, range(4), "cuda")
    optimizer.synchronize()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    train(model, optimizer, range(4, 24), "cuda")
    optimizer.synchronize()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    # The update on the GPU has temporaries, whose memory the caching allocator reuses.
    for key in ("segment.all.allocated", "reserved_bytes.all.current"):
        assert after[key] == before[key], key


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("overlap", [False, True])
def test_units_on_two_devices_have_the_bits_of_the_cpu(overlap: bool) -> None:
    reference, sequential = make("cpu", overlap=False)
    train(reference, sequential, range(8), "cpu")
    model = Layers()
    devices = [f"cuda:{number % 2}" for number in range(len(model.units))]
    for unit, device in zip(model.units, devices, strict=True):
        unit.to(device)
    optimizer = OffloadAdam(
        model.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        decoupled_weight_decay=True,
        max_grad_norm=20.0,
        offload=OffloadPolicy(bucket_nbytes=8192),
        module=model,
        overlap=overlap,
    )
    for step in range(8):
        placed = [
            [gradient.to(device) for gradient in unit]
            for unit, device in zip(gradients_of(model, step, "cpu"), devices, strict=True)
        ]
        terms = [unit(given) for unit, given in zip(model.units, placed, strict=True)]
        torch.stack([term.to("cuda:0") for term in terms]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(bits(model, optimizer), bits(reference, sequential))
    optimizer.close()
