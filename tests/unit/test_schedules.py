"""The schedules against their formulas, worked by hand and in exact fractions where there are."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from offload_adam import schedules
from offload_adam.schedules import (
    BuiltInSchedule,
    CosineDecayLR,
    ExponentialDecayLR,
    InverseDecayLR,
    NaturalExpDecayLR,
    PolynomialDecayLR,
    WarmUpLR,
    schedule_from_state,
)

KNOWN: list[tuple[BuiltInSchedule, dict[int, float]]] = [
    (ExponentialDecayLR(0.1, 0.25, 2), {0: 0.1, 1: 0.05, 2: 0.025, 3: 0.0125}),
    (ExponentialDecayLR(0.1, 0.25, 2, True), {0: 0.1, 1: 0.1, 2: 0.025, 3: 0.025, 4: 0.00625}),
    (NaturalExpDecayLR(1.0, math.log(2), 3), {0: 1.0, 1: 0.5, 2: 0.25}),
    (NaturalExpDecayLR(1.0, math.log(2), 3, True), {0: 1.0, 2: 1.0, 3: 0.125, 5: 0.125, 6: 1 / 64}),
    (InverseDecayLR(1.0, 2.0, 4), {0: 1.0, 1: 2 / 3, 2: 0.5, 4: 1 / 3}),
    (InverseDecayLR(1.0, 2.0, 4, True), {0: 1.0, 3: 1.0, 4: 1 / 3, 7: 1 / 3, 8: 0.2}),
    (CosineDecayLR(0.1, 0.3, 4), {0: 0.3, 1: 0.2 + 0.1 * math.sqrt(0.5), 2: 0.2, 4: 0.1, 9: 0.1}),
    (PolynomialDecayLR(0.5, 0.1, 4, 2.0), {0: 0.5, 1: 0.325, 2: 0.2, 4: 0.1, 9: 0.1}),
    (PolynomialDecayLR(0.5, 0.1, 4, 1.0, True), {0: 0.5, 2: 0.3, 4: 0.1, 6: 0.2, 8: 0.1, 9: 0.2}),
    (WarmUpLR(0.4, 4), {0: 0.0, 1: 0.1, 3: 0.3, 4: 0.4, 100: 0.4}),
]


@pytest.mark.parametrize(("schedule", "values"), KNOWN, ids=str)
def test_known_values(schedule: BuiltInSchedule, values: dict[int, float]) -> None:
    for step, value in values.items():
        found = schedule(step)
        assert type(found) is float
        assert found == pytest.approx(value, rel=1e-12, abs=1e-15), step


def test_a_polynomial_in_exact_fractions() -> None:
    schedule = PolynomialDecayLR(0.75, 0.25, 7, 3.0, True)
    for step in range(40):
        span = 7 * max(math.ceil(Fraction(step, 7)), 1)
        left = 1 - Fraction(min(step, span), span)
        assert schedule(step) == pytest.approx(float(Fraction(1, 2) * left**3 + Fraction(1, 4)))


@pytest.mark.parametrize(("schedule", "values"), KNOWN, ids=str)
def test_a_schedule_is_saved_by_name_and_arguments(
    schedule: BuiltInSchedule, values: dict[int, float]
) -> None:
    state = json.loads(json.dumps(schedule.to_state()))
    assert schedule_from_state(state) == schedule


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("NoSuchLR", {}, ValueError, "no schedule 'NoSuchLR'"),
    ("WarmUpLR", {"learning_rate": 0.1}, TypeError, "warmup_steps"),
    ("WarmUpLR", {"learning_rate": 0.1, "steps": 3}, TypeError, "no argument 'steps'"),
    ("WarmUpLR", {"learning_rate": -0.1, "warmup_steps": 3}, ValueError, "learning_rate"),
    ("WarmUpLR", {"learning_rate": 10**400, "warmup_steps": 3}, ValueError, "learning_rate"),
    ("WarmUpLR", {"learning_rate": "x", "warmup_steps": 3}, TypeError, "learning_rate"),
    ("WarmUpLR", {"learning_rate": True, "warmup_steps": 3}, TypeError, "learning_rate"),
    ("WarmUpLR", {"learning_rate": 0.1, "warmup_steps": 0}, ValueError, "warmup_steps"),
    ("WarmUpLR", {"learning_rate": 0.1, "warmup_steps": 2.0}, TypeError, "warmup_steps"),
    ("CosineDecayLR", {"min_lr": 0.3, "max_lr": 0.1, "decay_steps": 3}, ValueError, "max_lr"),
    ("CosineDecayLR", {"min_lr": -0.1, "max_lr": 0.1, "decay_steps": 3}, ValueError, "min_lr"),
]
for _name in ("ExponentialDecayLR", "NaturalExpDecayLR", "InverseDecayLR"):
    _right = {"learning_rate": 0.1, "decay_rate": 0.5, "decay_steps": 3}
    WRONG += [
        (_name, {**_right, "learning_rate": 0.0}, ValueError, "learning_rate"),
        (_name, {**_right, "decay_rate": math.nan}, ValueError, "decay_rate"),
        (_name, {**_right, "decay_steps": -1}, ValueError, "decay_steps"),
        (_name, {**_right, "is_stair": 1}, TypeError, "is_stair"),
    ]
_polynomial = {"learning_rate": 0.1, "end_learning_rate": 0.0, "decay_steps": 3, "power": 1.0}
WRONG += [
    ("PolynomialDecayLR", {**_polynomial, "power": 0.0}, ValueError, "power"),
    (
        "PolynomialDecayLR",
        {**_polynomial, "end_learning_rate": -1},
        ValueError,
        "end_learning_rate",
    ),
    ("PolynomialDecayLR", {**_polynomial, "update_decay_steps": 0}, TypeError, "update_decay"),
    ("WarmUpLR", {}, TypeError, r"WarmUpLR needs the argument\(s\) learning_rate, warmup_steps"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "words"), WRONG)
def test_wrong_arguments_are_named(
    name: str, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        schedule_from_state({"name": name, **arguments})


def test_torchs_schedulers_take_and_save_them() -> None:
    def make() -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = WarmUpLR(0.4, 4)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    optimizer, scheduler = make()
    for expected in (0.0, 0.1, 0.2):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()
    other, resumed = make()
    resumed.load_state_dict(scheduler.state_dict())
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == pytest.approx(0.4)


def test_a_schedule_of_the_users_own() -> None:
    class Constant(schedules.LearningRateSchedule):
        def __call__(self, step: int) -> float:
            return 0.5

    assert Constant()(3) == 0.5
    with pytest.raises(TypeError):
        schedules.LearningRateSchedule()  # type: ignore[abstract]
