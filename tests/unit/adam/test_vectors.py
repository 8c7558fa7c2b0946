"""The vectors with known answers of the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import Adam

B1, B2 = 0.9, 0.999


@pytest.mark.parametrize("options", [{}, {"use_lazy": True}, {"use_offload": True}], ids=str)
@pytest.mark.parametrize(
    ("epsilon_hat", "losses"),
    [
        (True, [2.3025851, 2.2630737, 2.2237475]),
        (False, [2.3025851, 2.2630733, 2.2237466]),
    ],
)
@pytest.mark.parametrize("by_call", [False, True])
def test_a_dense_layer_has_the_documented_losses(
    options: dict[str, Any], epsilon_hat: bool, losses: list[float], by_call: bool
) -> None:
    layer = nn.Linear(16, 10)
    nn.init.constant_(layer.weight, 0.01)
    nn.init.zeros_(layer.bias)
    inputs, target = 0.01 * torch.arange(16.0)[None], torch.tensor([0])
    optimizer = Adam(layer.parameters(), 0.01, epsilon_hat=epsilon_hat, **options)
    found = []
    for _ in losses:
        loss = nn.functional.cross_entropy(layer(inputs), target)
        found.append(loss.item())
        if by_call:
            gradients = torch.autograd.grad(loss, optimizer.parameters)
            result = optimizer(gradients)
            assert result.dtype == torch.bool
            assert bool(result)
            assert layer.weight.grad is None
        else:
            optimizer.zero_grad()
            loss.backward()
            assert optimizer.step() is None
    assert found == pytest.approx(losses, abs=3e-7)
    assert optimizer.global_step == 3


def optimizer_at_ones(shape: tuple[int, ...], **options: Any) -> tuple[Adam, nn.Parameter]:
    """Return an epsilon-hat optimizer with w = m = v = 1 whose next step has b1^t = b1 = 0.9.

    With the first step's t = 1 the powers are the betas themselves.
    """
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = Adam([parameter], 1e-3, epsilon_hat=True, **options)
    optimizer.state[parameter]["exp_avg"].fill_(1.0)
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    return optimizer, parameter


def test_one_step_from_ones() -> None:
    optimizer, parameter = optimizer_at_ones((3,))
    optimizer((torch.ones(3),))
    change = (parameter.detach().double() - 1.0).numpy()
    assert change == pytest.approx([-0.000316228] * 3, abs=6e-8)  # 2**-24 at 1.0


def test_a_sparse_gradient_moves_every_row() -> None:
    optimizer, parameter = optimizer_at_ones((4, 2))
    rows = torch.tensor([[1, 3, 3]])
    gradient = torch.sparse_coo_tensor(rows, torch.ones(3, 2), (4, 2))
    optimizer((gradient,))
    for row, expected in enumerate((0.999715, 0.999684, 0.999715, 0.999653)):
        assert parameter[row].tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_a_lazy_gradient_moves_touched_rows_only() -> None:
    optimizer, parameter = optimizer_at_ones((4, 2), use_lazy=True)
    rows = torch.tensor([[1, 3, 3]])
    optimizer((torch.sparse_coo_tensor(rows, torch.ones(3, 2), (4, 2)),))
    for row, expected in enumerate((1.0, 0.999684, 1.0, 0.999653)):
        assert parameter[row].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert torch.equal(parameter[[0, 2]], torch.ones(2, 2))
    assert torch.equal(optimizer.state[parameter]["exp_avg"][[0, 2]], torch.ones(2, 2))
    assert torch.equal(optimizer.state[parameter]["exp_avg_sq"][[0, 2]], torch.ones(2, 2))


@pytest.mark.parametrize(("g", "ratio"), [(1e-6, 0.77), (1e-8, 0.061), (1e-9, 0.035)])
def test_where_the_two_arithmetics_part(g: float, ratio: float) -> None:
    changes = []
    for epsilon_hat in (True, False):
        parameter = nn.Parameter(torch.zeros(1))
        Adam([parameter], 1.0, epsilon_hat=epsilon_hat)((torch.full((1,), g),))
        changes.append(parameter.item())
    assert changes[0] / changes[1] == pytest.approx(ratio, rel=0.02)
