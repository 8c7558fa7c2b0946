"""Every contender computes the same AdamW: otherwise its time would say nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from offload_adam.bench.harness import Contender
from offload_adam.bench.kernel import offload_update
from offload_adam.bench.peers import ADAMW, MAX_GRAD_NORM, deepspeed_cpu_adam, torch_fused
from offload_adam.bench.planes import Planes, fill_with_noise, make_planes
from offload_adam.bench.step import (
    StepTensors,
    clip_divisor,
    clipped_step,
    offload_adam,
    scaled_step,
    step_tensors,
)
from tests.bench.limit import blocked_step
from tests.support.kernel_reference import Float64Array, ReferenceState, reference_update

NUMEL, NUM_STEPS = 5000, 5
# Each step rounds weights of up to 4 to fp32, an error of 2**-23 at most, and changes them by 1e-3:
# an update that is wrong by one part in 1000 exceeds the tolerance.
TOLERANCE = NUM_STEPS * 2.0**-23 + 1e-6

MakeOptimizer = Callable[[Planes], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """Restore torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["huge pages", "torch.empty"])
def planes(request: pytest.FixtureRequest) -> Planes:
    """Return planes in either kind of memory."""
    return make_planes(NUMEL, request.param)


@pytest.fixture
def tensors() -> StepTensors:
    """Return tensors in memory from torch; the gradient is clipped."""
    made = step_tensors(NUMEL, huge_pages=False)
    made.gradient.mul_(100.0)
    assert float(made.gradient.float().norm()) > 10 * MAX_GRAD_NORM
    return made


def expected_master(
    weight: torch.Tensor, gradient: torch.Tensor, clip_factor: float = 1.0
) -> Float64Array:
    """Return the reference's weights after the steps."""
    zero = np.zeros(weight.numel())
    state = ReferenceState(weight.double().numpy().copy(), zero, zero)
    for step in range(1, NUM_STEPS + 1):
        reference_update(state, gradient.double().numpy(), ADAMW, step, clip_factor)
    return state.master_weight


def expected_after_clipping(tensors: StepTensors) -> Float64Array:
    """Return the reference's weights after clipped steps."""
    norm = float(tensors.gradient.double().norm())
    clip_factor = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
    return expected_master(tensors.planes.master_weight, tensors.gradient, clip_factor)


def test_this_packages_kernel_is_adamw(planes: Planes) -> None:
    expected = expected_master(planes.master_weight, planes.gradient)
    contender = offload_update(planes, num_threads=2)
    for _ in range(NUM_STEPS):
        contender.run()
    np.testing.assert_allclose(planes.master_weight.numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "make", [torch_fused, pytest.param(deepspeed_cpu_adam, marks=pytest.mark.peers)]
)
def test_a_peers_update_is_the_same_adamw(planes: Planes, make: MakeOptimizer) -> None:
    skip_where_missing(make)
    expected = expected_master(planes.master_weight, planes.gradient)
    optimizer = make(planes)
    for _ in range(NUM_STEPS):
        optimizer.step()
    np.testing.assert_allclose(planes.master_weight.numpy(), expected, rtol=0, atol=TOLERANCE)


def test_this_packages_step_is_clipped_adamw(tensors: StepTensors) -> None:
    expected = expected_after_clipping(tensors)
    optimizer = offload_adam(tensors, num_threads=2)
    for _ in range(NUM_STEPS):
        optimizer.step()
    (parameter,) = optimizer.param_groups[0]["params"]
    master = optimizer.state[parameter]["master_weight"]
    np.testing.assert_allclose(master.numpy(), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(parameter.detach(), master.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda tensors: clipped_step("clipped", torch_fused(tensors.planes), tensors),
        lambda tensors: scaled_step("scaled", torch_fused(tensors.planes), tensors),
        lambda tensors: blocked_step("blocked", tensors, block_numel=1024),
        pytest.param(
            lambda tensors: clipped_step("peer", deepspeed_cpu_adam(tensors.planes), tensors),
            marks=pytest.mark.peers,
        ),
    ],
    ids=["clip_grad_norm", "grad_scale", "blocked", "deepspeed"],
)
def test_a_peers_step_is_the_same_clipped_adamw(
    tensors: StepTensors,
    make: Callable[[StepTensors], Contender],
    request: pytest.FixtureRequest,
) -> None:
    if request.node.get_closest_marker("peers"):
        pytest.importorskip("deepspeed")
    expected = expected_after_clipping(tensors)
    gradient = tensors.gradient.clone()
    with torch.no_grad():
        contender = make(tensors)
        for _ in range(NUM_STEPS):
            contender.run()
    master = tensors.planes.master_weight
    np.testing.assert_allclose(master.numpy(), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tensors.parameter, master.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(tensors.gradient, gradient, rtol=0, atol=0)


def skip_where_missing(make: MakeOptimizer) -> None:
    """Skip the test of a peer that is not installed."""
    if make is deepspeed_cpu_adam:
        pytest.importorskip("deepspeed")


def test_small_gradients_are_not_scaled_up() -> None:
    assert float(clip_divisor(torch.tensor(MAX_GRAD_NORM / 2))) == 1.0
    assert float(clip_divisor(torch.tensor(4 * MAX_GRAD_NORM))) == pytest.approx(4.0)


def test_noise_fills_a_whole_tensor() -> None:
    target = torch.zeros((1 << 20) + 5)
    fill_with_noise(target, scale=2.0)
    assert float(target.std()) == pytest.approx(2.0, rel=0.01)
    torch.testing.assert_close(target[-5:], target[:5])
