"""The gradients of a kept step are in their shards when the step is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdamW, OffloadPolicy
from offload_adam.step.kept_steps import KeptSteps

NUMELS = (300, 1, 127, 1000, 0, 129)
PRESENT = [[0, 1, 2, 3, 4, 5], [0, 3, 5], [1, 2, 5], [], [0, 1, 2, 3, 5]]
"""The parameters with a gradient in each step."""


@pytest.mark.parametrize("overlap", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore:.* is not in memory:UserWarning")
def test_shards_hold_the_gradients_of_the_step_when_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, overlap: bool | None
) -> None:
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(n, dtype=torch.float32).to(dtype) for n in NUMELS)
    weights = list(model)
    # With the module, gradients leave `.grad` in the backward; with `overlap=True`, the update
    # thread copies them.
    streams = overlap is not None
    options: dict[str, Any] = {"module": model, "overlap": overlap} if streams else {}
    policy = OffloadPolicy(keep="shared", keep_path=str(tmp_path / "kept"))
    optimizer = OffloadAdamW(weights, lr=1e-3, offload=policy, **options)
    expected: dict[int, torch.Tensor] = {}
    checked: list[int] = []
    prepare = KeptSteps.prepare

    def check(self: KeptSteps, inputs: Any, states: Any, num_steps: int) -> None:
        for state in states:
            for segment in state.segments.select(state.indices >= 0):
                index = int(state.indices[segment.position])
                if index in expected:
                    found = segment.of(state.planes.gradient_shard).view(torch.uint8)
                    assert torch.equal(found, expected[index].view(torch.uint8))
                    checked.append(index)
        prepare(self, inputs, states, num_steps)

    monkeypatch.setattr(KeptSteps, "prepare", check)
    for present in PRESENT:
        expected = {n: torch.zeros(NUMELS[n], dtype=dtype, device="cpu") for n in present}
        for _ in range(1 if streams else 2):
            gradients = [torch.randn_like(total) for total in expected.values()]
            if gradients:
                torch.autograd.backward([weights[n] for n in expected], gradients)
            for total, gradient in zip(expected.values(), gradients, strict=True):
                total.add_(gradient)
        optimizer.clip_grad_norm_(1e9)  # computes the norm, after which `.grad` may still change
        if not streams:
            for index in present[:1]:
                weights[index].grad = expected[index] = expected[index] * 3
            for index in present[1:2]:
                for gradient in (weights[index].grad, expected[index]):
                    gradient.mul_(2)
            for index in present[2:3]:
                weights[index].grad = None
                del expected[index]
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    assert len(checked) == (16 if streams else 12)
