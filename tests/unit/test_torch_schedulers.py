"""Every scheduler of torch, SWA and EMA, each compared with torch's plain Adam or AdamW."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from tests.support.torch_cases import PAIRS, Affine, assert_equal, make_pair

NUM_STEPS = 12

pytestmark = pytest.mark.parametrize("name", PAIRS)


def halve(count: int) -> float:
    return 0.5**count


def shrink(_: int) -> float:
    return 0.9


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda made: lr_scheduler.LambdaLR(made, halve),
    "MultiplicativeLR": lambda made: lr_scheduler.MultiplicativeLR(made, shrink),
    "StepLR": lambda made: lr_scheduler.StepLR(made, 3, 0.5),
    "MultiStepLR": lambda made: lr_scheduler.MultiStepLR(made, [2, 5, 9], 0.5),
    "ConstantLR": lambda made: lr_scheduler.ConstantLR(made, 0.5, 4),
    "LinearLR": lambda made: lr_scheduler.LinearLR(made, 0.25, 1.0, 8),
    "ExponentialLR": lambda made: lr_scheduler.ExponentialLR(made, 0.9),
    "SequentialLR": lambda made: lr_scheduler.SequentialLR(
        made,
        [lr_scheduler.LinearLR(made, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(made, 8)],
        [4],
    ),
    "CosineAnnealingLR": lambda made: lr_scheduler.CosineAnnealingLR(made, 7, 1e-3),
    "ChainedScheduler": lambda made: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(made, 0.1, 2), lr_scheduler.ExponentialLR(made, 0.9)]
    ),
    "ReduceLROnPlateau": lambda made: lr_scheduler.ReduceLROnPlateau(
        made, "max", patience=1, factor=0.5
    ),
    # These two change betas as well.
    "CyclicLR": lambda made: lr_scheduler.CyclicLR(made, 1e-3, 1e-2, 3, cycle_momentum=True),
    "OneCycleLR": lambda made: lr_scheduler.OneCycleLR(made, [1e-2, 2e-2], total_steps=30),
    "CosineAnnealingWarmRestarts": lambda made: lr_scheduler.CosineAnnealingWarmRestarts(made, 5),
    "PolynomialLR": lambda made: lr_scheduler.PolynomialLR(made, 10, 2.0),
    "SWALR": lambda made: swa_utils.SWALR(made, 1e-3, anneal_epochs=4),
}


OF_TORCH = {"foreach", "fused", "capturable", "differentiable"}
"""Options in torch's groups that choose an implementation."""


def groups_of(model: Affine, *, tensor_lr: bool = False) -> list[dict[str, Any]]:
    rates = [0.01, 0.02]
    return [
        {"params": [parameter], "lr": torch.tensor(rate) if tensor_lr else rate}
        for parameter, rate in zip(model.parameters, rates, strict=True)
    ]


def advance(model: Affine, optimizer: torch.optim.Optimizer, schedule: Any, num: int) -> None:
    takes_loss = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
    for _ in range(num):
        loss: Any = optimizer.step(model.closure_of(optimizer))
        schedule.step(*([loss.detach()] if takes_loss else []))


def test_every_scheduler_of_torch_is_here(name: str) -> None:
    known = {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}
    assert known == {*SCHEDULERS}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedules_act_as_on_torchs_optimizer(name: str, kind: str, tensor_lr: bool) -> None:
    ours, theirs = Affine(), Affine()
    groups = [groups_of(model, tensor_lr=tensor_lr) for model in (ours, theirs)]
    optimizer, reference = make_pair(name, *groups)
    caught = []
    schedules = []
    for made in (optimizer, reference):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            schedules.append(SCHEDULERS[kind](made))
        caught.append([str(warning.message) for warning in seen])
    assert caught[0] == caught[1]
    for _ in range(NUM_STEPS):
        advance(ours, optimizer, schedules[0], 1)
        advance(theirs, reference, schedules[1], 1)
        for our, their in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert our.keys() - OF_TORCH - {"nesterov"} == their.keys() - OF_TORCH
            assert our["lr"] == their["lr"]
            assert our["betas"] == their["betas"]
        assert_equal(ours.parameters, theirs.parameters)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, torch.Tensor) is tensor_lr for rate in rates)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_resumed_schedule_goes_on_to_the_same_bits(name: str, kind: str) -> None:
    whole = Affine()
    optimizer = PAIRS[name](groups_of(whole))
    advance(whole, optimizer, SCHEDULERS[kind](optimizer), NUM_STEPS)

    half = Affine()
    first = PAIRS[name](groups_of(half))
    schedule = SCHEDULERS[kind](first)
    advance(half, first, schedule, NUM_STEPS // 2)
    saved = saved_and_loaded([first.state_dict(), schedule.state_dict()])
    first.close()
    second = PAIRS[name](groups_of(half))
    schedule = SCHEDULERS[kind](second)
    for made, state in zip((second, schedule), saved, strict=True):
        made.load_state_dict(state)
    advance(half, second, schedule, NUM_STEPS // 2)

    assert_equal(half.parameters, whole.parameters, rtol=0, atol=0)
    assert [group["lr"] for group in second.param_groups] == [
        group["lr"] for group in optimizer.param_groups
    ]


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_schedule_notices_which_step_came_first(name: str) -> None:
    """As with torch's optimizers, it warns if its own step comes before the optimizer's."""
    for early in (True, False):
        model = Affine()
        optimizer = PAIRS[name](model.parameters)
        schedule = lr_scheduler.StepLR(optimizer, 1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if not early:
                optimizer.step(model.closure_of(optimizer))
            schedule.step()
        assert ["before `optimizer.step()`" in str(warning.message) for warning in seen] == [
            True
        ] * early


AVERAGES: dict[str, dict[str, Any]] = {
    "swa": {},
    "swa_multi": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.8)},
    "ema_multi": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8), "use_buffers": True},
}
MODES: dict[str, dict[str, Any]] = {
    "drop_in": {},
    "streaming": {"overlap": False},
    "overlapped": {"overlap": True},
}


def make_network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    # No bias before the normalization, which would get a gradient of nothing but rounding errors.
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6, bias=False),
        torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 2),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_weights_are_torchs(name: str, average: str, mode: str) -> None:
    """With `swa_utils`: an averaged model, its own learning rate, its batch statistics."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 4, generator=generator) for _ in range(6)]
    ours, theirs = make_network(), make_network()
    options = MODES[mode] and {"module": ours, **MODES[mode]}
    optimizer = PAIRS[name](ours.parameters(), lr=1e-2, **options)
    reference = getattr(torch.optim, name)(theirs.parameters(), lr=1e-2, foreach=False)
    averaged = []
    for network, made in ((ours, optimizer), (theirs, reference)):
        mean = swa_utils.AveragedModel(network, **AVERAGES[average])
        schedule = swa_utils.SWALR(made, 1e-3, anneal_epochs=3)
        for batch in batches:
            network(batch).pow(2).sum().backward()
            made.step()
            made.zero_grad()
            schedule.step()
            if made is optimizer:
                optimizer.synchronize()  # the average reads parameters outside of a forward
            mean.update_parameters(network)
        swa_utils.update_bn(batches, mean)
        averaged.append(mean)
    mine, other = (mean.state_dict() for mean in averaged)
    assert mine.keys() == other.keys()
    assert_equal([*mine.values()], [*other.values()], rtol=1e-5, atol=1e-5)
    assert_equal([averaged[0](batches[0])], [averaged[1](batches[0])], rtol=1e-5, atol=1e-5)
    # The averaged model is independent: its gradients stay in `.grad`, and training goes on.
    averaged[0](batches[0]).sum().backward()
    before = [parameter.detach().clone() for parameter in averaged[0].parameters()]
    ours(batches[0]).sum().backward()
    optimizer.step()
    optimizer.close()
    assert_equal(averaged[0].parameters(), before, rtol=0, atol=0)
    assert all(type(parameter.grad) is torch.Tensor for parameter in averaged[0].parameters())
