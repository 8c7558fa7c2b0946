"""No finite gradient puts a NaN into a weight, though its square may exceed float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam import Adam, OffloadAdam
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.step import device_update
from offload_adam.step.foreach_update import LARGEST, DeviceSegments, foreach_update
from tests.support.devices import HOST_AS_DEVICE

FLOAT32_MAX = torch.finfo(torch.float32).max
NUMEL = 40  # vectors of 16, and single elements behind them


class OnDevice(Adam):
    """`Adam` whose update is that of parameters on a device."""

    _backend = HOST_AS_DEVICE


class Path(NamedTuple):
    """A way from a gradient to a weight."""

    make: Callable[[torch.nn.Parameter], Any]
    dtype: torch.dtype = torch.float32
    sparse: bool = False
    fused: bool = False  # as on a GPU


def offload(**options: Any) -> Callable[[torch.nn.Parameter], OffloadAdam]:
    return lambda parameter: OffloadAdam([parameter], lr=0.01, **options)


def adam(kind: type[Adam] = Adam, **options: Any) -> Callable[[torch.nn.Parameter], Adam]:
    return lambda parameter: kind([{"params": [parameter]}], 0.01, **options)


def centralized(kind: type[Adam]) -> Callable[[torch.nn.Parameter], Adam]:
    return lambda p: kind([{"params": [p], "grad_centralization": True}], 0.01)


PATHS = {
    "plain": Path(offload()),
    "bf16": Path(offload(), torch.bfloat16),
    "fp16": Path(offload(), torch.float16),
    "amsgrad": Path(offload(amsgrad=True)),
    "nesterov": Path(offload(nesterov=True)),
    "maximize": Path(offload(maximize=True)),
    "decay": Path(offload(weight_decay=0.1)),
    "decoupled decay": Path(offload(weight_decay=0.1, decoupled_weight_decay=True)),
    "no memory": Path(offload(betas=(0.0, 0.0))),
    "negative rest of beta2": Path(offload(betas=(0.9, 0.999))),
    "positive rest of beta2": Path(offload(betas=(0.9, 0.95))),
    "no rest of beta2": Path(offload(betas=(0.5, 0.5))),
    "clipped": Path(offload(max_grad_norm=1.0)),
    "beside": Path(adam()),
    "beside, lazy": Path(adam(use_lazy=True), sparse=True),
    "beside, sparse": Path(adam(), sparse=True),
    "offloaded, sparse": Path(adam(use_offload=True), sparse=True),
    "epsilon_hat": Path(adam(epsilon_hat=True)),
    "loss scale below 1": Path(adam(loss_scale=1e-6)),
    "centralized": Path(centralized(Adam)),
    "device": Path(adam(OnDevice)),
    "device, bf16": Path(adam(OnDevice), torch.bfloat16),
    "device, amsgrad": Path(adam(OnDevice, use_amsgrad=True)),
    "device, lazy": Path(adam(OnDevice, use_lazy=True), sparse=True),
    "device, centralized": Path(centralized(OnDevice)),
    "device, loss scale below 1": Path(adam(OnDevice, loss_scale=1e-6)),
    "fused": Path(adam(OnDevice), fused=True),
    "fused, bf16": Path(adam(OnDevice), torch.bfloat16, fused=True),
    "fused, amsgrad": Path(adam(OnDevice, use_amsgrad=True), fused=True),
    "fused, decay": Path(adam(OnDevice, weight_decay=0.1), fused=True),
    "fused, loss scale below 1": Path(adam(OnDevice, loss_scale=1e-6), fused=True),
}


def as_gradient(path: Path, values: torch.Tensor) -> torch.Tensor:
    """Return a finite gradient of the path's dtype; a sparse one names each row twice."""
    limit = torch.finfo(path.dtype).max
    dense = values.clamp(-limit, limit).to(path.dtype).clamp(-limit, limit)
    if not path.sparse:
        return dense
    rows = torch.arange(dense.shape[0]).repeat(2)
    return torch.sparse_coo_tensor(rows[None], torch.cat([dense / 2, dense / 2]), dense.shape)


FINITE = st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32, allow_nan=False)
SIZES = st.sampled_from([0.0, 1.0, -1.0, 1e10, -1e18, 1e20, 1e30, -1e38, FLOAT32_MAX, -FLOAT32_MAX])


@pytest.mark.parametrize("name", PATHS)
@given(data=st.data())
@settings(max_examples=15)
def test_no_finite_gradient_makes_a_weight_nan(name: str, data: st.DataObject) -> None:
    path = PATHS[name]
    with pytest.MonkeyPatch.context() as patch:
        if path.fused:
            patch.setattr(device_update, "FUSED_DEVICES", {"cpu"})
        check_weights(path, data)


def check_weights(path: Path, data: st.DataObject) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, NUMEL // 2, dtype=path.dtype))
    optimizer = path.make(parameter)
    for _ in range(4):
        sizes = data.draw(st.lists(SIZES | FINITE, min_size=2, max_size=4))
        values = torch.tensor(sizes).repeat(NUMEL)[:NUMEL].view_as(parameter)
        parameter.grad = as_gradient(path, values)
        optimizer.step()
        assert not optimizer.last_step.skipped
        assert bool(torch.isfinite(parameter).all()), (sizes, parameter)
    optimizer.close()


@pytest.mark.parametrize("spike", [1e19, 1e21, 1e30, -1e38, FLOAT32_MAX])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_weights_stay_where_torch_leaves_them(spike: float, options: dict[str, Any]) -> None:
    """Elements beside the spike go on; the one that had it stands still from then on."""
    ours, theirs = (torch.nn.Parameter(torch.ones(NUMEL)) for _ in range(2))
    optimizer = OffloadAdam([ours], lr=0.01, **options)
    reference = torch.optim.Adam([theirs], lr=0.01, foreach=False, **options)
    for step in range(5):
        gradient = torch.linspace(-1, 1, NUMEL)
        if step == 1:
            gradient[3] = gradient[35] = spike
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        assert bool(torch.isfinite(theirs).all())
        # Both round a few times a step: 2**-22 of a weight near 1.
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2**-22 * (step + 1))
    state, expected = optimizer.state[ours], reference.state[theirs]
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key], expected[key], rtol=1e-5, atol=1e-30)
    optimizer.close()


def test_an_infinite_second_moment_of_torch_can_be_loaded() -> None:
    theirs = torch.nn.Parameter(torch.ones(NUMEL))
    reference = torch.optim.Adam([theirs], lr=0.01, foreach=False)
    theirs.grad = torch.full((NUMEL,), 1e30)
    reference.step()
    ours = torch.nn.Parameter(theirs.detach().clone())
    optimizer = OffloadAdam([ours], lr=0.01)
    optimizer.load_state_dict(reference.state_dict())
    ours.grad = torch.ones(NUMEL)
    optimizer.step()
    assert torch.equal(ours, theirs)
    assert bool(optimizer.state[ours]["exp_avg_sq"].isinf().all())
    optimizer.close()


def test_a_device_update_without_memory_keeps_an_infinite_second_moment() -> None:
    """Times a beta2 of 0 it would be NaN."""
    weight, exp_avg, exp_avg_sq = torch.ones(2), torch.zeros(2), torch.tensor([torch.inf, 1.0])
    hyper = Hyperparameters(
        lr=0.01,
        beta1=0.0,
        beta2=0.0,
        eps=1e-8,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        nesterov=False,
        maximize=False,
    )
    segments = DeviceSegments([torch.ones(2)], [weight], [exp_avg], [exp_avg_sq])
    foreach_update(segments, hyper, 1, 1.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.99]))
    assert exp_avg_sq.tolist() == [torch.inf, 1.0]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_given_infinite_first_moment_does_not_reach_a_weight(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel divides moments, and infinity by infinity is NaN."""
    monkeypatch.setattr(device_update, "FUSED_DEVICES", {"cpu"})
    parameter = torch.nn.Parameter(torch.ones(NUMEL))
    optimizer = adam(OnDevice)(parameter)
    parameter.grad = torch.ones(NUMEL)
    for _ in range(2):  # also after a step that found only finite moments
        optimizer.step()
        saved = optimizer.state_dict()
        for key in ("exp_avg", "exp_avg_sq"):
            if in_place:
                optimizer.state[parameter][key][::2] = torch.inf
            saved["state"][0][key] = saved["state"][0][key].clone()
            saved["state"][0][key][::2] = torch.inf
        if not in_place:
            optimizer.load_state_dict(saved)
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter[::2], before[::2])
    assert bool((parameter[1::2] < before[1::2]).all())
    state = optimizer.state[parameter]
    assert bool(state["exp_avg_sq"][::2].isinf().all())
    torch.testing.assert_close(state["exp_avg"][::2], torch.full((NUMEL // 2,), 0.9 * LARGEST))
    optimizer.close()
