"""The ledger lists every allocated byte of an optimizer once."""

from __future__ import annotations

import pytest
import torch

from offload_adam import Adam, OffloadAdam, OffloadPolicy
from offload_adam.step.ledger import by_category


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_ledger_adds_up_to_the_allocated_bytes(dtype: torch.dtype, amsgrad: bool) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(300, 7, dtype=dtype)) for _ in range(5)]
    optimizer = OffloadAdam(parameters, amsgrad=amsgrad, offload=OffloadPolicy(bucket_nbytes=9000))
    entries = optimizer.memory_ledger()
    # 2,100 elements take 2,176 in their bucket: 17 blocks of 128.
    planes = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    planes += ["master_weight"] * (dtype == torch.bfloat16)
    totals = by_category(entries)
    for plane in planes:
        assert totals[plane] == 5 * 2176 * 4
    assert totals["parameters"] == 5 * 2176 * dtype.itemsize
    state = sum(totals[plane] for plane in planes)
    assert state == optimizer.host_nbytes["state"]
    assert {entry.bucket for entry in entries if entry.bucket is not None} == set(
        range(5 if dtype == torch.float32 else 3)
    )
    assert {entry.device for entry in entries} == {"cpu"}


def test_the_buffer_of_prepared_gradients_is_counted() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10, 3))
    optimizer = Adam([{"params": [parameter], "grad_centralization": True}])
    assert by_category(optimizer.memory_ledger())["prepared"] == 30 * 4
