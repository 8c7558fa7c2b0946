"""State beside its parameters: torch's operations on a device give what the kernels give.

Parameters in host memory stand for those on a device; nothing of the path but the copies differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import Adam, OffloadPolicy
from tests.support.devices import HOST_AS_DEVICE

STEPS = 4


class OnDevice(Adam):
    _backend = HOST_AS_DEVICE


def train(kind: type[Adam], dtype: torch.dtype, centralized: bool, **options: Any) -> Adam:
    torch.manual_seed(0)
    table = nn.Embedding(50, 6, sparse=not options.get("use_amsgrad", False))
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(18, 7), nn.LayerNorm(7), nn.Linear(7, 5))
    first, *rest = model.to(dtype).parameters()
    groups = [{"params": [first], "lr": 0.02}, {"params": rest, "grad_centralization": centralized}]
    optimizer = kind(
        groups,
        learning_rate=0.01,
        weight_decay=0.1,
        loss_scale=4.0,
        offload=OffloadPolicy(bucket_nbytes=256),
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(0, 50, (6, 3), generator=generator)
        targets = torch.randint(0, 5, (6,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).float(), targets)
        optimizer.zero_grad()
        (4.0 * loss).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centralized", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_nesterov": True, "use_lazy": True},
        {"use_amsgrad": True},
        {"epsilon_hat": True, "use_lazy": True},
    ],
    ids=str,
)
def test_both_updates_agree(dtype: torch.dtype, centralized: bool, options: dict[str, Any]) -> None:
    host = train(Adam, dtype, centralized, **options)
    device = train(OnDevice, dtype, centralized, **options)
    # The first step's gradients are the same to the bit, and fp32 rounds a few times a step. A bf16
    # gradient of the later steps follows its weight, which may be rounded to a neighbour.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for one, other in zip(host.parameters, device.parameters, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)
        states = host.state[one], device.state[other]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            scale = float(value.abs().max()) or 1.0
            assert torch.allclose(value, states[1][key], rtol=tolerance, atol=tolerance * scale)
    assert device.host_nbytes["state"] == 0
    assert host.host_nbytes["state"] > 0


def test_a_gradient_that_is_not_finite_is_named() -> None:
    dense, table = (
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(4, 2)),
    )
    optimizer = OnDevice([("dense", dense), ("table", table)], weight_decay=0.0)
    rows = torch.tensor([[1]])
    broken = torch.sparse_coo_tensor(
        rows, torch.full((1, 2), float("inf")), (4, 2), check_invariants=True
    )
    for gradients, name in (
        ((torch.tensor([1.0, float("nan"), 0.0]), None), "dense"),
        ((torch.ones(3), broken), "table"),
    ):
        optimizer(gradients)
        assert optimizer.last_step is not None
        assert optimizer.last_step.skipped
        assert optimizer.last_step.non_finite == (name,)
    assert torch.equal(dense, torch.ones(3))
    assert torch.equal(table, torch.ones(4, 2))


def test_a_saved_state_goes_from_the_host_to_a_device_and_back() -> None:
    host = train(Adam, torch.bfloat16, False)
    device = train(OnDevice, torch.bfloat16, False)
    for saved, target in ((host, device), (device, host)):
        target.load_state_dict(saved.state_dict())
        for one, other in zip(saved.parameters, target.parameters, strict=True):
            for key, value in saved.state[one].items():
                assert torch.equal(value, target.state[other][key])
