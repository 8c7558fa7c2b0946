"""`Adam` on a GPU, with state on the GPU or on the host, against the reference on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from offload_adam import Adam, OffloadPolicy
from offload_adam.step import device_update
from offload_adam.step.device_norm import start_norms, wait_for_squares
from offload_adam.step.fused_update import fused_scalars, fused_update
from tests.support.device_segments import assert_within_bounds, copied, random_segments
from tests.unit.adam.cases import (
    RATES,
    Case,
    build_reference,
    check,
    decay_of,
    gradients,
    initial_weights,
    to_reference,
)
from tests.unit.kernel_cases import MODES as SCALARS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODES: list[tuple[str, ...]] = [
    (),
    ("use_nesterov", "epsilon_hat"),
    ("use_amsgrad",),
    ("use_lazy",),
    ("use_offload",),
]


def on_device(case: Case) -> Adam:
    names = ["table", "bias", "gamma", "scale"]
    weights = [torch.nn.Parameter(weight.cuda()) for weight in initial_weights(case)]
    return Adam(
        list(zip(names, weights, strict=True)),
        RATES[case.rate](),
        weight_decay=decay_of(case),
        loss_scale=case.loss_scale,
        offload=OffloadPolicy(bucket_nbytes=64),
        **case.flags,
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gpu_follows_the_reference(
    mode: tuple[str, ...], dtype: torch.dtype, sparse: bool
) -> None:
    if sparse and "use_amsgrad" in mode:
        pytest.skip("amsgrad takes no sparse gradient")
    case = Case(
        dtype=dtype, rate="cosine", weight_decay=0.1, sparse=sparse, loss_scale=8.0, options=mode
    )
    optimizer, reference = on_device(case), build_reference(case)
    for step in range(5):
        given = gradients(case, step)
        moved = [None if gradient is None else gradient.cuda() for gradient in given]
        order = list(reversed(moved)) if "use_offload" in mode else moved
        assert bool(optimizer(tuple(order)))
        assert reference.update(to_reference(given))
    check(on_host(optimizer), reference, 5)
    assert (optimizer.host_nbytes["state"] > 0) == ("use_offload" in mode)
    assert optimizer.target == ("CPU" if "use_offload" in mode else "GPU")


def on_host(optimizer: Adam) -> Any:
    """Return host copies of the parameter groups and state that `check` reads."""

    class Copied:
        def __init__(self) -> None:
            self.param_groups: list[dict[str, Any]] = []
            self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    found = Copied()
    for group in optimizer.param_groups:
        copies = []
        for parameter in group["params"]:
            copy = parameter.detach().cpu()
            copies.append(copy)
            state = optimizer.state[parameter]
            found.state[copy] = {key: value.cpu() for key, value in state.items()}
        found.param_groups.append({**group, "params": copies})
    return found


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["adam", "l2", "decoupled", "maximize", "epsilon_hat"])
def test_the_fused_update_is_within_its_bounds(
    mode: str, dtype: torch.dtype, amsgrad: bool
) -> None:
    rng = np.random.default_rng(0)
    for step, scale, size in ((1, 1.0, 1.0), (7, 0.37, 1e-9), (1000, 2.0**-16, 1e-22)):
        before = random_segments(
            rng,
            (100_003, 1, 65_536, 300),
            dtype,
            amsgrad=amsgrad,
            param_out=torch.bfloat16,
            size=size,
            device="cuda",
        )
        scalars = fused_scalars(SCALARS[mode], step, scale, 1e6)
        assert scalars is not None
        for run_numel in (1 << 23, 50_000):
            after = copied(before)
            fused_update(after, scalars, run_numel=run_numel)
            assert_within_bounds(before, after, SCALARS[mode], step, scale)
            assert after.param_out is not None
            for index, master in enumerate(after.master_weights):
                assert torch.equal(after.param_out[index], master.bfloat16())
                assert torch.equal(after.gradients[index], before.gradients[index])


def test_a_step_on_a_gpu_uses_the_fused_update(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(device_update, "fused_update", lambda *given: calls.append(given))
    weight = torch.nn.Parameter(torch.zeros(10, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = Adam([weight])
    optimizer.step()
    assert len(calls) == 1
    optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_on_a_gpu_are_exact_to_float64_and_the_same_each_time(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    numels = (1, 333, 5_000_003)
    gradients = [torch.from_numpy(rng.normal(0, 50, n)).to("cuda", dtype) for n in numels]
    expected = sum(float(gradient.cpu().double().square().sum()) for gradient in gradients)
    found = [float(wait_for_squares([start_norms(gradients)])[0].sum()) for _ in range(3)]
    assert found == [pytest.approx(expected, rel=1e-12)] * 3
    assert len(set(found)) == 1
    gradients[2][-1] = math.inf
    assert not np.isfinite(wait_for_squares([start_norms(gradients)])[0].sum())
