"""Checkpoints load bit-identically into any world size; mismatches are rejected."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import (
    Adam,
    CheckpointError,
    OffloadAdam,
    OffloadPolicy,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.schedules import CosineDecayLR
from tests.support.models import Model
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of
from tests.support.scenario import Offloading

KINDS = ("fp32", "bf16", "streaming", "adam_beside", "adam_offload", "amsgrad")


def make(kind: str, seed: int, channels_last: bool = False) -> tuple[Model, Any]:
    torch.manual_seed(seed)
    model = Model()
    if kind in ("bf16", "streaming"):
        model = model.to(torch.bfloat16)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [p for p in model.parameters() if p.requires_grad]
    shared: dict[str, Any] = {
        "gradient_reduction": "optimizer",
        "offload": OffloadPolicy(bucket_nbytes=512),
    }
    if kind.startswith("adam"):
        rate = CosineDecayLR(0.001, 0.1, 9)
        return model, Adam(trained, rate, **shared, use_offload=kind == "adam_offload")
    groups = [{"params": trained[:2], "lr": 0.03}, {"params": trained[2:], "weight_decay": 0.1}]
    module = model if kind == "streaming" else None
    return model, OffloadAdam(groups, lr=0.05, amsgrad=kind == "amsgrad", module=module, **shared)


def train(model: Model, optimizer: Any, start: int, end: int) -> None:
    """Take steps whose gradients are the same on every rank."""
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 3, 5, 5, generator=generator).to(model.scale.dtype)
        optimizer.zero_grad()
        model(inputs).float().square().mean().backward()
        optimizer.step()


def whole_state(model: Model, optimizer: Any) -> dict[str, Any]:
    """Return everything on rank 0: weights, buffers, and the optimizer's full state."""
    full = optimizer.full_state_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "full": full, "num_steps": optimizer.num_steps}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{name}/{key}")
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def save(rank: int, world_size: int, kind: str, path: str) -> dict[str, Any]:
    model, optimizer = make(kind, seed=1)
    train(model, optimizer, 0, 3)
    save_checkpoint(path, model=model, optimizer=optimizer, extra={"rank_0": [1, None]})
    found = whole_state(model, optimizer)
    optimizer.close()
    return found


def pass_on(rank: int, world_size: int, kind: str, paths: tuple[str, str]) -> dict[str, Any]:
    """Load into a model with other initial weights, and save again."""
    source, target = paths
    model, optimizer = make(kind, seed=2 + rank)
    extra = load_checkpoint(source, model=model, optimizer=optimizer)
    assert extra == {"rank_0": [1, None]}
    found = whole_state(model, optimizer)
    save_checkpoint(target, model=model, optimizer=optimizer, extra=extra)
    optimizer.close()
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "amsgrad"])
def test_from_world_to_world_and_back_to_the_bit(
    ranks: RankPool, kind: str, tmp_path: Path
) -> None:
    original = ranks.run(save, 2, kind, str(tmp_path / "0"), timeout=60.0)[0]
    for number, world_size in enumerate((1, 3, 4, 2)):
        paths = str(tmp_path / str(number)), str(tmp_path / str(number + 1))
        found = ranks.run(pass_on, world_size, kind, paths, timeout=60.0)[0]
        assert_same(original, found)
        manifest = verify_checkpoint(paths[1])
        assert (manifest.step, manifest.world_size) == (3, world_size)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_rest_of_a_run_is_the_same(tmp_path: Path, kind: str, channels_last: bool) -> None:
    whole_model, whole = make(kind, seed=1)
    train(whole_model, whole, 0, 6)
    first_model, first = make(kind, seed=1)
    train(first_model, first, 0, 3)
    save_checkpoint(tmp_path / "c", model=first_model, optimizer=first)
    # Memory in another order: the convolution itself may then round otherwise.
    second_model, second = make(kind, seed=5, channels_last=channels_last)
    load_checkpoint(tmp_path / "c", model=second_model, optimizer=second)
    assert_same(whole_state(first_model, first), whole_state(second_model, second))
    if not channels_last:
        train(second_model, second, 3, 6)
        assert_same(whole_state(whole_model, whole), whole_state(second_model, second))


def test_a_model_that_was_its_own_master_loads_where_it_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = [nn.ParameterList([nn.Parameter(torch.randn(7, 3))]) for _ in range(2)]
    plain, offloading = OffloadAdam(weights[0].parameters()), Offloading(weights[1].parameters())
    weights[0][0].grad = torch.ones(7, 3)
    plain.step()
    save_checkpoint(tmp_path / "a", model=weights[0], optimizer=plain)
    load_checkpoint(tmp_path / "a", model=weights[1], optimizer=offloading)
    assert torch.equal(weights[0][0], weights[1][0])
    master = offloading.state[weights[1][0]]["master_weight"]
    assert torch.equal(master, weights[0][0])
    save_checkpoint(tmp_path / "b", model=weights[1], optimizer=offloading)
    load_checkpoint(tmp_path / "b", model=weights[0], optimizer=plain)


def refuse(rank: int, world_size: int, path: str, other: str) -> list[Outcome]:
    """Each attempt is an error on every rank, and leaves the model and the folders as they were."""
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    larger = Model()
    larger.head = larger.tied = nn.Linear(5, 38)
    wide = OffloadAdam(
        [p for p in larger.parameters() if p.requires_grad],
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=512),
    )
    half_model, half = make("bf16", seed=1)
    outcomes = [
        outcome_of(lambda: save_checkpoint(path, model=model, optimizer=optimizer)),
        outcome_of(lambda: save_checkpoint(other, model=nn.Linear(2, 2), optimizer=optimizer)),
        outcome_of(
            lambda: save_checkpoint(other, model=model, optimizer=optimizer, extra={"x": object()})
        ),
        outcome_of(
            lambda: save_checkpoint(
                other, model=model, optimizer=optimizer, extra={"hook": print} if rank == 1 else {}
            )
        ),
        outcome_of(lambda: load_checkpoint(other, model=model, optimizer=optimizer)),
        outcome_of(lambda: load_checkpoint(path, model=larger, optimizer=wide)),
        outcome_of(lambda: load_checkpoint(path, model=half_model, optimizer=half)),
    ]
    assert all(map(torch.equal, before, model.parameters()))
    for each in (optimizer, wide, half):
        each.close()
    return outcomes


def test_mismatched_checkpoints_are_rejected_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save, 2, "fp32", str(tmp_path / "c"), timeout=60.0)
    found = ranks.run(refuse, 2, str(tmp_path / "c"), str(tmp_path / "d"), timeout=60.0)
    for one, other in pairwise(found):
        assert [outcome.error for outcome in one] == [outcome.error for outcome in other]
    words = [
        "exists",
        "that the model does not have",
        "object",
        "Rank(s) [1] failed in preparing a checkpoint: extra['hook'] is of type builtin_function",
        "does not exist",
        "has shape",
        "Loading does not cast",
    ]
    for outcome, expected in zip(found[0], words, strict=True):
        assert outcome.error == "CheckpointError"
        assert expected in outcome.message
    assert {path.name for path in tmp_path.iterdir()} <= {"c", "d.partial"}


class Scaled(nn.Linear):
    """Keeps a number besides its weights, as FP8 layers do."""

    scale = 0.0

    def get_extra_state(self) -> dict[int, float]:
        return {3: self.scale}

    def set_extra_state(self, state: dict[int, float]) -> None:
        self.scale = state[3]


def make_scaled(seed: int) -> tuple[Scaled, OffloadAdam]:
    torch.manual_seed(seed)
    model = Scaled(7, 5)
    optimizer = OffloadAdam(model.parameters(), gradient_reduction="optimizer")
    model.weight.grad = torch.full_like(model.weight, 0.5)
    optimizer.step()
    return model, optimizer


def save_scaled(rank: int, world_size: int, path: str) -> None:
    model, optimizer = make_scaled(seed=1)
    model.scale = float("inf") if rank == 0 else 5.0
    extra = {"milestones": {6: (rank, -0.0)}}
    begin_checkpoint(path, model=model, optimizer=optimizer, extra=extra).wait()
    optimizer.close()


def load_scaled(rank: int, world_size: int, path: str) -> tuple[float, Any, Any, int]:
    model, optimizer = make_scaled(seed=2 + rank)
    extra = load_checkpoint(path, model=model, optimizer=optimizer)
    num_steps = optimizer.num_steps
    optimizer.step()
    optimizer.close()
    return model.scale, extra, model.weight.detach(), num_steps


def test_state_of_modules_and_extra_are_those_of_rank_0(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_scaled, 2, str(tmp_path / "c"), timeout=60.0)
    found = [
        each
        for world_size in (1, 2)
        for each in ranks.run(load_scaled, world_size, str(tmp_path / "c"), timeout=60.0)
    ]
    for scale, extra, weight, num_steps in found:
        assert (scale, extra, num_steps) == (float("inf"), {"milestones": {6: (0, -0.0)}}, 1)
        assert type(extra["milestones"][6]) is tuple
        assert torch.equal(weight, found[0][2])


def save_apart(rank: int, world_size: int, folder: str) -> Outcome:
    """Save to one name on two disks."""
    model, optimizer = make("fp32", seed=1)
    path = f"{folder}/disk-{rank}/c"
    outcome = outcome_of(lambda: save_checkpoint(path, model=model, optimizer=optimizer))
    optimizer.close()
    return outcome


def test_a_folder_that_is_not_shared_is_found_before_anything_is_written(
    ranks: RankPool, tmp_path: Path
) -> None:
    for number in range(2):
        (tmp_path / f"disk-{number}").mkdir()
    found = ranks.run(save_apart, 2, str(tmp_path))
    assert [outcome.error for outcome in found] == ["CheckpointError"] * 2
    assert all("is not shared: this rank does not see" in outcome.message for outcome in found)
    assert not list(tmp_path.glob("disk-*/*"))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "swapped"])
def test_damage_is_found(tmp_path: Path, how: str) -> None:
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    train(model, optimizer, 1, 2)
    save_checkpoint(tmp_path / "d", model=model, optimizer=optimizer)
    file = tmp_path / "c" / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[-5] ^= 64
        file.write_bytes(content)
    elif how == "truncated":
        file.write_bytes(content[:-4])
    elif how == "missing":
        file.unlink()
    else:
        file.write_bytes((tmp_path / "d" / file.name).read_bytes())
    with pytest.raises(CheckpointError, match=r"rank-00000"):
        verify_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"rank-00000"):
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    load_checkpoint(tmp_path / "d", model=model, optimizer=optimizer)
    assert optimizer.num_steps == 2
