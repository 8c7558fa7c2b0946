"""Models that FSDP2 shards: updates during the next forward, held to waiting and to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard

from offload_adam import OffloadAdamW, OffloadPolicy
from tests.support import fsdp2
from tests.support.fsdp2 import (
    Model,
    Run,
    batch_of,
    delayed_updates,
    largest_difference,
    loss_of,
    make_model,
    shard,
    train,
    train_plain,
)
from tests.support.ranks import RankPool

NUM_STEPS = 12
DELAY_S = 0.002
BF16 = torch.bfloat16
OFFLOADED = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}


def evaluate(model: Model) -> float:
    """Evaluate between backward and step, which leaves the root gathered."""
    with torch.no_grad():
        return loss_of(model, batch_of(999, dist.get_rank())).item()


def shard_in_pairs(model: Model) -> Model:
    first, second, last = model.blocks
    fully_shard([first, second])
    fully_shard(last)
    fully_shard(model)
    return model


def shard_by_layer(model: Model) -> Model:
    """Shard the layers of a block, and then the block, which keeps its norm alone."""
    for block in model.blocks:
        assert isinstance(block, fsdp2.Block)
        fully_shard(block.first)
        fully_shard(block.second)
        fully_shard(block)
    fully_shard(model)
    return model


def prefetch(model: Model) -> Model:
    """Let each layer gather the next one while it computes."""
    shard(model)
    first, second, last = model.blocks
    first.set_modules_to_forward_prefetch([second, last])  # type: ignore[operator]
    second.set_modules_to_forward_prefetch([last])  # type: ignore[operator]
    return model


def unshard_early(model: Model) -> Model:
    """Gather a late layer as soon as the forward begins."""
    shard(model)
    late = model.blocks[2]
    model.embedding.register_forward_pre_hook(
        lambda *_: late.unshard(async_op=True) and None  # type: ignore[operator]
    )
    return model


def compile_layers(model: Model) -> Model:
    for block in model.blocks:
        block.compile(backend="eager")
    return shard(model)


def freeze_some(model: Model) -> Model:
    model.blocks[1].requires_grad_(False)
    model.embedding.requires_grad_(False)
    return shard(model)


Column = tuple[Callable[[], Model], dict[str, Any]]

COLUMNS: dict[str, Column] = {
    "base": (lambda: shard(make_model()), {}),
    "an evaluation before step": (lambda: shard(make_model()), {"before_step": evaluate}),
    "no reshard after forward": (lambda: shard(make_model(), reshard_after_forward=False), {}),
    "activation checkpointing": (lambda: shard(make_model(recomputes=True)), {}),
    "groups of layers": (lambda: shard_in_pairs(make_model()), {}),
    "children first": (lambda: shard_by_layer(make_model()), {}),
    "weights in host memory": (lambda: shard(make_model(), **OFFLOADED), {}),
    "compiled layers": (lambda: compile_layers(make_model()), {}),
    "forward prefetch": (lambda: prefetch(make_model()), {}),
    "an early unshard": (lambda: unshard_early(make_model()), {}),
    "bf16 forward": (
        lambda: shard(make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=BF16)),
        {},
    ),
    "bf16 shards": (lambda: shard(make_model(BF16)), {}),
    "bf16 shards in host memory": (lambda: shard(make_model(BF16), **OFFLOADED), {}),
    "tied": (lambda: shard(make_model(ties=True)), {}),
    "frozen": (lambda: freeze_some(make_model()), {}),
    "two backwards": (lambda: shard(make_model()), {"num_backwards": 2}),
    "two backwards in host memory": (
        lambda: shard(make_model(), **OFFLOADED),
        {"num_backwards": 2},
    ),
    "small buckets": (
        lambda: shard(make_model()),
        {"offload": OffloadPolicy(bucket_nbytes=512)},
    ),
}


def train_in_columns(rank: int, world_size: int, names: list[str]) -> list[tuple[str, Run, Run]]:
    runs = []
    for name in names:
        make, options = COLUMNS[name]
        waiting = train(make(), num_steps=NUM_STEPS, module=False, **options)
        with delayed_updates(DELAY_S):
            overlapped = train(make(), num_steps=NUM_STEPS, **options)
        runs.append((name, waiting, overlapped))
    return runs


SOME = ["base", "an evaluation before step", "tied"]


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (1, SOME),
        (2, list(COLUMNS)),
        (4, SOME),
        pytest.param(4, list(COLUMNS), marks=pytest.mark.slow),
    ],
    ids=["1", "2", "4", "4-all"],
)
def test_late_updates_change_nothing(ranks: RankPool, world_size: int, names: list[str]) -> None:
    for runs in ranks.run(train_in_columns, world_size, names, timeout=150.0):
        for name, waiting, overlapped in runs:
            assert overlapped.equals(waiting), name


EXACT: dict[str, tuple[Callable[[], Model], dict[str, Any], dict[str, Any]]] = {
    "base": (lambda: shard(make_model()), {}, {}),
    "waits": (lambda: shard(make_model()), {"overlap": False}, {}),
    "no module": (lambda: shard(make_model()), {"module": False}, {}),
    "two backwards": (lambda: shard(make_model()), {"num_backwards": 2}, {}),
    "two backwards, no module": (
        lambda: shard(make_model()),
        {"num_backwards": 2, "module": False},
        {},
    ),
    "weights in host memory": (lambda: shard(make_model(), **OFFLOADED), {}, {}),
    "tied": (lambda: shard(make_model(ties=True)), {}, {"ties": True}),
    "by column": (lambda: shard_by_column(make_model()), {}, {}),
}


def shard_by_column(model: Model) -> Model:
    """Shard the weights of one layer along their second dimension."""
    fully_shard(
        model.gate, shard_placement_fn=lambda p: Shard(p.dim() - 1) if p.dim() > 1 else None
    )
    return shard(model)


def train_exactly(rank: int, world_size: int) -> list[tuple[str, float]]:
    found = []
    for name, (make, options, of_model) in EXACT.items():
        run = train(make(), num_steps=5, **options)
        num_backwards = options.get("num_backwards", 1)
        exact = train_plain(
            make_model(**of_model), world_size, num_steps=5, num_backwards=num_backwards, rank=rank
        )
        found.append((name, largest_difference(run, exact)))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_matches_one_process_in_float64(ranks: RankPool, world_size: int) -> None:
    for found in ranks.run(train_exactly, world_size, timeout=100.0):
        for name, difference in found:
            # Five steps of fp32 gradients, whose errors of some 1e-7 move a weight by as much.
            assert difference < 2e-6, name


def train_hybrid(rank: int, world_size: int) -> tuple[bool, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    waiting = train(shard(make_model(), mesh=mesh), num_steps=NUM_STEPS, module=False)
    with delayed_updates(DELAY_S):
        overlapped = train(shard(make_model(), mesh=mesh), num_steps=NUM_STEPS)
    exact = train_plain(make_model(), world_size, num_steps=NUM_STEPS, rank=rank)
    return overlapped.equals(waiting), largest_difference(overlapped, exact)


def test_hybrid_sharding_matches_one_process(ranks: RankPool) -> None:
    for equal, difference in ranks.run(train_hybrid, 4):
        assert equal
        assert difference < 5e-6  # 20 steps


def train_page_locked(rank: int, world_size: int) -> bool:
    """Train with FSDP2's default of page-locked memory, which needs a GPU, on copies instead."""

    def visit(model: Model) -> None:
        model.float()  # FSDP2 page-locks memory that is not

    exact = train(shard(make_model(), **OFFLOADED), num_steps=3, before_step=visit)
    with (
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        mock.patch.object(torch.Tensor, "is_pinned", return_value=False),
    ):
        model = shard(make_model(), offload_policy=CPUOffloadPolicy())
        return train(model, num_steps=3, before_step=visit).equals(exact)


def test_memory_that_fsdp2_would_page_lock_stays_in_place(ranks: RankPool) -> None:
    assert all(ranks.run(train_page_locked, 2))


def compare_hybrid_state(rank: int, world_size: int) -> dict[str, Any]:
    """Train with HSDP, here and with torch's AdamW, and compare states and their bytes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    states = []
    for cls in (OffloadAdamW, torch.optim.AdamW):
        model = shard(make_model(), mesh=mesh)
        optimizer = cls(model.parameters(), lr=fsdp2.LR, eps=fsdp2.EPS)
        for step in range(2):
            loss_of(model, batch_of(step, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(optimizer)
    ours, reference = states
    assert isinstance(ours, OffloadAdamW)
    saved = ours.state_dict()
    differences = [
        float((saved["state"][number][key].full_tensor() - value.full_tensor()).abs().max())
        for number, entry in reference.state_dict()["state"].items()
        for key, value in entry.items()
        if key != "step"
    ]
    placed = {value["exp_avg"].placements for value in saved["state"].values()}
    changed = {
        **saved,
        "state": {
            number: {key: value * 2 for key, value in entry.items()}
            for number, entry in saved["state"].items()
        },
    }
    ours.load_state_dict(changed)
    loaded = ours.state_dict()["state"]
    same = all(
        torch.equal(loaded[number][key].to_local(), 2 * value.to_local())
        for number, entry in saved["state"].items()
        for key, value in entry.items()
        if key != "step"
    )
    other = ours.local_state_dict()
    other["offload_adam"]["rank"] = (rank + 1) % world_size
    with pytest.raises(ValueError, match="holds only its ranges"):
        ours.load_state_dict(other)  # on all ranks, so that none waits
    ours.close()
    layer = torch.nn.Linear(256, 256, bias=False)
    fully_shard(layer, mesh=mesh)
    wide = OffloadAdamW(layer.parameters(), num_threads=1)
    nbytes = wide.host_nbytes["state"]
    wide.close()
    return {
        "difference": max(differences),
        "placements": placed,
        "bytes": nbytes,
        "loads": same,
    }


def test_replicas_divide_the_state_and_join_it_to_save_it(ranks: RankPool) -> None:
    for found in ranks.run(compare_hybrid_state, 4):
        assert found["difference"] < 1e-6
        assert found["placements"] == {(Replicate(), Shard(0))}
        assert found["bytes"] == 256 * 256 // 4 * 8  # two moments of a quarter of the elements
        assert found["loads"]
