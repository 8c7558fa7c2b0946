"""Parameters on a GPU; other tests run the same code with parameters in host memory."""

from __future__ import annotations

import copy

import pytest
import torch

from offload_adam import OffloadAdam, OffloadPolicy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_model(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(65, 130), torch.nn.Tanh(), torch.nn.Linear(130, 7)]
    return torch.nn.Sequential(*layers).to("cuda", dtype)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masters_follow_torchs_adam_in_float64(dtype: torch.dtype, streams: bool) -> None:
    model = make_model(dtype)
    masters = [torch.nn.Parameter(p.detach().double().cpu()) for p in model.parameters()]
    optimizer = OffloadAdam(
        model.parameters(),
        lr=1e-2,
        offload=OffloadPolicy(bucket_nbytes=4096),
        module=model if streams else None,
    )
    oracle = torch.optim.Adam(masters, lr=1e-2, foreach=False)
    for step in range(5):
        for number, (parameter, master) in enumerate(zip(model.parameters(), masters, strict=True)):
            generator = torch.Generator().manual_seed(10 * step + number)
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = gradient.to("cuda")
            master.grad = gradient.double()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
    optimizer.synchronize()
    for parameter, master in zip(model.parameters(), masters, strict=True):
        held = optimizer.state[parameter]["master_weight"]
        assert (held - master).abs().max() < 1e-6
        assert torch.equal(parameter.cpu(), held.to(dtype))


def test_streaming_and_drop_in_give_the_same_bits() -> None:
    results = []
    for streams in (False, True):
        model = make_model(torch.bfloat16)
        optimizer = OffloadAdam(
            model.parameters(),
            lr=1e-2,
            max_grad_norm=0.1,
            offload=OffloadPolicy(bucket_nbytes=4096),
            module=model if streams else None,
        )
        for step in range(5):
            torch.manual_seed(step)
            data = torch.randn(8, 65, device="cuda", dtype=torch.bfloat16)
            model(data).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        results.append([parameter.detach().cpu() for parameter in model.parameters()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("streams", [False, True])
def test_a_model_moved_after_construction_trains_as_one_moved_before(streams: bool) -> None:
    results = []
    for moved_after in (False, True):
        model = make_model(torch.bfloat16)
        if moved_after:
            model.to("cpu")
        optimizer = OffloadAdam(model.parameters(), lr=1e-2, module=model if streams else None)
        model.to("cuda")
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(16, 65).to("cuda", torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            # As an evaluation on the host does.
            optimizer.synchronize()
            model.to("cpu").to("cuda")
        assert optimizer.overlaps is streams
        assert optimizer.pinned_nbytes > 0
        results.append([parameter.detach().cpu() for parameter in model.parameters()])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_state_is_pinned_and_a_saved_parameter_is_small() -> None:
    model = make_model(torch.bfloat16)
    optimizer = OffloadAdam(model.parameters(), module=model)
    weight = model.get_parameter("0.weight")
    assert optimizer.state[weight]["exp_avg"].is_pinned()
    assert weight.untyped_storage().nbytes() == weight.numel() * 2
    clone = copy.deepcopy(weight)
    assert torch.equal(clone, weight)


def test_a_non_finite_gradient_changes_no_bit() -> None:
    model = make_model(torch.float16)
    optimizer = OffloadAdam(model.named_parameters(), module=model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    weight = model.get_parameter("2.weight")
    weight.grad = torch.full_like(weight, torch.inf)
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.non_finite == ("2.weight",)
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)


def test_state_that_is_moved_to_the_gpu_stays_in_host_memory() -> None:
    """As Lightning moves it, when it has constructed the optimizer."""
    model = make_model(torch.bfloat16)
    optimizer = OffloadAdam(model.parameters(), module=model)
    weight = model.get_parameter("0.weight")
    before = torch.cuda.memory_allocated()
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if key != "step":
                entry[key] = value.to("cuda")
        assert all(value.device.type == "cpu" for value in entry.values())
    assert torch.cuda.memory_allocated() == before
    optimizer.state[weight]["exp_avg"] = torch.full_like(weight, 0.5, dtype=torch.float32)
    assert optimizer.state_dict()["state"][0]["exp_avg"].eq(0.5).all()
