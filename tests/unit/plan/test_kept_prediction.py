"""The plan of kept state equals the optimizer's file, and its memory is required only once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam, OffloadPolicy
from offload_adam.config import RunConfig
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.options import StateFormat
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import predict
from offload_adam.step import build
from offload_adam.step.ledger import by_category
from offload_adam.train.plan import planner_inputs_of, specs_of
from tests.unit.plan.test_prediction import STATE


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    folder = Path(tempfile.mkdtemp(prefix="offload_adam-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def make_model(dtype: torch.dtype = torch.float32, width: int = 300) -> nn.Module:
    return nn.Sequential(nn.Linear(7, width), nn.BatchNorm1d(width), nn.Linear(width, 5)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "state_format", "width"),
    [
        (torch.float32, "fp32", 300),
        (torch.float32, "int8", 50_000),  # the state starts at a huge page
        (torch.bfloat16, "fp32", 300),
        (torch.bfloat16, "bf16", 300),
    ],
)
def test_the_plan_has_the_bytes_of_the_file(
    dtype: torch.dtype, state_format: StateFormat, width: int, memory: Path
) -> None:
    model = make_model(dtype, width)
    buffers_nbytes = sum(buffer.nbytes for buffer in model.buffers())
    policy = OffloadPolicy(keep="shared", keep_path=str(memory))
    training = Training(
        on_device=False, offload=policy, state_format=state_format, buffers_nbytes=buffers_nbytes
    )
    plan = predict(specs_of(model), training)
    optimizer = OffloadAdam(
        model.parameters(), module=model, state_format=state_format, offload=policy
    )
    held, ledger = optimizer.host_nbytes, by_category(optimizer.memory_ledger())
    assert plan.host["kept records"] == held["kept records"] == ledger["kept records"] > 2**20
    assert plan.host["parameters"] == ledger["parameters"]
    assert plan.host["gradient shards"] == ledger["gradient shards"] > 0
    planes = ("master_weight", "master_remainder", "exp_avg", "exp_avg_sq", "exponents")
    in_file = sum(plan.host.get(name, 0) for name in (*planes, "gradient shards"))
    # Parameters that are master weights, or a part of them, are in the file.
    in_file += sum(
        state.flat.nbytes
        for state in optimizer._alive().states
        if state.plan.state.master_weight == 0
    )
    assert 0 <= held["state"] - in_file < 2**10  # tensors are aligned
    size = (memory / "rank-00000").stat().st_size
    assert 0 <= size - held["state"] - held["kept records"] < 2**16
    optimizer.close()


def test_the_plan_of_a_configuration_has_the_buffers_of_its_model() -> None:
    config = RunConfig.model_validate(
        {
            "model": {"sizes": None, "factory": "tests.unit.plan.test_kept_prediction:make_model"},
            "memory": {"keep": "shared"},
        }
    )
    _, training = planner_inputs_of(config, on_device=False, world_size=1)
    assert training.buffers_nbytes == sum(buffer.nbytes for buffer in make_model().buffers()) > 0


def test_state_that_is_adopted_is_in_memory_already(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[dict[str, int]] = []

    def check(ranks: RankGroup, nbytes: Mapping[str, int], **_: Any) -> None:
        needed.append({name: size for name, size in nbytes.items() if size})

    monkeypatch.setattr(build, "check_node_memory", check)
    for _ in range(2):
        model = make_model()
        policy = OffloadPolicy(keep="shared", keep_path=str(memory), snapshot_buffer_nbytes=2**20)
        optimizer = OffloadAdam(model.parameters(), module=model, offload=policy)
        model(torch.ones(3, 7, dtype=torch.float32, device="cpu")).sum().backward()
        optimizer.step()
        held = optimizer.host_nbytes
        optimizer.close()
    first, second = needed
    assert first["kept records"] == held["kept records"]
    assert set(STATE) & set(first)
    assert second == {"snapshot buffer": held["snapshot buffer"]}


def test_a_second_backward_names_the_option_that_allows_it(memory: Path) -> None:
    model = make_model()
    policy = OffloadPolicy(keep="shared", keep_path=str(memory))
    for accumulate in ("auto", "host"):
        optimizer = OffloadAdam(
            model.parameters(), module=model, offload=policy, accumulate=accumulate
        )
        model(torch.ones(3, 7, dtype=torch.float32, device="cpu")).sum().backward()
        loss = model(torch.ones(3, 7, dtype=torch.float32, device="cpu")).sum()
        if accumulate == "host":
            loss.backward()
        else:
            with pytest.raises(ValueError, match="accumulate='host'"):
                loss.backward()
        optimizer.close()
