"""`state_format="bf16"`: the same bits on any ranks and under any sharding, after a resume too."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from offload_adam import CheckpointError, begin_checkpoint, load_checkpoint, save_checkpoint
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.fsdp_private import is_dtensor, local_of, placement_of
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of
from tests.support.state_format import (
    LAYOUTS,
    NUM_BEFORE,
    NUM_STEPS,
    Values,
    differences,
    gradients_at,
    make,
    train,
    values_of,
    weights_of,
)


@pytest.fixture(scope="module")
def expected() -> Values:
    """Return the outcome of the whole run in one process, without sharding."""
    net, optimizer = make("plain 1")
    train(net, optimizer, 0, NUM_STEPS)
    assert optimizer.state[net.first.weight]["exp_avg_sq"].dtype == torch.bfloat16
    assert optimizer.state[net.second.weight]["step"] == NUM_STEPS - 1
    return values_of(net, optimizer)


def run_layout(rank: int, world_size: int, layout: str) -> tuple[Values, list[str]]:
    """Train under a layout; return the outcome, and state whose dtype or placement is wrong."""
    net, optimizer = make(layout)
    train(net, optimizer, 0, NUM_STEPS)
    wrong = []
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            is_low = parameter.dim() > 1 or name == "first.bias"
            dtype = {
                "step": torch.float32,
                "master_weight": torch.float32,
                "master_remainder": torch.uint8 if is_dtensor(value) else torch.int16,
            }.get(key, torch.bfloat16 if is_low else torch.float32)
            # Under HSDP, replicas divide the state further, so it has no placement of torch.
            is_placed = layout == "hsdp 4" or placement_of(value) == placement_of(parameter)
            if value.dtype != dtype or not (is_placed or key == "step"):
                wrong.append(f"{name} {key}")
    found = values_of(net, optimizer)
    optimizer.close()
    return found, wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_sharding(
    ranks: RankPool, expected: Values, layout: str
) -> None:
    results = ranks.run(run_layout, LAYOUTS[layout].world_size, layout)
    assert differences(results[0][0], expected) == []
    for found, wrong in results:
        assert wrong == []
        assert differences(found | expected, expected | found) == []  # the parameters


def run_reduced(rank: int, world_size: int, layout: str, streams: bool) -> Values:
    """Let the optimizer or FSDP2 average gradients that differ between the ranks."""
    options: dict[str, Any] = {"overlap": True} if streams else {}
    if layout.startswith("plain"):
        options["gradient_reduction"] = "optimizer"
    net, optimizer = make(layout, streams=streams, **options)
    # The factors of all ranks add up to the number of ranks.
    factors = [1 - 2 * rank for rank in range(world_size - 1)]
    factors.append(world_size - sum(factors))
    for step in range(NUM_STEPS):
        net(gradients_at(net, step, factors[rank])).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = values_of(net, optimizer)
    optimizer.close()
    return found


@pytest.mark.parametrize(
    ("layout", "streams"),
    [
        *(("plain 2", streams) for streams in (False, True)),
        *(("plain 3", streams) for streams in (False, True)),
        ("fsdp 2", True),
    ],
)
def test_averaged_gradients_give_the_same_bits(
    ranks: RankPool, expected: Values, layout: str, streams: bool
) -> None:
    found = ranks.run(run_reduced, LAYOUTS[layout].world_size, layout, streams)[0]
    assert differences(found, expected) == []


def begin(rank: int, world_size: int, layout: str, folder: str, how: str) -> tuple[Any, Values]:
    """Train, save by `how`, and continue; return what a load needs besides the folder."""
    net, optimizer = make(layout)
    train(net, optimizer, 0, NUM_BEFORE)
    passed: Any = None
    if how == "checkpoint":
        save_checkpoint(folder, model=net, optimizer=optimizer)
    elif how == "background":
        pending = begin_checkpoint(folder, model=net, optimizer=optimizer)
    elif how == "dcp":
        state = {"net": net.state_dict(), "optimizer": OptimizerState(net, optimizer)}
        dcp.save(state, checkpoint_id=folder)
    elif how == "torch":
        of_net, of_optimizer = get_state_dict(net, optimizer)
        dcp.save({"net": of_net, "optimizer": of_optimizer}, checkpoint_id=folder)
    elif how == "full":
        passed = weights_of(net), copy.deepcopy(optimizer.full_state_dict())
    else:  # one file for each rank
        saved = io.BytesIO()
        torch.save((net.state_dict(), optimizer.local_state_dict()), saved)
        passed = saved.getvalue()
    train(net, optimizer, NUM_BEFORE, NUM_STEPS)
    if how == "background":
        pending.wait()
    found = values_of(net, optimizer)
    optimizer.close()
    return passed, found


def resume(
    rank: int, world_size: int, layout: str, folder: str, how: str, passed: list[Any]
) -> Values:
    """Load into a model that has other weights and state, and take the rest of the steps."""
    net, optimizer = make(layout, seed=1 + rank)
    train(net, optimizer, 7, 8)
    if how in ("checkpoint", "background"):
        load_checkpoint(folder, model=net, optimizer=optimizer)
    elif how == "dcp":
        state = {"net": net.state_dict(), "optimizer": OptimizerState(net, optimizer)}
        dcp.load(state, checkpoint_id=folder)
    elif how == "torch":
        of_net, of_optimizer = get_state_dict(net, optimizer)
        state = {"net": of_net, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(net, optimizer, model_state_dict=of_net, optim_state_dict=of_optimizer)
    elif how == "full":
        weights, full = passed[0]
        net.load_state_dict(weights)
        optimizer.load_state_dict(full)
    else:
        of_net, of_optimizer = torch.load(io.BytesIO(passed[rank]), weights_only=True)
        net.load_state_dict(of_net)
        optimizer.load_state_dict(of_optimizer)
    train(net, optimizer, NUM_BEFORE, NUM_STEPS)
    found = values_of(net, optimizer)
    optimizer.close()
    return found


@pytest.mark.parametrize(
    ("how", "saving", "loading"),
    [
        ("checkpoint", "plain 2", ["plain 1", "plain 3", "fsdp 2"]),
        ("checkpoint", "fsdp 2", ["plain 1", "columns 2"]),
        ("checkpoint", "plain 1", ["fsdp 2", "tp 2"]),
        ("checkpoint", "grid 4", ["plain 1", "hsdp 4"]),
        ("background", "plain 2", ["plain 1"]),
        ("background", "fsdp 2", ["fsdp 1"]),
        ("dcp", "plain 2", ["plain 3", "plain 1"]),
        ("dcp", "grid 4", ["fsdp 2", "plain 1"]),
        ("torch", "plain 2", ["plain 3"]),
        ("torch", "fsdp 2", ["fsdp 1", "fsdp 4"]),
        ("full", "plain 2", ["plain 1"]),
        ("full", "fsdp 2", ["plain 1"]),
        ("own", "plain 2", ["plain 2"]),
        ("own", "fsdp 2", ["fsdp 2"]),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    ranks: RankPool, expected: Values, tmp_path: Path, how: str, saving: str, loading: list[str]
) -> None:
    folder = str(tmp_path / "saved")
    saved = ranks.run(begin, LAYOUTS[saving].world_size, saving, folder, how)
    assert differences(saved[0][1], expected) == []  # the save has changed nothing
    passed = [each[0] for each in saved]
    for layout in loading:
        found = ranks.run(resume, LAYOUTS[layout].world_size, layout, folder, how, passed)[0]
        assert differences(found, expected) == [], layout


def rewind(rank: int, world_size: int, layout: str) -> tuple[list[str], Values]:
    """Load a copy of an earlier state on the same ranks; return its classes, and the outcome."""
    net, optimizer = make(layout)
    train(net, optimizer, 0, NUM_BEFORE)
    weights, state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    classes = {type(entry["exp_avg"]).__name__ for entry in state["state"].values()}
    train(net, optimizer, NUM_BEFORE, NUM_BEFORE + 1)
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(net, optimizer, NUM_BEFORE, NUM_STEPS)
    found = values_of(net, optimizer)
    optimizer.close()
    return sorted(classes), found


@pytest.mark.parametrize(
    ("layout", "expected_class"), [("plain 3", "StateShard"), ("hsdp 4", "DTensor")]
)
def test_a_state_dict_loads_on_the_same_ranks(
    ranks: RankPool, expected: Values, layout: str, expected_class: str
) -> None:
    classes, found = ranks.run(rewind, LAYOUTS[layout].world_size, layout)[0]
    assert classes == [expected_class]
    assert differences(found, expected) == []


def round_trip(rank: int, world_size: int, options: StateDictOptions) -> Values:
    """Load a state by torch's functions into another optimizer, and continue."""
    net, optimizer = make("fsdp 2")
    train(net, optimizer, 0, NUM_BEFORE)
    other, second = make("fsdp 2", seed=1)
    train(other, second, 7, 8)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    with torch.no_grad():
        for one, same in zip(net.parameters(), other.parameters(), strict=True):
            local_of(same).copy_(local_of(one))
    if options.full_state_dict:  # rank 0 alone has it
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, second, saved, options=options)
    train(other, second, NUM_BEFORE, NUM_STEPS)
    found = values_of(other, second)
    optimizer.close()
    second.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True),
    ],
    ids=["sharded", "flat", "full"],
)
def test_torchs_state_dict_functions_keep_all_bits(
    ranks: RankPool, expected: Values, options: StateDictOptions
) -> None:
    found = ranks.run(round_trip, 2, options)[0]
    assert differences(found, expected) == []


def convert(rank: int, world_size: int, layout: str, folder: str) -> dict[str, Values]:
    """Load fp32 state into bf16 and back, from checkpoints and from state dicts."""
    net, exact = make(layout, state_format="fp32")
    train(net, exact, 0, NUM_BEFORE)
    found = {}
    save_checkpoint(folder, model=net, optimizer=exact)
    other, low = make(layout, seed=1)
    load_checkpoint(folder, model=other, optimizer=low)
    found["rounded by a checkpoint"] = values_of(other, low)
    low.load_state_dict(exact.state_dict())
    found["rounded by a state dict"] = values_of(other, low)
    train(other, low, NUM_BEFORE, NUM_STEPS)
    save_checkpoint(f"{folder}-low", model=other, optimizer=low)
    with pytest.raises(CheckpointError, match="convert=True"):
        load_checkpoint(f"{folder}-low", model=net, optimizer=exact)
    with pytest.raises(ValueError, match="convert=True"):
        exact.load_state_dict(low.state_dict())
    load_checkpoint(f"{folder}-low", model=net, optimizer=exact, convert=True)
    found["decoded from a checkpoint"] = values_of(net, exact)
    exact.load_state_dict(low.state_dict(), convert=True)
    found["decoded from a state dict"] = values_of(net, exact)
    low.close()
    exact.close()
    return found


@pytest.mark.parametrize("layout", ["plain 3", "fsdp 2", "hsdp 4"])
def test_other_ranks_convert_alike(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    expected = convert(0, 1, "plain 1", str(tmp_path / "plain"))
    assert differences(*list(expected.values())[:2]) == []
    assert differences(*list(expected.values())[2:]) == []
    folder = str(tmp_path / "sharded")
    found = ranks.run(convert, LAYOUTS[layout].world_size, layout, folder)[0]
    for name, values in found.items():
        assert differences(values, expected[name]) == [], name


def construct_differently(rank: int, world_size: int) -> Outcome:
    return outcome_of(lambda: make("plain 2", state_format=("bf16", "fp32")[rank]))


def test_ranks_that_disagree_about_the_format_are_rejected(ranks: RankPool) -> None:
    for outcome in ranks.run(construct_differently, 2):
        assert outcome.error == "RankDisagreementError"
        assert "state_format" in outcome.message
