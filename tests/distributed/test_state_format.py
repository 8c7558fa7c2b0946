"""State in low precision: the same bits on any ranks and under any sharding, after a resume too.

State in 8-bit codes has the same bits if the same elements share blocks of 128.
"""

from __future__ import annotations

import copy
import io
import logging
import re
from dataclasses import dataclass
from functools import cache
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
from offload_adam.memory.codes import values_of as values_of_plane
from offload_adam.state.state_shard import shard_of
from tests.support.ranks import RankPool
from tests.support.reference import Outcome, outcome_of
from tests.support.state_format import (
    LAYOUTS,
    NUM_BEFORE,
    NUM_STEPS,
    Net,
    Values,
    differences,
    gradients_at,
    make,
    train,
    values_of,
    weights_of,
)


@dataclass(frozen=True)
class Case:
    """A state format, and whether rows have whole blocks."""

    state_format: str = "bf16"
    aligned: bool = False

    def make(self, layout: str, seed: int = 0, **options: Any) -> tuple[Net, Any]:
        return make(layout, seed, state_format=self.state_format, aligned=self.aligned, **options)

    def __str__(self) -> str:
        return f"{self.state_format}{' aligned' if self.aligned else ''}"


BF16 = Case()
MIXED, MIXED_ALIGNED = Case("mixed"), Case("mixed", aligned=True)
INT8, INT8_ALIGNED = Case("int8"), Case("int8", aligned=True)


@cache
def expected_of(case: Case) -> Values:
    """Return the outcome of the whole run in one process, without sharding."""
    net, optimizer = case.make("plain 1")
    train(net, optimizer, 0, NUM_STEPS)
    assert optimizer._alive().bucket_and_position(0)[0].state_format == case.state_format
    assert optimizer.state[net.second.weight]["step"] == NUM_STEPS - 1
    return values_of(net, optimizer)


def run_layout(rank: int, world_size: int, layout: str, case: Case) -> tuple[Values, list[str]]:
    """Train under a layout; return the outcome, and state whose dtype or placement is wrong."""
    net, optimizer = case.make(layout)
    train(net, optimizer, 0, NUM_STEPS)
    wrong = []
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            is_low = parameter.dim() > 1 or (name == "first.bias" and not case.aligned)
            remainder = torch.uint8 if is_dtensor(value) else torch.int16
            dtype = {
                "step": torch.float32,
                "exp_avg_sq_scale": torch.float64,
                "master_weight": torch.float32,
                "master_remainder": remainder if case.state_format == "bf16" else torch.int8,
            }.get(key, torch.bfloat16 if is_low else torch.float32)
            # Under HSDP, replicas divide the state further, so it has no placement of torch.
            is_placed = layout == "hsdp 4" or placement_of(value) == placement_of(parameter)
            if value.dtype != dtype or not (is_placed or value.dim() == 0):
                wrong.append(f"{name} {key}")
        # A moment in codes shows the elements of this rank.
        shard = shard_of(*optimizer._alive().bucket_and_position(optimizer._index_of[parameter]))
        shown = local_of(optimizer.state[parameter]["exp_avg"]).clone()
        if not torch.equal(shown.view(-1), values_of_plane(shard.planes["exp_avg"])):
            wrong.append(f"{name} exp_avg")
    found = values_of(net, optimizer)
    optimizer.close()
    return found, wrong


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        *((layout, BF16) for layout in LAYOUTS),
        *(("plain 3", case) for case in (MIXED, INT8)),
        *(("fsdp 4", case) for case in (MIXED_ALIGNED, INT8_ALIGNED)),
        ("hsdp 4", INT8_ALIGNED),
    ],
    ids=str,
)
def test_the_bits_do_not_depend_on_the_sharding(ranks: RankPool, layout: str, case: Case) -> None:
    expected = expected_of(case)
    results = ranks.run(run_layout, LAYOUTS[layout].world_size, layout, case)
    assert differences(results[0][0], expected) == []
    for found, wrong in results:
        assert wrong == []
        assert differences(found | expected, expected | found) == []  # the parameters


def run_reduced(rank: int, world_size: int, layout: str, streams: bool, case: Case) -> Values:
    """Let the optimizer or FSDP2 average gradients that differ between the ranks."""
    options: dict[str, Any] = {"overlap": True} if streams else {}
    if layout.startswith("plain"):
        options["gradient_reduction"] = "optimizer"
    net, optimizer = case.make(layout, streams=streams, **options)
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
    ("layout", "streams", "case"),
    [
        *(("plain 2", streams, BF16) for streams in (False, True)),
        *(("plain 3", streams, BF16) for streams in (False, True)),
        ("fsdp 2", True, BF16),
        ("plain 2", True, MIXED),
        ("plain 3", False, INT8),
        ("fsdp 2", True, INT8_ALIGNED),
    ],
    ids=str,
)
def test_averaged_gradients_give_the_same_bits(
    ranks: RankPool, layout: str, streams: bool, case: Case
) -> None:
    found = ranks.run(run_reduced, LAYOUTS[layout].world_size, layout, streams, case)[0]
    assert differences(found, expected_of(case)) == []


def begin(
    rank: int, world_size: int, layout: str, folder: str, how: str, case: Case
) -> tuple[Any, Values]:
    """Train, save by `how`, and continue; return what a load needs besides the folder."""
    net, optimizer = case.make(layout)
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
    rank: int, world_size: int, layout: str, folder: str, how: str, passed: list[Any], case: Case
) -> Values:
    """Load into a model that has other weights and state, and take the rest of the steps."""
    net, optimizer = case.make(layout, seed=1 + rank)
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
    ("how", "saving", "loading", "case"),
    [
        ("checkpoint", "plain 2", ["plain 1", "plain 3", "fsdp 2"], BF16),
        ("checkpoint", "fsdp 2", ["plain 1", "columns 2"], BF16),
        ("checkpoint", "plain 1", ["fsdp 2", "tp 2"], BF16),
        ("checkpoint", "grid 4", ["plain 1", "hsdp 4"], BF16),
        ("background", "plain 2", ["plain 1"], BF16),
        ("background", "fsdp 2", ["fsdp 1"], BF16),
        ("dcp", "plain 2", ["plain 3", "plain 1"], BF16),
        ("dcp", "grid 4", ["fsdp 2", "plain 1"], BF16),
        ("torch", "plain 2", ["plain 3"], BF16),
        ("torch", "fsdp 2", ["fsdp 1", "fsdp 4"], BF16),
        ("full", "plain 2", ["plain 1"], BF16),
        ("full", "fsdp 2", ["plain 1"], BF16),
        ("own", "plain 2", ["plain 2"], BF16),
        ("own", "fsdp 2", ["fsdp 2"], BF16),
        ("checkpoint", "plain 2", ["plain 1", "plain 3"], MIXED),
        ("checkpoint", "plain 3", ["plain 2"], INT8),
        ("checkpoint", "fsdp 2", ["plain 1", "hsdp 4"], INT8_ALIGNED),
        ("background", "plain 2", ["plain 1"], INT8),
        ("dcp", "plain 2", ["plain 3"], INT8),
        ("dcp", "fsdp 2", ["plain 1"], MIXED_ALIGNED),
        ("torch", "plain 2", ["plain 3"], INT8),
        ("torch", "fsdp 2", ["fsdp 4"], INT8_ALIGNED),
        ("full", "plain 2", ["plain 1"], INT8),
        ("full", "fsdp 2", ["plain 1"], MIXED_ALIGNED),
        ("own", "plain 2", ["plain 2"], INT8),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    ranks: RankPool, tmp_path: Path, how: str, saving: str, loading: list[str], case: Case
) -> None:
    expected = expected_of(case)
    folder = str(tmp_path / "saved")
    saved = ranks.run(begin, LAYOUTS[saving].world_size, saving, folder, how, case)
    assert differences(saved[0][1], expected) == []  # the save has changed nothing
    passed = [each[0] for each in saved]
    for layout in loading:
        found = ranks.run(resume, LAYOUTS[layout].world_size, layout, folder, how, passed, case)[0]
        assert differences(found, expected) == [], layout


@pytest.mark.parametrize(
    ("how", "layout", "case"),
    [
        ("checkpoint", "fsdp 2", INT8),
        ("checkpoint", "grid 4", INT8),
        ("own", "columns 2", MIXED),
        ("torch", "tp 2", INT8),
    ],
    ids=str,
)
def test_codes_resume_with_all_bits_on_the_same_mesh(
    ranks: RankPool, tmp_path: Path, how: str, layout: str, case: Case
) -> None:
    """The ranks divide rows and columns, so that blocks are not those of the whole parameter."""
    folder, world_size = str(tmp_path / "saved"), LAYOUTS[layout].world_size
    saved = ranks.run(begin, world_size, layout, folder, how, case)
    passed = [each[0] for each in saved]
    found = ranks.run(resume, world_size, layout, folder, how, passed, case)[0]
    assert differences(found, saved[0][1]) == []
    assert differences(found, expected_of(case)) != []


def load_elsewhere(rank: int, world_size: int, layout: str, folder: str) -> tuple[Values, str]:
    """Load a checkpoint of codes under another mesh; return the values, and what was logged."""
    net, optimizer = INT8.make(layout, seed=1)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("offload_adam")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    load_checkpoint(folder, model=net, optimizer=optimizer)
    log.removeHandler(handler)
    found = values_of(net, optimizer)
    optimizer.close()
    return found, stream.getvalue()


def spread_rows(gradients: Values) -> None:
    """Let the rows of the table differ in scale, so that its blocks have different exponents."""
    gradients["table.weight"] *= 2.0 ** (torch.arange(137) % 20).unsqueeze(1)


def save_here(rank: int, world_size: int, layout: str, folder: str) -> Values:
    net, optimizer = INT8.make(layout)
    train(net, optimizer, 0, NUM_BEFORE, spread_rows)
    save_checkpoint(folder, model=net, optimizer=optimizer)
    found = values_of(net, optimizer)
    optimizer.close()
    return found


def test_codes_are_rounded_once_on_another_mesh(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    exact = ranks.run(save_here, 2, "fsdp 2", folder)[0]
    found, logged = ranks.run(load_elsewhere, 2, "columns 2", folder)[0]
    again, silent = ranks.run(load_elsewhere, 2, "fsdp 2", folder)[0]
    assert differences(again, exact) == []
    assert silent == ""
    assert re.fullmatch(r"Rounded \d+ moment\(s\) in 8-bit codes once more, .*\n", logged)
    assert differences(found, exact) == ["table.weight exp_avg", "table.weight exp_avg_sq"]
    one, other = (values["table.weight exp_avg"] for values in (found, exact))
    assert ((one - other).abs() <= other.abs() / 32 + other.abs().max() / 4080).all()
    # A second moment is exact, unless it is too small for its new block.
    one, other = (values["table.weight exp_avg_sq"] for values in (found, exact))
    is_same = one == other
    assert is_same.float().mean() > 0.9
    assert (one[~is_same] > other[~is_same]).all()
    assert (one[~is_same] < one.max() * 2**-30).all()


def rewind(rank: int, world_size: int, layout: str, case: Case) -> tuple[list[str], Values]:
    """Load a copy of an earlier state on the same ranks; return its classes, and the outcome."""
    net, optimizer = case.make(layout)
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
    ("layout", "expected_class", "case"),
    [
        ("plain 3", "StateShard", BF16),
        ("hsdp 4", "DTensor", BF16),
        ("plain 3", "StateShard", INT8),
        ("hsdp 4", "DTensor", INT8_ALIGNED),
    ],
    ids=str,
)
def test_a_state_dict_loads_on_the_same_ranks(
    ranks: RankPool, layout: str, expected_class: str, case: Case
) -> None:
    classes, found = ranks.run(rewind, LAYOUTS[layout].world_size, layout, case)[0]
    assert classes == [expected_class]
    assert differences(found, expected_of(case)) == []


def round_trip(rank: int, world_size: int, options: StateDictOptions, case: Case) -> Values:
    """Load a state by torch's functions into another optimizer, and continue."""
    net, optimizer = case.make("fsdp 2")
    train(net, optimizer, 0, NUM_BEFORE)
    other, second = case.make("fsdp 2", seed=1)
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
@pytest.mark.parametrize("case", [BF16, INT8_ALIGNED], ids=str)
def test_torchs_state_dict_functions_keep_all_bits(
    ranks: RankPool, options: StateDictOptions, case: Case
) -> None:
    found = ranks.run(round_trip, 2, options, case)[0]
    assert differences(found, expected_of(case)) == []


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
