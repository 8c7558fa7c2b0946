"""The section `parallel`: a run with sharded parameters trains as one with whole parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam.config import ConfigError, RunConfig
from offload_adam.config.sections import ModelSizes, ParallelSection, TrainSection
from offload_adam.coordinator.ranks import open_rank_group
from offload_adam.coordinator.startup import World
from offload_adam.fsdp_private import is_dtensor
from offload_adam.layout.budget import Category
from offload_adam.plan.prediction import predict
from offload_adam.step.ledger import by_category
from offload_adam.train.model import GPT, evaluate
from offload_adam.train.optimizer import build_optimizer
from offload_adam.train.parallel import shard_model, units_of
from offload_adam.train.plan import (
    sharded_inputs,
    specs_of,
    training_of,
    training_of_job,
)
from tests.support.jobs import run_on_ranks
from tests.support.ranks import RankPool
from tests.support.torchrun import ROOT, run_two_ranks
from tests.unit.test_evaluation import TOKENS, by_hand, make_model
from tests.unit.test_train_alone import run as run_alone

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"sizes": {"num_layers": 2, "width": 16, "num_heads": 2}},
    "train": {
        "num_steps": 10,
        "batch_size": 4,
        "sequence_length": 16,
        "gradient_accumulation_steps": 2,
        "eval_every": 5,
        "eval_sequences": 9,  # one rank evaluates a batch more than the others
    },
    "optimizer": {"lr": 1e-2, "max_grad_norm": 1.0, "weight_decay": 0.1, "num_threads": 1},
}


class Nested(nn.Module):
    """A model of a user: containers in a list, a layer without parameters, no blocks of ours."""

    def __init__(self, shares: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        pair = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Tanh(), pair])
        self.by_name = nn.ModuleDict({"norm": nn.LayerNorm(8)})
        self.head = nn.Linear(8, 256)
        if shares == "two layers":
            pair[1].weight = pair[0].weight
        elif shares == "the rest":
            self.heads = nn.ModuleList([nn.Linear(8, 256)])
            self.heads[0].weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        first, activation, pair = self.layers
        for layer in (first, activation, *pair, self.by_name["norm"]):  # type: ignore[misc]
            hidden = hidden + layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def train(
    ranks: RankPool, folder: Path, world_size: int, **sections: dict[str, Any] | None
) -> list[tuple[float, ...]]:
    """Return the losses and norms of every step, and the validation losses."""
    values: dict[str, Any] = {**SECTIONS, "run": {"name": "case", "dir": str(folder)}}
    for name, section in sections.items():
        values[name] = section if section is None else values.get(name, {}) | section
    run_on_ranks(ranks, world_size, values)
    lines = (folder / "case" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 10
    assert {record["skipped"] for record in records} == {False}
    return [(r["loss"], r["grad_norm"], r.get("val_loss", 0.0)) for r in records]


MESHES: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (2, 2, {}, {}),
    (2, 2, {"offload_weights": True, "reshard_after_forward": False}, {"overlap": True}),
    (2, 2, {"replicate": 2}, {"streaming": False}),
    (4, 4, {"replicate": 2, "shard": 2}, {}),
    (4, 2, {"shard": 2, "tensor": 2}, {"overlap": True}),
    (4, 2, {"replicate": 2, "tensor": 2, "offload_weights": True}, {"accumulate": "host"}),
]


@pytest.mark.parametrize(("world_size", "num_batches", "parallel", "optimizer"), MESHES)
def test_sharded_parameters_train_as_whole_ones(
    ranks: RankPool,
    tmp_path: Path,
    world_size: int,
    num_batches: int,
    parallel: dict[str, Any],
    optimizer: dict[str, Any],
) -> None:
    optimizer = SECTIONS["optimizer"] | optimizer
    whole = train(ranks, tmp_path / "whole", num_batches)
    sharded = train(ranks, tmp_path / "sharded", world_size, parallel=parallel, optimizer=optimizer)
    # fp32 sums in another order.
    for one, other in zip(sharded, whole, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


def test_a_model_of_the_user_trains_as_a_whole_one(ranks: RankPool, tmp_path: Path) -> None:
    model = {"sizes": None, "factory": f"{__name__}:Nested"}
    whole = train(ranks, tmp_path / "whole", 2, model=model)
    sharded = train(ranks, tmp_path / "sharded", 2, model=model, parallel={})
    for one, other in zip(sharded, whole, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


def test_one_process_alone_trains_as_without_the_section(tmp_path: Path) -> None:
    whole, _ = run_alone(tmp_path / "whole")
    sharded, _ = run_alone(tmp_path / "sharded", parallel={"offload_weights": True})
    assert [r["loss"] for r in sharded] == pytest.approx([r["loss"] for r in whole], rel=2e-5)


def test_other_dtypes_stay_near(ranks: RankPool, tmp_path: Path) -> None:
    whole = train(ranks, tmp_path / "whole", 2)
    parallel = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    rounded = train(ranks, tmp_path / "rounded", 2, parallel=parallel)
    assert rounded != whole
    for one, other in zip(rounded, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-2)


def test_layers_with_parameters_are_the_units_of_a_user_model() -> None:
    model = Nested()
    names = {module: name for name, module in model.named_modules()}
    found = [names[unit] for unit in units_of(model)]
    assert found == ["layers.0", "layers.2.0", "layers.2.1"]
    gpt = GPT(ModelSizes(num_layers=2, width=16, num_heads=2), max_length=4)
    assert list(units_of(gpt)) == list(gpt.blocks)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp2", "weights_on_host"])
def test_the_configurations_with_the_section_run_under_torchrun(tmp_path: Path, name: str) -> None:
    sizes = "--model.sizes={num_layers: 2, width: 16, num_heads: 2}"
    small = ["--train.num_steps=2", "--train.batch_size=2", "--train.sequence_length=16"]
    printed = run_two_ranks(
        ["-m", "offload_adam", "train", str(ROOT / "configs" / f"{name}.yaml"), sizes, *small],
        tmp_path,
        timeout_s=100.0,
    )
    assert "steps: 2 of 64 tokens" in printed
    assert "final validation loss" in printed


def evaluate_sharded(rank: int, world_size: int) -> tuple[float, bool]:
    ranks = open_rank_group(None)
    world = World(rank, world_size, rank, world_size, ranks_per_batch=2, ranks=ranks)
    model = make_model()
    shard_model(ParallelSection(tensor=2), world, model)
    train = TrainSection(batch_size=3, sequence_length=20, eval_sequences=100)
    loss = evaluate(model, TOKENS, train, world)
    ranks.release()
    return loss, all(map(is_dtensor, model.parameters()))


def test_an_evaluation_leaves_the_model_sharded(ranks: RankPool) -> None:
    for loss, is_sharded in ranks.run(evaluate_sharded, 4):
        assert loss == pytest.approx(by_hand(), rel=1e-6)
        assert is_sharded


def compare_state_with_plan(
    rank: int, world_size: int, sections: list[dict[str, Any]]
) -> list[tuple[str, str, int, int]]:
    """Return the bytes of each category, as planned before sharding and as held after it."""
    ranks = open_rank_group(None)
    world = World(rank, world_size, rank, world_size, ranks)
    found = []
    for given in sections:
        section = ParallelSection(**given)
        config = RunConfig(parallel=section)
        training = training_of(config, on_device=False)
        specs, training = sharded_inputs(wide_model(), section, training, world_size)
        planned = predict(specs, training).host
        model = wide_model()
        shard_model(section, world, model)
        optimizer = build_optimizer(config, model)
        held = by_category(optimizer.memory_ledger())
        found += [
            (str(given), name, planned[name], held[name])
            for name in ("exp_avg", "exp_avg_sq", Category.PARAMETERS)
        ]
        if given == {}:  # a profile plans with the parts of this rank
            job: Any = SimpleNamespace(config=config, world=world)
            of_job = predict(specs_of(model), training_of_job(job)).host
            found.append(("job", "exp_avg", of_job["exp_avg"], held["exp_avg"]))
        optimizer.close()
    ranks.release()
    return found


def wide_model() -> GPT:
    torch.manual_seed(1)
    return GPT(ModelSizes(num_layers=2, width=64, num_heads=4), 16)


def test_the_plan_is_what_the_optimizer_allocates(ranks: RankPool) -> None:
    sections: list[dict[str, Any]] = [
        {},
        {"replicate": 2},
        {"tensor": 2},
        {"offload_weights": True},
    ]
    for found in ranks.run(compare_state_with_plan, 4, sections):
        for section, name, planned, held in found:
            assert planned == pytest.approx(held, rel=0.02), (section, name)


def reject(rank: int, world_size: int, shares: str) -> str:
    world = World(rank, world_size, rank, world_size)
    with pytest.raises(ConfigError) as caught:
        shard_model(ParallelSection(), world, Nested(shares))
    return str(caught.value)


@pytest.mark.parametrize(
    ("shares", "names"),
    [
        ("two layers", "layers.2.0.weight and layers.2.1.weight"),
        ("the rest", "embedding.weight and heads.0.weight"),
    ],
)
def test_a_parameter_that_would_be_sharded_twice_is_rejected_by_name(
    ranks: RankPool, shares: str, names: str
) -> None:
    for text in ranks.run(reject, 2, shares):
        assert f"parallel: {names} are one parameter" in text


@pytest.mark.parametrize(
    ("world_size", "parallel", "resumed"),
    [
        (2, {}, {}),
        (2, {}, None),
        (2, {}, {"replicate": 2, "offload_weights": True}),
        (4, {"tensor": 2}, {"tensor": 2}),
    ],
)
def test_a_killed_sharded_run_is_resumed_under_any_sharding(
    ranks: RankPool,
    tmp_path: Path,
    world_size: int,
    parallel: dict[str, Any],
    resumed: dict[str, Any] | None,
) -> None:
    checkpoint = {"every": 5, "keep_last": 5}
    whole = train(ranks, tmp_path, world_size, parallel=parallel, checkpoint=checkpoint)
    shutil.rmtree(tmp_path / "case" / "checkpoints" / "step-10")
    again = train(ranks, tmp_path, world_size, parallel=resumed, checkpoint=checkpoint)
    assert again[:5] == whole[:5]  # the records of before
    if resumed == parallel:
        assert again == whole
    for one, other in zip(again, whole, strict=True):
        assert one == pytest.approx(other, rel=2e-5)
