"""torch's state dict functions and `dcp`, with the state divided over ranks."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from offload_adam import OffloadAdam
from offload_adam.memory.codes import values_of
from offload_adam.state.state_shard import StateShard, shards_of
from tests.distributed.test_checkpoints import assert_same, make, train, whole_state
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of

KINDS = ("bf16", "streaming", "adam_beside", "adam_offload")


def save(rank: int, world_size: int, kind: str, path: str, flat: bool, raw: bool) -> dict[str, Any]:
    """Save as a script without this package does."""
    model, optimizer = make(kind, seed=1)
    train(model, optimizer, 0, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if raw:
        state = optimizer.state_dict()
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=path)
    found = whole_state(model, optimizer)
    optimizer.close()
    return found


def load(rank: int, world_size: int, kind: str, path: str, flat: bool) -> dict[str, Any]:
    """Load into a model with other initial weights that has taken a step."""
    model, optimizer = make(kind, seed=2, channels_last=world_size == 3)
    train(model, optimizer, 7, 8)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    found = whole_state(model, optimizer)
    optimizer.close()
    return found


def without_marker(found: dict[str, Any]) -> dict[str, Any]:
    """Return it without the keys beside torch's, which torch's functions drop; masters stay."""
    full = found["full"]
    masters = full["offload_adam"]["master_weight"]
    return {
        "weights": found["weights"],
        "full": {"state": full["state"], "masters": masters},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_dcp_is_exact_in_any_world(ranks: RankPool, kind: str, tmp_path: Path) -> None:
    for saving, others in ((2, (1, 3)), (1, (2,))):
        path = str(tmp_path / str(saving))
        original = ranks.run(save, saving, kind, path, False, False, timeout=60.0)[0]
        for world_size in others:
            found = ranks.run(load, world_size, kind, path, False, timeout=60.0)[0]
            assert_same(without_marker(found), without_marker(original))


def test_a_flattened_state_is_exact_in_another_world(ranks: RankPool, tmp_path: Path) -> None:
    original = ranks.run(save, 2, "bf16", str(tmp_path / "0"), True, False, timeout=60.0)[0]
    found = ranks.run(load, 3, "bf16", str(tmp_path / "0"), True, timeout=60.0)[0]
    assert_same(without_marker(found), without_marker(original))


def test_a_raw_state_dict_is_whole_in_dcp(ranks: RankPool, tmp_path: Path) -> None:
    """Plain tensors of torch, loaded without ranks, are the whole moments."""
    original = ranks.run(save, 2, "fp32", str(tmp_path / "0"), False, True, timeout=60.0)[0]
    expected = original["full"]["state"]
    keys = ("exp_avg", "exp_avg_sq")
    found = {
        str(packed): {key: torch.full_like(entry[key], 7.0) for key in keys}
        for packed, entry in expected.items()
    }
    dcp.load({"optimizer": {"state": found}}, checkpoint_id=tmp_path / "0", no_dist=True)
    for packed, entry in expected.items():
        for key in keys:
            assert torch.equal(found[str(packed)][key], entry[key]), (packed, key)


def save_async(rank: int, world_size: int, path: str) -> dict[str, Any]:
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 3)
    found = whole_state(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    saving: Any = dcp.async_save(state, checkpoint_id=path)
    train(model, optimizer, 3, 4)  # the saved state is of before
    saving.result(timeout=30)
    optimizer.close()
    return found


def test_async_save_is_exact(ranks: RankPool, tmp_path: Path) -> None:
    original = ranks.run(save_async, 2, str(tmp_path / "0"), timeout=60.0)[0]
    found = ranks.run(load, 3, "fp32", str(tmp_path / "0"), False, timeout=60.0)[0]
    assert_same(without_marker(found), without_marker(original))


def load_full(rank: int, world_size: int, broadcast: bool) -> tuple[Any, Any]:
    """Load a full state through torch; on rank 0 alone where torch broadcasts it."""
    model, optimizer = make("fp32", seed=1)
    train(model, optimizer, 0, 3)
    box: list[Any] = [optimizer.full_state_dict()]
    expected = copy.deepcopy(box[0])
    torch.distributed.broadcast_object_list(box)
    full = {"state": box[0]["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    full["state"] = {names[packed]: entry for packed, entry in full["state"].items()}
    for group in full["param_groups"]:
        group["params"] = [names[packed] for packed in group["params"]]
    train(model, optimizer, 3, 4)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    given = full if rank == 0 or not broadcast else {}
    outcome = outcome_of(lambda: set_optimizer_state_dict(model, optimizer, given, options=options))
    found = optimizer.full_state_dict()
    optimizer.close()
    return outcome, (found, expected)


@pytest.mark.parametrize("broadcast", [False, True])
def test_torch_loads_a_full_state_exactly(ranks: RankPool, broadcast: bool) -> None:
    results = ranks.run(load_full, 2, broadcast, timeout=60.0)
    assert [outcome.error for outcome, _ in results] == ["", ""], results
    found, expected = results[0][1]
    assert_same(found["state"], expected["state"])


def pickle_states(rank: int, world_size: int) -> tuple[list[Outcome], bool]:
    """Try every way of writing one rank's part as if it were the whole state."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = OffloadAdam(model.parameters(), gradient_reduction="external")
    model(torch.ones(2, 8) * (rank + 1)).square().mean().backward()
    optimizer.step()
    full = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    saved = optimizer.state_dict()
    copied = copy.deepcopy(saved)
    moved = {k: v.to(torch.float64) for k, v in saved["state"][0].items()}
    outcomes = [
        outcome_of(lambda value=value: torch.save(value, io.BytesIO()))  # type: ignore[misc]
        for value in (saved, copied, full, moved)
    ]
    optimizer.load_state_dict(saved)  # as accelerate's prepare() does
    before = optimizer.local_state_dict()["state"][0]["exp_avg"].clone()
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
    optimizer.load_state_dict(copied)
    same = torch.equal(optimizer.local_state_dict()["state"][0]["exp_avg"], before)
    assert torch.equal(copied["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    optimizer.state_dict()["state"][0]["exp_avg"].copy_(torch.arange(64.0).view(8, 8))
    weight = next(
        part for part in shards_of(optimizer._settled().states) if part.parameter.shape == (8, 8)
    )
    expected = torch.arange(64.0)[weight.start : weight.end]
    assert torch.equal(values_of(weight.planes["exp_avg"]), expected)
    torch.save(optimizer.local_state_dict(), io.BytesIO())
    optimizer.close()
    return outcomes, same


def test_one_ranks_part_is_never_pickled(ranks: RankPool) -> None:
    for outcomes, same in ranks.run(pickle_states, 2):
        assert same
        for outcome in outcomes:
            assert outcome.error == "TypeError", outcomes
            assert "Call full_state_dict() on every rank" in outcome.message


@pytest.mark.parametrize(
    ("numel", "expected"), [(3, "elements [0, 3) of 8"), (0, "none of 8 elements")]
)
def test_messages_say_what_a_rank_holds(numel: int, expected: str) -> None:
    shard = StateShard((4, 2), (0, 1), 0, torch.zeros(numel))
    assert repr(shard) == f"StateShard({expected}, shape=[4, 2])"
    with pytest.raises(TypeError, match=re.escape(f"(of this tensor {expected})")):
        torch.save(shard, io.BytesIO())


def consolidate(rank: int, world_size: int) -> tuple[list[Any], list[str], list[str]]:
    """Return what state_dict() returns after `consolidate_state_dict`, and then again."""
    model, optimizer = make("bf16", seed=1)
    train(model, optimizer, 0, 3)
    full = optimizer.full_state_dict()
    optimizer.consolidate_state_dict()
    found = [optimizer.state_dict(), optimizer.state_dict()]
    optimizer.consolidate_state_dict(to=0)
    train(model, optimizer, 3, 4)
    found.append(optimizer.state_dict())
    kinds = [type(each["state"][0]["exp_avg"]).__name__ for each in found]
    errors = []
    try:
        optimizer.consolidate_state_dict(to=1)
    except ValueError as error:
        errors.append(str(error))
    buffer = io.BytesIO()
    torch.save(found[0], buffer) if kinds[0] == "Tensor" else None
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True) if kinds[0] == "Tensor" else {}
    optimizer.close()
    return [saved, full], kinds, errors


@pytest.mark.parametrize("world_size", [1, 2])
def test_consolidating_gives_rank_0_the_whole_state_once(ranks: RankPool, world_size: int) -> None:
    """As Lightning does before it saves rank 0's state_dict()."""
    results = ranks.run(consolidate, world_size)
    for rank, ((saved, full), kinds, errors) in enumerate(results):
        sharded = "StateShard" if world_size > 1 else "Tensor"
        assert kinds == ["Tensor" if rank == 0 else sharded, sharded, sharded]
        assert errors == ["to must be 0, because the state is gathered on rank 0, not 1"]
        if rank == 0 and world_size > 1:
            assert_same(saved, full)
