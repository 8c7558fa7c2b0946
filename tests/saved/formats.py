"""Write checkpoints in each state format: python -c "from tests.saved.formats import main; main()"

    VERSION/FORMAT/checkpoint/   what save_checkpoint wrote on one rank
    VERSION/FORMAT/expected.pt   every value at the save, by torch.save

They are written once for each version that changes what is written, and then kept.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

from offload_adam import OffloadAdamW, __version__, save_checkpoint
from offload_adam.options import StateFormat
from tests.saved.write import HERE

FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
EXTRA = {"epoch": 3, "best": float("inf"), "pair": (1, b"bytes")}
NUM_STEPS = 5


def make(state_format: StateFormat, seed: int) -> tuple[nn.Module, OffloadAdamW]:
    """Return a bf16 model with weights drawn from `seed`, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 4)).bfloat16()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return model, OffloadAdamW(groups, lr=0.03, module=model, state_format=state_format)


def train(model: nn.Module, optimizer: OffloadAdamW) -> None:
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 24, generator=generator).bfloat16()
        model(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module, optimizer: OffloadAdamW) -> dict[str, Any]:
    """Return every weight, every stored tensor of the state, and the options of the groups."""
    stored = {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    options = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return {"weights": weights, "stored": stored, "options": options}


def main() -> None:
    """Write the files of the present version."""
    for state_format in FORMATS:
        folder = HERE / __version__ / state_format
        folder.mkdir(parents=True)
        model, optimizer = make(state_format, seed=1)
        train(model, optimizer)
        save_checkpoint(folder / "checkpoint", model=model, optimizer=optimizer, extra=EXTRA)
        torch.save(values(model, optimizer), folder / "expected.pt")
        optimizer.close()
