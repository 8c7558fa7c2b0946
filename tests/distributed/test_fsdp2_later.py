"""Optimizers that are constructed before their model is sharded."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from offload_adam import OffloadAdam, OffloadAdamW, fsdp_private
from offload_adam.fsdp_private import FsdpGroup
from tests.support.fsdp2 import (
    EPS,
    LR,
    MAX_NORM,
    Model,
    Run,
    batch_of,
    largest_difference,
    loss_of,
    make_model,
    shard,
    train_plain,
    whole,
)
from tests.support.ranks import RankError, RankPool

NUM_STEPS = 3
# Before, FSDP2 does not remember which plain parameter a DTensor was.
FINDS_PLAIN = torch.__version__ >= "2.12"


def make_optimizer(model: nn.Module, *, named: bool = False, **options: Any) -> OffloadAdamW:
    params = model.named_parameters() if named else model.parameters()
    return OffloadAdamW(params, lr=LR, eps=EPS, max_grad_norm=MAX_NORM, num_threads=1, **options)


def steps(model: Model, optimizer: OffloadAdamW, rank: int) -> Run:
    values = []
    for step in range(NUM_STEPS):
        loss = loss_of(model, batch_of(step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        values += [loss.item(), optimizer.last_step.total_norm]
    entries = [entry["exp_avg"] for entry in optimizer.state.values()]
    assert all(isinstance(entry, DTensor) for entry in entries)
    run = Run(values, whole(model))
    optimizer.close()
    return run


WAYS: dict[str, dict[str, Any]] = {
    "no module": {},
    "module": {"module": True},
    "overlap": {"module": True, "overlap": True},
    "deferred": {"defer": True},
    "deferred, module": {"defer": True, "module": True, "overlap": True},
    "named": {"named": True},
}


def train_sharded_later(rank: int, world_size: int) -> list[tuple[str, float]]:
    exact = train_plain(make_model(), world_size, num_steps=NUM_STEPS, rank=rank)
    found = []
    for name, options in WAYS.items():
        if not (FINDS_PLAIN or options.get("module")):
            continue
        model = make_model()
        given = {**options, **({"module": model} if options.get("module") else {})}
        optimizer = make_optimizer(model, **given)
        shard(model)
        found.append((name, largest_difference(steps(model, optimizer, rank), exact)))
    return found


def test_a_model_that_is_sharded_after_construction_trains(ranks: RankPool) -> None:
    for found in ranks.run(train_sharded_later, 2):
        for name, difference in found:
            assert difference < 2e-6, name


def train_from_meta(rank: int, world_size: int) -> float:
    with torch.device("meta"):
        model = Model()
    optimizer = make_optimizer(model, defer=True, module=model)
    shard(model)
    model.to_empty(device="cpu")
    given = make_model().state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = rank * -(-given[name].shape[0] // world_size)
            local = parameter.to_local()  # type: ignore[attr-defined]
            local.copy_(given[name][start : start + local.shape[0]])
    exact = train_plain(make_model(), world_size, num_steps=NUM_STEPS, rank=rank)
    return largest_difference(steps(model, optimizer, rank), exact)


def test_a_model_that_is_on_the_meta_device_at_construction_trains(ranks: RankPool) -> None:
    for difference in ranks.run(train_from_meta, 2):
        assert difference < 2e-6


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(batch).tanh())
        return result


def train_tensor_parallel_later(rank: int, world_size: int) -> list[float]:
    torch.manual_seed(0)
    model = Pair()
    optimizer = make_optimizer(model, module=model)
    mesh = init_device_mesh("cpu", (world_size,))
    parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    torch.manual_seed(0)
    exact = Pair().double()
    reference = torch.optim.AdamW(exact.parameters(), lr=LR, eps=EPS)
    batch = torch.linspace(-1, 1, 24).view(3, 8)
    for _ in range(NUM_STEPS):
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        exact(batch.double()).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(exact.parameters(), MAX_NORM)
        reference.step()
        reference.zero_grad()
    differences = [
        float((one.full_tensor() - other).abs().max())  # type: ignore[attr-defined]
        for one, other in zip(model.parameters(), exact.parameters(), strict=True)
    ]
    optimizer.close()
    return differences


def test_tensor_parallelism_after_construction(ranks: RankPool) -> None:
    for differences in ranks.run(train_tensor_parallel_later, 2):
        assert max(differences) < 1e-6


def load_then_shard(rank: int, world_size: int) -> None:
    model = make_model()
    optimizer = make_optimizer(model, module=model)
    saved = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.step()
    saved.zero_grad()
    optimizer.load_state_dict(saved.state_dict())
    shard(model)
    loss_of(model, batch_of(0, rank)).backward()
    optimizer.step()


def test_state_that_was_loaded_before_sharding_is_an_error(ranks: RankPool) -> None:
    for error in ranks.run(load_then_shard, 2, expect_errors=True):
        assert isinstance(error, RankError)
        assert "sharded after optimizer state was loaded" in error.message


def train_unrelated(rank: int, world_size: int) -> None:
    """Shard a model that only looks like that of the optimizer."""
    optimizer = make_optimizer(make_model())
    model = shard(make_model())
    loss_of(model, batch_of(0, rank)).backward()
    optimizer.step()


def test_a_step_that_trains_nothing_of_a_sharded_model_is_an_error(ranks: RankPool) -> None:
    for error in ranks.run(train_unrelated, 2, expect_errors=True):
        assert isinstance(error, RankError)
        assert "Construct the optimizer after fully_shard()" in error.message


def use_deferred(rank: int, world_size: int) -> list[Any]:
    """Call everything that a tool may call before the first step."""
    model = make_model()
    optimizer = make_optimizer(model, defer=True, module=model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    optimizer.synchronize()
    optimizer.param_groups[0]["weight_decay"] = 0.25
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no state yet"):
        optimizer.host_nbytes  # noqa: B018
    found: list[Any] = [len(saved["state"]), optimizer.param_groups[0]["weight_decay"]]
    shard(model)
    loss_of(model, batch_of(0, dist.get_rank())).backward()
    optimizer.step()
    scheduler.step()
    found.append(len(optimizer.state) == len(list(model.parameters())))
    optimizer.close()
    never_used = make_optimizer(make_model(), defer=True)
    never_used.close()
    return found


def test_what_tools_call_before_the_first_step(ranks: RankPool) -> None:
    assert ranks.run(use_deferred, 2) == [[0, 0.25, True]] * 2


def test_a_deferred_optimizer_needs_no_sharding() -> None:
    weight = nn.Parameter(torch.ones(3))
    expected = nn.Parameter(torch.ones(3))
    optimizer = OffloadAdam([weight], lr=0.1, defer=True)
    reference = torch.optim.Adam([expected], lr=0.1)
    for _ in range(2):
        for parameter in (weight, expected):
            parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
        reference.step()
    assert torch.allclose(weight, expected, rtol=1e-6, atol=0.0)
    loaded = OffloadAdam([nn.Parameter(torch.ones(3))], lr=0.1, defer=True)
    loaded.load_state_dict(reference.state_dict())  # allocates the state
    (entry,) = loaded.state.values()
    assert torch.equal(entry["exp_avg"], reference.state[expected]["exp_avg"])
    optimizer.close()
    loaded.close()


def train_with_another_fsdp2(rank: int, world_size: int) -> tuple[list[str], float, bool]:
    """Train where FSDP2 has another name for what the waits need."""
    exact = train_plain(make_model(), world_size, num_steps=NUM_STEPS, rank=rank)
    model = shard(make_model())
    with (
        mock.patch.object(fsdp_private, "_OF_WAITS", ("renamed",)),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        optimizer = make_optimizer(model, module=model, overlap=True)
    told = [str(warning.message) for warning in caught if "FSDP2" in str(warning.message)]
    overlaps = optimizer.overlaps
    return told, largest_difference(steps(model, optimizer, rank), exact), overlaps


def test_another_fsdp2_makes_the_step_wait(ranks: RankPool) -> None:
    for told, difference, overlaps in ranks.run(train_with_another_fsdp2, 2):
        assert len(told) == 1
        assert "step() waits for all updates" in told[0]
        assert difference < 2e-6
        assert not overlaps


def overlaps_by_default(rank: int, world_size: int) -> list[bool]:
    """Whether updates overlap where FSDP2 keeps weights on the host: on a CPU, and on a GPU."""
    found = []
    for on_device in (False, True):
        model = shard(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
        with mock.patch.object(FsdpGroup, "computes_on_device", on_device):
            optimizer = make_optimizer(model, module=model)
        found.append(optimizer.overlaps)
        optimizer.close()
    return found


def test_weights_on_the_host_of_a_gpu_overlap_by_default(ranks: RankPool) -> None:
    assert ranks.run(overlaps_by_default, 2) == [[False, True]] * 2


def share_streams(rank: int, world_size: int) -> list[str]:
    """Construct optimizers for two stages of a pipeline that share FSDP2's streams."""
    found = []
    for shares in (False, True):
        stages: list[Any] = [shard(make_model()) for _ in range(2)]
        if shares:
            torch.distributed.fsdp.share_comm_ctx(stages)
        for given in ([*stages], [stages[0]], [stages[1]]):
            try:
                parameters = [p for stage in given for p in stage.parameters()]
                OffloadAdamW(parameters, num_threads=1).close()
                found.append("")
            except ValueError as error:
                found.append(str(error))
    return found


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "share_comm_ctx"), reason="this torch has no share_comm_ctx"
)
def test_stages_that_share_streams_need_an_optimizer_each(ranks: RankPool) -> None:
    for found in ranks.run(share_streams, 2):
        assert "one optimizer for each" in found[3]
        assert found[:3] + found[4:] == [""] * 5
