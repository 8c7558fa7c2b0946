"""The state of sharded parameters: DTensors, torch's state dict functions, and DCP."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from offload_adam import OffloadAdamW
from offload_adam.fsdp_private import local_of
from tests.support.fsdp2 import make_model, shard, whole
from tests.support.ranks import RankPool

BF16 = torch.bfloat16


def make_fsdp(dtype: torch.dtype = torch.float32) -> Any:
    return shard(make_model(dtype))


def make_grid(dtype: torch.dtype = torch.float32) -> Any:
    """Shard by tensor parallelism over two ranks, and by FSDP2 over two."""
    model: Any = make_model(dtype)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"blocks.*.first": ColwiseParallel(), "blocks.*.second": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    return shard(model, mesh=mesh["dp"])


def make_optimizer(model: nn.Module, **options: Any) -> OffloadAdamW:
    # Tensor parallelism leaves some parameters to FSDP2 alone: two meshes have copies of them.
    group = {"params": list(model.named_parameters()), "replicas": "copies"}
    return OffloadAdamW([group], lr=1e-2, num_threads=1, **options)


def distribute(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """Place a tensor as a parameter is. Not collective."""
    if not hasattr(like, "placements"):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def step_by(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take a step with gradients that depend on `number` alone, on any ranks."""
    for position, (name, parameter) in enumerate(model.named_parameters()):
        if name.startswith("unused"):
            continue
        generator = torch.Generator().manual_seed(100 * number + position)
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = distribute(gradient, parameter)
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return all state whole, by names such as "head.weight exp_avg". Collective."""
    return {
        f"{name} {key}": (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


class Outcome(NamedTuple):
    """Parameters and state, whole, at some time; and the parameters two steps later."""

    parameters: list[torch.Tensor]
    state: dict[str, torch.Tensor]
    later: list[torch.Tensor]

    def equals(self, other: Outcome) -> bool:
        return (
            self.state.keys() == other.state.keys()
            and all(torch.equal(self.state[key], other.state[key]) for key in self.state)
            and all(map(torch.equal, self.parameters, other.parameters))
            and all(map(torch.equal, self.later, other.later))
        )


def outcome_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Outcome:
    parameters, state = whole(model), state_of(model, optimizer)
    for number in (10, 11):
        step_by(model, optimizer, number)
    return Outcome(parameters, state, whole(model))


MAKERS: dict[str, Callable[[torch.dtype], Any]] = {"fsdp": make_fsdp, "grid": make_grid}


def save(rank: int, world_size: int, folder: Path, how: str) -> list[Outcome]:
    outcomes = []
    for dtype in (torch.float32, BF16):
        model = MAKERS[how](dtype)
        optimizer = make_optimizer(model)
        for number in range(3):
            step_by(model, optimizer, number)
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / str(dtype))
        outcomes.append(outcome_of(model, optimizer))
        optimizer.close()
    return outcomes


def load(rank: int, world_size: int, folder: Path) -> list[Outcome]:
    outcomes = []
    for dtype in (torch.float32, BF16):
        model = make_fsdp(dtype)
        optimizer = make_optimizer(model)
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / str(dtype))
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
        outcomes.append(outcome_of(model, optimizer))
        optimizer.close()
    return outcomes


@pytest.mark.parametrize(
    ("how", "saving", "loading"), [("fsdp", 2, [1, 2, 3, 4]), ("grid", 4, [2])]
)
def test_a_checkpoint_of_dcp_loads_on_other_ranks(
    ranks: RankPool, tmp_path: Path, how: str, saving: int, loading: list[int]
) -> None:
    saved, *_ = ranks.run(save, saving, tmp_path, how)
    assert "head.weight master_weight" in saved[1].state
    assert saved[1].state["head.weight exp_avg"].dtype is torch.float32
    for world_size in loading:
        for loaded in ranks.run(load, world_size, tmp_path):
            assert loaded[0].equals(saved[0]), world_size
            assert loaded[1].equals(saved[1]), world_size


def describe_state(rank: int, world_size: int) -> list[str]:
    """Return how the state of each parameter differs from the form that torch expects."""
    wrong = []
    for dtype in (torch.float32, BF16):
        model = make_grid(dtype)
        optimizer = make_optimizer(model)
        step_by(model, optimizer, 0)
        for name, parameter in model.named_parameters():
            entry = optimizer.state[parameter]
            master = {"master_weight"} if dtype is BF16 else set()
            if {*entry} != {"step", "exp_avg", "exp_avg_sq"} | master:
                wrong.append(f"{name}: {list(entry)}")
            for key in {*entry} - {"step"}:
                value = entry[key]
                storage = local_of(value).untyped_storage()
                if (
                    value.placements != parameter.placements
                    or value.device_mesh != parameter.device_mesh
                    or value.shape != parameter.shape
                    or value.dtype is not torch.float32
                    or storage.nbytes() != 4 * local_of(parameter).numel()
                ):
                    wrong.append(f"{name}: {key}")
        optimizer.close()
    return wrong


def test_state_is_placed_as_its_parameter(ranks: RankPool) -> None:
    assert ranks.run(describe_state, 4) == [[]] * 4


def round_trips(rank: int, world_size: int) -> list[tuple[str, bool]]:
    """Load a state by each of torch's functions into a new optimizer, and compare both."""
    found = []
    for dtype in (torch.float32, BF16):
        for options in (
            StateDictOptions(),
            StateDictOptions(cpu_offload=True),
            StateDictOptions(full_state_dict=True),
            StateDictOptions(full_state_dict=True, cpu_offload=True),
            StateDictOptions(flatten_optimizer_state_dict=True),
        ):
            one, other = make_fsdp(dtype), make_fsdp(dtype)
            first, second = make_optimizer(one), make_optimizer(other)
            for number in range(2):
                step_by(one, first, number)
            saved = get_optimizer_state_dict(one, first, options=options)
            other.load_state_dict(one.state_dict())
            if options.full_state_dict and options.cpu_offload:  # then rank 0 alone has it
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(other, second, saved, options=options)
            equal = outcome_of(other, second).equals(outcome_of(one, first))
            found.append((f"{dtype} {options}", equal))
            first.close()
            second.close()
    return found


def test_torchs_state_dict_functions_keep_all_bits(ranks: RankPool) -> None:
    for found in ranks.run(round_trips, 2):
        for name, equal in found:
            assert equal, name


def load_itself(rank: int, world_size: int) -> list[bool]:
    equal = []
    for dtype in (torch.float32, BF16):
        one, other = make_grid(dtype), make_grid(dtype)
        first, second = make_optimizer(one), make_optimizer(other)
        for number in range(2):
            step_by(one, first, number)
            step_by(other, second, number)
        second.load_state_dict(second.state_dict())
        equal.append(outcome_of(one, first).equals(outcome_of(other, second)))
    return equal


def test_loading_its_own_state_changes_nothing(ranks: RankPool) -> None:
    assert ranks.run(load_itself, 4) == [[True, True]] * 4


def load_unsharded(rank: int, world_size: int) -> list[tuple[str, float]]:
    """Continue the training of an unsharded model, which torch's AdamW began."""
    found = []
    for name, make in MAKERS.items():
        plain = make_model()
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        for number in range(2):
            step_by(plain, reference, number)
        model = make(torch.float32)
        optimizer = make_optimizer(model)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), plain.parameters(), strict=True):
                parameter.copy_(distribute(value, parameter))
        optimizer.load_state_dict(reference.state_dict())
        step_by(plain, reference, 5)
        step_by(model, optimizer, 5)
        pairs = zip(whole(model), plain.state_dict().values(), strict=True)
        found.append((name, max(float((one - same).abs().max()) for one, same in pairs)))
        optimizer.close()
    return found


def test_the_state_of_an_unsharded_model_loads(ranks: RankPool) -> None:
    for found in ranks.run(load_unsharded, 4):
        for name, difference in found:
            assert difference < 1e-6, name


def load_other_placements(rank: int, world_size: int) -> tuple[str, bool]:
    """Load the state of HSDP into FSDP over the same ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    hybrid, model = shard(make_model(), mesh=mesh), make_fsdp()
    first, second = make_optimizer(hybrid), make_optimizer(model)
    step_by(hybrid, first, 0)
    step_by(model, second, 0)
    before = state_of(model, second)
    try:
        second.load_state_dict(first.state_dict())
    except ValueError as error:
        message = str(error)
    after = state_of(model, second)
    return message, all(torch.equal(before[key], after[key]) for key in before)


def test_state_of_other_placements_is_rejected(ranks: RankPool) -> None:
    for message, kept in ranks.run(load_other_placements, 4):
        assert re.search(
            "exp_avg of parameter 'embedding.weight' is placed as .*Replicate", message
        )
        assert "torch.distributed.checkpoint" in message
        assert kept
