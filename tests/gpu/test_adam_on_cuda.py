"""`Adam` on a GPU, with state on the GPU or on the host, against the reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload_adam import Adam, OffloadPolicy
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
