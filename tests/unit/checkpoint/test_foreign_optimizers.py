"""An optimizer of another package is rejected by name, before anything is written or read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam import load_checkpoint, save_checkpoint
from offload_adam.checkpoint.background import begin_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState


@pytest.mark.parametrize("call", [save_checkpoint, begin_checkpoint, load_checkpoint])
def test_a_foreign_optimizer_is_rejected(call: Callable[..., Any], tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer AdamW\. Pass an OffloadAdam,"):
        call(tmp_path / "c", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def test_torch_saves_no_foreign_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer AdamW\. Pass an OffloadAdam,"):
        OptimizerState(model, optimizer)
