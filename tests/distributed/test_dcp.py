"""The optimizer state through a user's own `dcp.save` and `dcp.load`, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.state.state_shard import BoxTensor
from tests.distributed.test_checkpoints import assert_same, make, train, whole_state
from tests.support.ranks import RankPool


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}


def save(rank: int, world_size: int, kind: str, path: str) -> dict[str, Any]:
    model, optimizer = make(kind, seed=1)
    train(model, optimizer, 0, 3)
    dcp.save(state_of(model, optimizer), checkpoint_id=path)
    found = whole_state(model, optimizer)
    optimizer.close()
    return found


def pass_on(rank: int, world_size: int, kind: str, source: str, target: str) -> dict[str, Any]:
    """Load into a model with other initial weights that has taken a step, and save again."""
    model, optimizer = make(kind, seed=2 + rank, channels_last=world_size == 3)
    train(model, optimizer, 7, 8)
    dcp.load(state_of(model, optimizer), checkpoint_id=source)
    found = whole_state(model, optimizer)
    dcp.save(state_of(model, optimizer), checkpoint_id=target)
    optimizer.close()
    return found


@pytest.mark.parametrize("kind", ["fp32", "bf16", "adam_beside"])
def test_from_2_to_3_to_1_ranks_to_the_bit(ranks: RankPool, kind: str, tmp_path: Path) -> None:
    original = ranks.run(save, 2, kind, str(tmp_path / "0"), timeout=60.0)[0]
    for number, world_size in enumerate((3, 1, 2)):
        source, target = str(tmp_path / str(number)), str(tmp_path / str(number + 1))
        assert_same(original, ranks.run(pass_on, world_size, kind, source, target, timeout=60.0)[0])


def test_torch_alone_reads_it(ranks: RankPool, tmp_path: Path) -> None:
    """Load into plain tensors, as a script without this package does."""
    original = ranks.run(save, 2, "fp32", str(tmp_path / "0"), timeout=60.0)[0]
    names = [name for name, _ in make("fp32", seed=1)[0].named_parameters() if name != "frozen"]
    shapes = {name: original["weights"][name].shape for name in names}
    keys = ("exp_avg", "exp_avg_sq")
    found = {name: {key: torch.zeros(shapes[name]) for key in keys} for name in names}
    dcp.load({"optimizer": {"state": found}}, checkpoint_id=tmp_path / "0", no_dist=True)
    for packed, name in enumerate(names):
        for key in keys:
            assert torch.equal(found[name][key], original["full"]["state"][packed][key]), name


def test_a_box_tensor_is_for_checkpoints_only() -> None:
    tensor = BoxTensor((2, 3), torch.float32, [])
    assert repr(tensor) == "BoxTensor(shape=[2, 3], boxes=0)"
    with pytest.raises(NotImplementedError, match="only supports checkpoints"):
        _ = tensor + 1
