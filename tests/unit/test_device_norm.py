"""Sums of squares in torch's operations, on the CPU: values, waits and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from offload_adam import Adam, OffloadPolicy
from offload_adam.step import device_norm, update_tasks
from offload_adam.step.device_norm import start_norms, wait_for_squares
from tests.support.devices import HOST_AS_DEVICE
from tests.support.dispatched import Dispatched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> float:
    (squares,) = wait_for_squares([start_norms(tensors)])
    return float(squares.sum())


@pytest.fixture(params=[100, 1 << 22])
def piece_numel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_norm, "PIECE_NUMEL", request.param)


@pytest.mark.usefixtures("piece_numel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_squares_is_exact_to_float64(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    gradients = [torch.from_numpy(rng.normal(0, 50, n)).to(dtype) for n in (0, 1, 333, 1000)]
    expected = math.fsum(float(x) ** 2 for gradient in gradients for x in gradient.tolist())
    assert sum_of_squares(gradients) == pytest.approx(expected, rel=1e-13)


@pytest.mark.usefixtures("piece_numel")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_that_is_not_finite_shows_in_the_sum(dtype: torch.dtype, value: float) -> None:
    gradients = [torch.ones(300, dtype=dtype), torch.ones(270, dtype=dtype)]
    gradients[1][269] = value
    assert not math.isfinite(sum_of_squares(gradients))


def test_the_largest_finite_gradients_have_a_finite_sum() -> None:
    largest = torch.finfo(torch.float32).max
    assert sum_of_squares([torch.full((4,), largest)]) == pytest.approx(4 * largest**2, rel=1e-15)


def test_the_host_waits_once_for_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_norm, "PIECE_NUMEL", 100)
    numels = ((250, 0, 7), (), (0,), (130,))
    groups = [[torch.arange(1.0, n + 1).to(DTYPES[n % 3]) for n in group] for group in numels]
    with Dispatched() as seen:
        started = [start_norms(group) for group in groups]
    assert seen.num_waits == 0
    copies: list[torch.Tensor] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    found = wait_for_squares(started)
    assert len(copies) == 1
    assert [one.owners.tolist() for one in started] == [[0, 0, 0, 2], [], [], [0, 0]]
    for group, one, squares in zip(groups, started, found, strict=True):
        sums = np.zeros(len(group))
        np.add.at(sums, one.owners, squares)
        expected = [sum(x * x for x in tensor.tolist()) for tensor in group]
        np.testing.assert_allclose(sums, expected, rtol=1e-14)


class OnDevice(Adam):
    """`Adam` whose state is on a device."""

    _backend = HOST_AS_DEVICE


def test_a_step_waits_once_for_the_norms_of_all_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (300, 200, 500)]
    optimizer = OnDevice(weights, offload=OffloadPolicy(bucket_nbytes=256))
    waits: list[int] = []

    def wait(started: Sequence[device_norm.DeviceNorms]) -> list[npt.NDArray[np.float64]]:
        waits.append(len(started))
        return wait_for_squares(started)

    monkeypatch.setattr(update_tasks, "wait_for_squares", wait)
    for size, weight in enumerate(weights, 1):
        weight.grad = torch.full_like(weight, size)
    optimizer.step()
    assert waits == [3]
    assert optimizer.last_step is not None
    assert optimizer.last_step.total_norm == pytest.approx(math.sqrt(300 + 4 * 200 + 9 * 500))
    assert optimizer.last_step.non_finite == ()
    weights[1].grad = torch.full_like(weights[1], math.nan)
    optimizer.step()
    assert waits == [3, 3]
    assert optimizer.last_step is not None
    assert len(optimizer.last_step.non_finite) == 1
    optimizer.close()
