"""Parameters of fewer than 128 elements share blocks, and none touches another one's elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadAdam, OffloadPolicy
from offload_adam.layout import flat
from tests.support.devices import HOST_AS_DEVICE

SIZES = [*range(140, 0, -1), 128, 3, 257, 1, 16, 15, 17, 112, 113]
LR = 1e-2


@pytest.fixture(autouse=True)
def shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "PACK_FROM", 1)


class Offloading(OffloadAdam):
    _backend = HOST_AS_DEVICE


def make(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in SIZES]


def gradient_of(size: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + size)
    return torch.randn(size, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", ["host", "offloaded", "device", "small buckets", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_size_is_trained_as_by_torch_in_float64(dtype: torch.dtype, kind: str) -> None:
    parameters = make(dtype)
    masters = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    maker = OffloadAdam if kind in ("host", "small buckets", "clipped") else Offloading
    policy: dict[str, dict[str, Any]] = {
        "device": {"offload_fraction": 0.0},
        "small buckets": {"bucket_nbytes": 2048},
    }
    optimizer = maker(
        parameters,
        lr=LR,
        max_grad_norm=0.5 if kind == "clipped" else None,
        offload=OffloadPolicy(**policy.get(kind, {})),
    )
    oracle = torch.optim.Adam(masters, lr=LR, foreach=False)
    for step in range(4):
        for number, (parameter, master) in enumerate(zip(parameters, masters, strict=True)):
            # Every fifth has no gradient in odd steps, so that its neighbours are updated alone.
            missing = step % 2 == 1 and number % 5 == 0
            gradient = None if missing else gradient_of(parameter.numel(), step, dtype)
            parameter.grad = gradient
            master.grad = None if gradient is None else gradient.double()
        if kind == "clipped":
            norm = torch.nn.utils.clip_grad_norm_(masters, 0.5)
        optimizer.step()
        oracle.step()
        if kind == "clipped":
            assert optimizer.last_step is not None
            assert optimizer.last_step.total_norm == pytest.approx(float(norm), rel=1e-12)
    for parameter, master in zip(parameters, masters, strict=True):
        held = optimizer.state[parameter].get("master_weight", parameter.detach())
        assert (held - master).abs().max() < 1e-6, parameter.numel()
        assert torch.equal(parameter, held.to(dtype))


def test_a_non_finite_gradient_names_its_own_parameter_alone() -> None:
    parameters = make(torch.float32)
    names = [f"p{number}" for number in range(len(parameters))]
    optimizer = OffloadAdam(list(zip(names, parameters, strict=True)))
    for chosen in range(0, len(parameters), 7):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        bad = parameters[chosen].grad
        assert bad is not None
        bad[-1] = torch.nan
        optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.non_finite == (f"p{chosen}",)


def test_norms_of_parameters_in_one_block_are_their_own() -> None:
    model = torch.nn.ParameterList(make(torch.float32))
    optimizer = OffloadAdam(model.parameters(), module=model)
    torch.stack([(p * (n + 1)).sum() for n, p in enumerate(model)]).sum().backward()
    norms = torch._foreach_norm([parameter.grad for parameter in model])
    for number, (norm, parameter) in enumerate(zip(norms, model, strict=True)):
        assert float(norm) == pytest.approx((number + 1) * parameter.numel() ** 0.5, rel=1e-6)
    optimizer.close()


@pytest.mark.parametrize("centralized", [False, True])
def test_matrices_in_one_block_are_centralized_on_their_own(centralized: bool) -> None:
    shapes = [(2, 3), (5, 4), (1, 7), (3, 30), (6, 2)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    expected = [torch.nn.Parameter(torch.ones(shape).double()) for shape in shapes]
    groups: Any = [{"params": parameters, "grad_centralization": centralized}]
    optimizer = Adam(groups, LR)
    oracle = torch.optim.Adam(expected, lr=LR, foreach=False)
    for step in range(3):
        for parameter, other in zip(parameters, expected, strict=True):
            gradient = gradient_of(parameter.numel(), step, torch.float32).view(parameter.shape)
            parameter.grad = gradient
            other.grad = gradient.double()
            if centralized:
                other.grad -= other.grad.mean(dim=1, keepdim=True)
        optimizer.step()
        oracle.step()
    for parameter, other in zip(parameters, expected, strict=True):
        assert (parameter - other).abs().max() < 1e-5


def test_tiny_tensors_take_little_memory() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(10_000)]
    optimizer = OffloadAdam(parameters)
    # Two planes of 16 elements of 4 bytes each, in place of 128 elements.
    assert optimizer.host_nbytes["state"] < 10_000 * 2 * 16 * 4 * 1.1
