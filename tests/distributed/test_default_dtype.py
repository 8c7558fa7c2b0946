"""With another default dtype or device of torch, the package computes the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from offload_adam import Adam, OffloadAdam, begin_checkpoint, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState
from tests.distributed.test_checkpoints import flat
from tests.support.ranks import RankPool

DEFAULTS = ("bfloat16", "float64", "meta")


class Case(NamedTuple):
    """How a model and its optimizer are made."""

    make: Callable[[nn.Module], Any]
    dtype: torch.dtype = torch.float32
    sparse: bool = False


def adam(model: nn.Module, **options: Any) -> Adam:
    return Adam(model.parameters(), 0.1, gradient_reduction="optimizer", **options)


def centralized(model: nn.Module) -> Adam:
    groups = [{"params": list(model.parameters()), "grad_centralization": True}]
    return Adam(groups, 0.1, gradient_reduction="optimizer")


def offload(model: nn.Module, **options: Any) -> OffloadAdam:
    return OffloadAdam(model.parameters(), 0.1, gradient_reduction="optimizer", **options)


CASES = {
    "drop_in": Case(lambda model: offload(model, max_grad_norm=0.1)),
    "streaming": Case(lambda model: offload(model, module=model), dtype=torch.bfloat16),
    "accumulate": Case(lambda model: offload(model, module=model, accumulate="host")),
    "amsgrad": Case(lambda model: offload(model, amsgrad=True)),
    "adam_beside": Case(lambda model: adam(model, use_nesterov=True), dtype=torch.bfloat16),
    "adam_centralized": Case(centralized),
    "adam_sparse": Case(lambda model: adam(model, use_offload=True), sparse=True),
    "adam_lazy": Case(lambda model: adam(model, use_lazy=True), sparse=True),
    "adam_vector": Case(
        lambda model: Adam(model.parameters(), [0.1, 0.2, 0.3], gradient_reduction="optimizer")
    ),
}


class Model(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 300, sparse=sparse)
        self.head = nn.Linear(300, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.table(tokens))
        return found


@contextmanager
def default(name: str | None) -> Iterator[None]:
    """Change torch's default dtype or device inside."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        if name == "meta":
            torch.set_default_device("meta")
        elif name is not None:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


def train(model: nn.Module, optimizer: Any, batches: list[torch.Tensor]) -> None:
    for tokens in batches:
        optimizer.zero_grad()
        model(tokens).float().square().sum().backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()


def everything(
    rank: int, world_size: int, kind: str, name: str | None, folder: str
) -> dict[str, Any]:
    """Train, save in every way, load in every way, train on; return all results."""
    case = CASES[kind]
    torch.manual_seed(0)
    models = [Model(case.sparse).to(case.dtype) for _ in range(5)]
    batches = [torch.randint(11, (4,)) for _ in range(2)]
    root = Path(folder) / f"{kind}-{name}"
    with default(name):
        first, *others = ((model, case.make(model)) for model in models)
        train(*first, batches)
        model, optimizer = first
        save_checkpoint(root / "whole", model=model, optimizer=optimizer)
        pending = begin_checkpoint(root / "background", model=model, optimizer=optimizer)
        pending.wait()
        dcp.save({"o": OptimizerState(model, optimizer)}, checkpoint_id=root / "distributed")
        own, full = copy.deepcopy(optimizer.state_dict()), optimizer.full_state_dict()
        for (other, loaded), way in zip(others, ("whole", "background", "dcp", "own"), strict=True):
            if way in ("whole", "background"):
                load_checkpoint(root / way, model=other, optimizer=loaded)
            else:
                other.load_state_dict(model.state_dict())
            if way == "dcp":
                dcp.load({"o": OptimizerState(other, loaded)}, checkpoint_id=root / "distributed")
            elif way == "own":
                loaded.load_state_dict(own)
        found = {"full": full}
        for number, (other, loaded) in enumerate((first, *others)):
            train(other, loaded, batches[:1])
            found[f"weights {number}"] = {
                n: p.detach().clone() for n, p in other.named_parameters()
            }
            found[f"full {number}"] = loaded.full_state_dict()
            loaded.close()
        return flat(found)


def assert_same_bits(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == found[name].dtype, name
            assert torch.equal(value, found[name]), name
        else:
            assert value == found[name], name


@pytest.mark.parametrize("kind", CASES)
def test_defaults_of_torch_change_no_bit_on_one_rank(kind: str, tmp_path: Path) -> None:
    expected = everything(0, 1, kind, None, str(tmp_path))
    assert any("exp_avg" in name for name in expected)
    for name in DEFAULTS:
        assert_same_bits(expected, everything(0, 1, kind, name, str(tmp_path)))


@pytest.mark.parametrize("kind", ["drop_in", "streaming", "adam_beside", "adam_sparse"])
def test_defaults_of_torch_change_no_bit_on_two_ranks(
    ranks: RankPool, kind: str, tmp_path: Path
) -> None:
    expected = ranks.run(everything, 2, kind, None, str(tmp_path))
    for name in DEFAULTS:
        found = ranks.run(everything, 2, kind, name, str(tmp_path))
        for before, after in zip(expected, found, strict=True):
            assert_same_bits(before, after)
