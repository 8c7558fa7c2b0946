"""Parameters whose data are exchanged for a while, as by averages of weights, or for good."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

from offload_adam import (
    OffloadAdam,
    OffloadAdamW,
    ParameterReplacedError,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.save import Save

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}


def make_parameters(dtype: torch.dtype = torch.float32) -> torch.nn.ParameterList:
    generator = torch.Generator().manual_seed(5)
    return torch.nn.ParameterList(
        [torch.randn(4, 4, generator=generator).to(dtype) for _ in range(3)]
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Train with gradients of the parameters' values, and of noise that depends on the step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        losses = []
        for parameter in model.parameters():
            factor = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses.append((parameter * factor.to(parameter.dtype)).sum() + parameter.square().sum())
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_close(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-5


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Averages:
    """The averages of many training scripts, which exchange data without a copy."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.shadow = [p.data.clone() for p in model.parameters()]
        self.backup: list[torch.Tensor] = []

    def update(self) -> None:
        for shadow, parameter in zip(self.shadow, self.model.parameters(), strict=True):
            shadow.mul_(0.5).add_(parameter.data, alpha=0.5)

    def swap_in(self) -> None:
        self.backup = [p.data for p in self.model.parameters()]
        for shadow, parameter in zip(self.shadow, self.model.parameters(), strict=True):
            parameter.data = shadow

    def restore(self) -> None:
        for kept, parameter in zip(self.backup, self.model.parameters(), strict=True):
            parameter.data = kept
        self.backup = []


def save(optimizer: OffloadAdam, model: torch.nn.Module, path: Path) -> None:
    save_checkpoint(path, model=model, optimizer=optimizer)


LOOKS: dict[str, Callable[[OffloadAdam, torch.nn.Module, Path], object]] = {
    "state_dict": lambda optimizer, *_: optimizer.state_dict(),
    "full_state_dict": lambda optimizer, *_: optimizer.full_state_dict(),
    "synchronize": lambda optimizer, *_: optimizer.synchronize(),
    "refresh_master": lambda optimizer, *_: optimizer.refresh_master(),
    "add_param_group": lambda optimizer, *_: optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.zeros(2))]}
    ),
    "zero_grad": lambda optimizer, *_: optimizer.zero_grad(set_to_none=False),
    "load": lambda optimizer, *_: optimizer.load_state_dict(optimizer.full_state_dict()),
    "save_checkpoint": save,
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("look", LOOKS)
def test_averages_swapped_in_and_out_leave_every_bit(
    look: str, dtype: torch.dtype, streams: bool, tmp_path: Path
) -> None:
    model, expected = make_parameters(dtype), make_parameters(dtype)
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS, module=model if streams else None)
    oracle = OffloadAdamW(expected.parameters(), **OPTIONS)
    averages = Averages(model)
    for number in range(3):
        train(model, optimizer, 1)
        train(expected, oracle, 1)
        averages.update()
        averages.swap_in()
        shown = [parameter.detach().clone() for parameter in model.parameters()]
        LOOKS[look](optimizer, model, tmp_path / str(number))
        for parameter, shadow in zip(model.parameters(), averages.shadow, strict=True):
            assert torch.equal(parameter, shadow)
        averages.restore()
        assert_same(model, expected)
    train(model, optimizer)
    train(expected, oracle)
    assert_same(model, expected)
    if look == "save_checkpoint":  # as torch.save of the model at this time
        again = make_parameters(dtype)
        resumed = OffloadAdamW(again.parameters(), **OPTIONS)
        load_checkpoint(tmp_path / "2", model=again, optimizer=resumed)
        for parameter, value in zip(again.parameters(), shown, strict=True):
            assert torch.equal(parameter, value)


def test_averages_may_have_other_strides_and_follow_other_new_data(tmp_path: Path) -> None:
    model, expected = make_parameters(), make_parameters()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    oracle = OffloadAdamW(expected.parameters(), **OPTIONS)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        train(one, stepper)
        for parameter in one.parameters():
            parameter.data = parameter.data * 0.5
        train(one, stepper)
    averages = Averages(model)
    averages.shadow = [shadow.t().contiguous().t() for shadow in averages.shadow]
    averages.shadow[0] += 1
    averages.swap_in()
    save_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer)
    averages.restore()
    assert_same(model, expected)
    again = make_parameters()
    resumed = OffloadAdamW(again.parameters(), **OPTIONS)
    load_checkpoint(tmp_path / "saved", model=again, optimizer=resumed)
    for parameter, shadow, like in zip(again, averages.shadow, model, strict=True):
        assert torch.equal(parameter, shadow)
        assert torch.equal(resumed.state[parameter]["exp_avg"], optimizer.state[like]["exp_avg"])
    train(model, optimizer)
    train(expected, oracle)
    assert_same(model, expected)


def test_nothing_is_overwritten_while_averages_are_in(tmp_path: Path) -> None:
    model, expected = make_parameters(), make_parameters()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    oracle = OffloadAdamW(expected.parameters(), **OPTIONS)
    train(model, optimizer)
    train(expected, oracle)
    save_checkpoint(tmp_path / "before", model=model, optimizer=optimizer)
    averages = Averages(model)
    averages.swap_in()
    for call in (
        optimizer.step,
        lambda: begin_checkpoint(tmp_path / "during", model=model, optimizer=optimizer),
        lambda: load_checkpoint(tmp_path / "before", model=model, optimizer=optimizer),
    ):
        for parameter in model.parameters():
            parameter.grad = torch.ones(4, 4)
        with pytest.raises(ParameterReplacedError, match=r"data from before are still in use"):
            call()
        optimizer.zero_grad()
    averages.restore()
    assert_same(model, expected)
    assert not (tmp_path / "during").exists()
    train(model, optimizer)
    train(expected, oracle)
    assert_same(model, expected)


def test_a_checkpoint_in_the_background_outlasts_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write_bucket = Save.write_bucket

    def write_later(self: Save, *arguments: Any) -> None:
        assert may_write.wait(60)
        write_bucket(self, *arguments)

    monkeypatch.setattr(Save, "write_bucket", write_later)
    model, expected = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    train(model, optimizer)
    train(expected, OffloadAdamW(expected.parameters(), **OPTIONS))
    averages = Averages(model)
    averages.shadow[0] += 1
    pending = begin_checkpoint(tmp_path / "saved", model=model, optimizer=optimizer)
    averages.swap_in()
    threading.Timer(0.2, may_write.set).start()
    optimizer.load_state_dict(optimizer.full_state_dict())  # waits until it is written
    averages.restore()
    pending.wait()
    again = make_parameters(torch.bfloat16)
    load_checkpoint(
        tmp_path / "saved",
        model=again,
        optimizer=OffloadAdamW(again.parameters(), **OPTIONS),
    )
    assert_same(again, expected)


def exchange(model: torch.nn.ParameterList) -> None:
    model[0].data, model[1].data = model[1].data, model[0].data


def rotate(model: torch.nn.ParameterList) -> None:
    model[0].data, model[1].data, model[2].data = model[1].data, model[2].data, model[0].data


def transpose(model: torch.nn.ParameterList) -> None:
    for parameter in model:
        parameter.data = parameter.data.t()


CHANGES = {"exchange": exchange, "rotate": rotate, "transpose": transpose}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_views_of_parameters_as_new_data_are_trained_as_by_torch(
    change: str, before: int, streams: bool
) -> None:
    model, expected = make_parameters(), make_parameters().double()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS, module=model if streams else None)
    oracle = torch.optim.AdamW(expected.parameters(), **OPTIONS, foreach=False)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        train(one, stepper, before)
        CHANGES[change](one)
        train(one, stepper)
    assert_close(model, expected)
    states = [list(one.state_dict()["state"].values()) for one in (optimizer, oracle)]
    for ours, theirs in zip(*states, strict=True):
        assert (ours["exp_avg"] - theirs["exp_avg"]).abs().max() < 1e-5


def test_new_data_are_copied() -> None:
    model, expected = make_parameters(), make_parameters().double()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    oracle = torch.optim.AdamW(expected.parameters(), **OPTIONS, foreach=False)
    given = torch.ones(4, 4)
    for one, stepper, data in ((model, optimizer, given), (expected, oracle, given.double())):
        one[1].data = data
        train(one, stepper)
    assert_close(model, expected)
    assert torch.equal(given, torch.ones(4, 4))


def test_other_views_of_the_same_memory_are_rejected_after_the_first_step() -> None:
    model = make_parameters()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    train(model, optimizer, 1)
    for data, shape in ((model[1].data.view(2, 8), "2, 8"), (model[1].data[:2], "2, 4")):
        before, model[1].data = model[1].data, data
        model[0].grad = torch.ones(4, 4)
        with pytest.raises(ParameterReplacedError, match=rf"\[{shape}\] on cpu by now"):
            optimizer.step()
        model[1].data = before
    train(model, optimizer, 1)


@pytest.mark.parametrize("before", [0, 1])
def test_parameters_that_are_tied_later_are_rejected(before: int) -> None:
    model = make_parameters()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    train(model, optimizer, before)
    given = torch.zeros(4, 4)
    for data in (model[0].data, given):
        kept = [parameter.data for parameter in model]
        model[2].data = data
        if data is given:
            model[1].data = data
        model[2].grad = torch.ones(4, 4)
        with pytest.raises(ValueError, match=r"overlap in memory"):
            optimizer.step()
        for parameter, value in zip(model, kept, strict=True):
            parameter.data = value


@pytest.mark.parametrize("cast", [False, True])
def test_state_that_was_assigned_before_the_first_step_is_kept(cast: bool) -> None:
    model, expected = make_parameters(), make_parameters().double()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS)
    oracle = torch.optim.AdamW(expected.parameters(), **OPTIONS, foreach=False)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        for parameter in one.parameters():
            stepper.state[parameter]["step"] = torch.tensor(10.0)
            stepper.state[parameter]["exp_avg"] = torch.ones_like(parameter)
            stepper.state[parameter]["exp_avg_sq"] = torch.ones_like(parameter)
    if cast:
        model.to(torch.bfloat16)
        with torch.no_grad():
            for ours, theirs in zip(model, expected, strict=True):
                theirs.copy_(ours)
    for ours, theirs in zip(model, expected, strict=True):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
    optimizer.step()
    oracle.step()
    for ours, theirs in zip(model, expected, strict=True):
        entry = optimizer.state[ours]
        assert int(entry["step"]) == 11
        assert (entry["exp_avg"] - oracle.state[theirs]["exp_avg"]).abs().max() < 1e-6
        assert (entry.get("master_weight", ours) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("streams", [False, True])
def test_a_model_that_is_pruned_later_is_trained_as_by_torch(streams: bool) -> None:
    def make() -> torch.nn.Sequential:
        torch.manual_seed(2)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    model, expected = make(), make().double()
    optimizer = OffloadAdamW(model.parameters(), **OPTIONS, module=model if streams else None)
    oracle = torch.optim.AdamW(expected.parameters(), **OPTIONS, foreach=False)
    for one, stepper in ((model, optimizer), (expected, oracle)):
        for step in range(4):
            if step == 2:
                prune.l1_unstructured(one[0], "weight", amount=0.3)
            inputs = torch.ones(2, 4, dtype=next(one.parameters()).dtype)
            one(inputs).square().sum().backward()
            stepper.step()
            stepper.zero_grad()
    assert_close(model, expected)
    if streams:
        model[1].weight = torch.nn.Parameter(torch.zeros(4, 4))
        with pytest.raises(ParameterReplacedError, match=r"'1.weight'.*another object"):
            optimizer.step()
