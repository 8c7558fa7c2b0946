"""Learning rate schedules under MindSpore's names: callables of the 0-based step.

    Adam(parameters, learning_rate=CosineDecayLR(1e-5, 1e-3, 10_000))
    LambdaLR(OffloadAdam(parameters, lr=1.0), CosineDecayLR(1e-5, 1e-3, 10_000))

All arithmetic is in float64. Every schedule raises TypeError or ValueError for a wrong argument and
names the argument.

Source: the documentation of `mindspore.nn`'s learning rate schedules (MindSpore 2.10).
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from offload_adam.options import is_integer, is_number, plain
from offload_adam.printable import show


class LearningRateSchedule(ABC):
    """Base class of schedules. `Adam` and `LambdaLR` also accept any callable of the step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""


@dataclass(frozen=True)
class BuiltInSchedule(LearningRateSchedule):
    """A schedule that is fully described by its name and arguments, so that it can be saved."""

    def to_state(self) -> dict[str, Any]:
        """Return the name and the arguments as plain values, for `schedule_from_state`."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        numbers = {name: plain(value) for name, value in arguments.items() if is_number(value)}
        return {"name": type(self).__name__, **arguments, **numbers}


def schedule_from_state(state: Mapping[str, Any]) -> BuiltInSchedule:
    """Construct a schedule from its name and arguments.

    Args:
        state: from `to_state`: the key "name" and the arguments.

    Raises:
        TypeError: an argument is missing, unknown or of a wrong type.
        ValueError: the name is unknown, or an argument is out of range.
    """
    arguments = dict(state)
    name = arguments.pop("name", None)
    schedule = _BY_NAME.get(name) if isinstance(name, str) else None
    if schedule is None:
        raise ValueError(f"There is no schedule {name!r}. Use one of {', '.join(_BY_NAME)}.")
    known = [field.name for field in fields(schedule)]
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise TypeError(f"{name} has no argument {unknown[0]!r}. It has {', '.join(known)}.")
    required = [field.name for field in fields(schedule) if field.default is MISSING]
    missing = [argument for argument in required if argument not in arguments]
    if missing:
        raise TypeError(f"{name} needs the argument(s) {', '.join(missing)}.")
    try:
        return schedule(**arguments)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


@dataclass(frozen=True)
class ExponentialDecayLR(BuiltInSchedule):
    """`learning_rate * decay_rate ** (step / decay_steps)`.

    Args:
        learning_rate: above 0.
        decay_rate: above 0.
        decay_steps: above 0.
        is_stair: round the exponent down, so that the rate drops every `decay_steps` steps.
    """

    learning_rate: float
    decay_rate: float
    decay_steps: int
    is_stair: bool = False

    def __post_init__(self) -> None:
        _check_decay(self.learning_rate, self.decay_rate, self.decay_steps, self.is_stair)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        elapsed = step // self.decay_steps if self.is_stair else step / self.decay_steps
        return float(self.learning_rate * self.decay_rate**elapsed)


@dataclass(frozen=True)
class NaturalExpDecayLR(BuiltInSchedule):
    """`learning_rate * exp(-decay_rate * step)`.

    Args:
        learning_rate: above 0.
        decay_rate: above 0.
        decay_steps: above 0, used only with `is_stair`.
        is_stair: round `step` down to a multiple of `decay_steps`.
    """

    learning_rate: float
    decay_rate: float
    decay_steps: int
    is_stair: bool = False

    def __post_init__(self) -> None:
        _check_decay(self.learning_rate, self.decay_rate, self.decay_steps, self.is_stair)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        elapsed = step // self.decay_steps * self.decay_steps if self.is_stair else step
        return self.learning_rate * math.exp(-self.decay_rate * elapsed)


@dataclass(frozen=True)
class InverseDecayLR(BuiltInSchedule):
    """`learning_rate / (1 + decay_rate * step / decay_steps)`.

    Args:
        learning_rate: above 0.
        decay_rate: above 0.
        decay_steps: above 0.
        is_stair: round `step / decay_steps` down.
    """

    learning_rate: float
    decay_rate: float
    decay_steps: int
    is_stair: bool = False

    def __post_init__(self) -> None:
        _check_decay(self.learning_rate, self.decay_rate, self.decay_steps, self.is_stair)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        elapsed = step // self.decay_steps if self.is_stair else step / self.decay_steps
        return self.learning_rate / (1.0 + self.decay_rate * elapsed)


@dataclass(frozen=True)
class CosineDecayLR(BuiltInSchedule):
    """Half a cosine from `max_lr` down to `min_lr` over `decay_steps` steps, then `min_lr`.

    Args:
        min_lr: at least 0. The rate from step `decay_steps` on.
        max_lr: above `min_lr`. The rate of step 0.
        decay_steps: above 0.
    """

    min_lr: float
    max_lr: float
    decay_steps: int

    def __post_init__(self) -> None:
        _check_number("min_lr", self.min_lr, zero=True)
        _check_number("max_lr", self.max_lr)
        _check_steps("decay_steps", self.decay_steps)
        if self.max_lr <= self.min_lr:
            raise ValueError(f"max_lr must be above min_lr ({self.min_lr}), not {self.max_lr}")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        done = min(step, self.decay_steps) / self.decay_steps
        return self.min_lr + (self.max_lr - self.min_lr) / 2.0 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class PolynomialDecayLR(BuiltInSchedule):
    """`(learning_rate - end) * (1 - step / decay_steps) ** power + end` for `decay_steps` steps.

    Args:
        learning_rate: above 0.
        end_learning_rate: at least 0, `end` in the formula. The rate from step `decay_steps` on.
        decay_steps: above 0.
        power: above 0.
        update_decay_steps: after `decay_steps` steps, do not stay at `end`. Instead, replace
            `decay_steps` in the formula by its smallest multiple that is at least `step`, so that
            the rate jumps up after each multiple and decays to `end` again.
    """

    learning_rate: float
    end_learning_rate: float
    decay_steps: int
    power: float
    update_decay_steps: bool = False

    def __post_init__(self) -> None:
        _check_number("learning_rate", self.learning_rate)
        _check_number("end_learning_rate", self.end_learning_rate, zero=True)
        _check_steps("decay_steps", self.decay_steps)
        _check_number("power", self.power)
        _check_flag("update_decay_steps", self.update_decay_steps)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        decay_steps = self.decay_steps
        if self.update_decay_steps:
            decay_steps *= max(-(-step // decay_steps), 1)
        left = 1.0 - min(step, decay_steps) / decay_steps
        span = self.learning_rate - self.end_learning_rate
        return float(span * left**self.power + self.end_learning_rate)


@dataclass(frozen=True)
class WarmUpLR(BuiltInSchedule):
    """Linear from 0 at step 0 to `learning_rate` at step `warmup_steps`, then constant.

    Args:
        learning_rate: at least 0.
        warmup_steps: above 0.
    """

    learning_rate: float
    warmup_steps: int

    def __post_init__(self) -> None:
        _check_number("learning_rate", self.learning_rate, zero=True)
        _check_steps("warmup_steps", self.warmup_steps)

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        return self.learning_rate * min(step, self.warmup_steps) / self.warmup_steps


_BY_NAME: dict[str, type[BuiltInSchedule]] = {
    schedule.__name__: schedule
    for schedule in (
        ExponentialDecayLR,
        NaturalExpDecayLR,
        InverseDecayLR,
        CosineDecayLR,
        PolynomialDecayLR,
        WarmUpLR,
    )
}


def _check_decay(learning_rate: float, decay_rate: float, decay_steps: int, is_stair: bool) -> None:
    _check_number("learning_rate", learning_rate)
    _check_number("decay_rate", decay_rate)
    _check_steps("decay_steps", decay_steps)
    _check_flag("is_stair", is_stair)


def _check_number(name: str, value: float, *, zero: bool = False) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, not {show(value)}")
    # Not math.isfinite, which raises OverflowError for an int that no float can hold. NumPy would
    # convert the bound to its own dtype, where it overflows.
    number = plain(value)
    if not 0 <= number <= sys.float_info.max or (number == 0 and not zero):
        least = "at least" if zero else "above"
        raise ValueError(f"{name} must be finite and {least} 0, not {show(value)}")


def _check_steps(name: str, value: int) -> None:
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, not {show(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {show(value)}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {show(value)}")
