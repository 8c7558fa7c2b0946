"""The text that holds an optimizer's state except tensors in a folder of DCP, when damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import OffloadAdam
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.errors import CheckpointError


def change(path: str, value: Any) -> Any:
    """Return a change of one value of the text."""

    def changed(text: str) -> str:
        values = at = json.loads(text)
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            at = at[key]
        at[last] = value
        return json.dumps(values)

    return changed


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: None, "no text under 'plain', but None"),
        (lambda text: torch.zeros(2), "no text under 'plain', but tensor"),
        (lambda text: text[:-1], "is not valid JSON"),
        (lambda text: "[" * 100_000, "is not valid JSON"),
        (lambda text: "null", "PlainState"),
        (lambda text: "{}", "num_steps: Field required"),
        (change("format_version", 99), "has format version 99, .*or a newer one"),
        (change("format_version", 10**400), "has format version 1000.*or a newer one"),
        (change("format_version", "x"), "format_version"),
        (change("num_steps", -1), "num_steps"),
        (change("num_steps", 1.5), "num_steps"),
        (change("num_steps", True), "num_steps"),
        (change("num_steps", None), "num_steps"),
        (change("num_steps", 10**400), "num_steps"),
        (change("optimizer/further", 5), "optimizer.further"),
        (change("optimizer/steps/weight", 2**24 + 1), "optimizer.steps.weight"),
        (change("optimizer/steps/weight", 1e308), "optimizer.steps.weight"),
        (change("optimizer/steps/weight", 0.5), "optimizer.steps.weight"),
        (change("optimizer/groups/0/options/lr", 10**400), "lr is too large for a float"),
        (change("optimizer/groups/0/options/amsgrad", 1), "amsgrad=1"),
        (lambda text: text.replace('{"format', '{"num_steps": 3, "format', 1), "duplicate key"),
        (
            change(
                "optimizer/groups/0/options/amsgrad",
                {"$type": "torch.Tensor", "dtype": "torch.bits8", "shape": [2], "data": "AAA="},
            ),
            "amsgrad=",
        ),
    ],
)
def test_a_damaged_text_is_rejected_and_changes_nothing(damage: Any, words: str) -> None:
    model = nn.Linear(2, 3)
    optimizer = OffloadAdam(model.parameters(), lr=0.25)
    state = OptimizerState(model, optimizer)
    saved = state.state_dict()
    state.load_state_dict(saved)
    saved["plain"] = damage(saved["plain"])
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(CheckpointError, match=words) as caught:
        state.load_state_dict(saved)
    assert len(str(caught.value)) < 1000
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.num_steps == 0


def test_options_that_are_none_are_not_loaded() -> None:
    """`params` among the options would replace the parameters of the group."""
    model = nn.Linear(2, 3)
    optimizer = OffloadAdam(model.parameters(), lr=0.25)
    state = OptimizerState(model, optimizer)
    saved = state.state_dict()
    for key in ("params", "param_names", "replicas"):
        saved["plain"] = change(f"optimizer/groups/0/options/{key}", [5])(saved["plain"])
    saved["plain"] = change("optimizer/groups/0/options/lr", 0.5)(saved["plain"])
    state.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert "param_names" not in group
    model(torch.ones(2)).sum().backward()
    optimizer.step()
