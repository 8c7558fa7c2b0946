"""Learning rates and weight decays: a fixed number, or a value that changes with the step."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from offload_adam.options import is_number
from offload_adam.printable import show
from offload_adam.schedules import BuiltInSchedule, schedule_from_state

MAX_NUM_VALUES = 10_000_000
"""Maximum number of values of a learning rate that is given as one value per step: 80 MB.

So an endless generator raises an error instead of filling the memory.
"""


class ValueVector:
    """A learning rate given as one value per step. A step after the last value raises an error.

    Args:
        values: (n,) float64.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return self.values.numel()

    def __call__(self, step: int) -> float:
        if step >= len(self):
            raise ValueError(
                f"learning_rate has {len(self)} values, one per step, so there is none for step "
                f"{step} (counted from 0). Pass a value for every step, or a schedule."
            )
        return float(self.values[step])


class Dynamic:
    """A hyperparameter that is a function of the 0-based step.

    Args:
        name: the argument's name, for error messages.
        function: called several times for one step, for example by `get_lr`, so it must return the
            same value each time.
    """

    def __init__(self, name: str, function: Callable[[int], Any]) -> None:
        self.name = name
        self.function = function

    def at(self, step: int) -> float:
        """Return the value for a step.

        Raises:
            TypeError: the function did not return a number.
            ValueError: it returned a negative or non-finite number, or has no value for this step.
        """
        value = self.function(step)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        return check_amount(f"{self.name} at step {step}", value)

    @property
    def num_values(self) -> int | None:
        """Number of steps that have a value. None if every step has one."""
        return len(self.function) if isinstance(self.function, ValueVector) else None

    def shown_at(self, step: int) -> float:
        """Return the value for a step. After the end of a list of values, return the last one."""
        return self.at(step if self.num_values is None else min(step, self.num_values - 1))

    def to_state(self) -> dict[str, Any]:
        """Return plain values from which `load_dynamic` restores this hyperparameter."""
        if isinstance(self.function, ValueVector):
            return {"values": self.function.values}
        if isinstance(self.function, BuiltInSchedule):
            return {"schedule": self.function.to_state()}
        if hasattr(self.function, "state_dict"):
            return {"callable": self.function.state_dict()}
        return {"callable": None}


def load_dynamic(
    name: str, saved: Mapping[str, Any] | None, present: Dynamic | None
) -> tuple[Dynamic | None, Callable[[], object]]:
    """Return the hyperparameter as saved, and a function that loads its callable's own state.

    Args:
        name: the hyperparameter's name, for error messages.
        saved: from `to_state`, or None if the hyperparameter was a fixed number.
        present: the hyperparameter of the loading optimizer. A callable of the user is taken from
            here, because a state dict cannot hold the callable.

    Raises:
        ValueError: a callable of the user was saved, but `present` is not one.
    """
    if saved is None:
        return None, _nothing
    if "values" in saved:
        return Dynamic(
            name,
            ValueVector(
                torch.as_tensor(saved["values"], dtype=torch.float64, device="cpu").clone()
            ),
        ), _nothing
    if "schedule" in saved:
        return Dynamic(name, schedule_from_state(saved["schedule"])), _nothing
    if present is None or isinstance(present.function, (ValueVector, BuiltInSchedule)):
        raise ValueError(
            f"The saved {name} was a callable of your own, which a state dict cannot hold. "
            "Construct the optimizer with this callable, then load."
        )
    if saved["callable"] is None:
        return present, _nothing
    function: Any = present.function
    if not hasattr(function, "load_state_dict"):
        raise ValueError(
            f"The saved {name} has state, but {show(function)} has no load_state_dict(). Construct "
            "the optimizer with the same callable as when it was saved."
        )
    return present, lambda: function.load_state_dict(saved["callable"])


def read_learning_rate(name: str, value: object) -> float | Dynamic:
    """Read a learning rate: a number, one value per step, or a callable of the 0-based step.

    Raises:
        TypeError, ValueError: the message names the argument and the allowed values.
    """
    if isinstance(value, torch.Tensor):
        return _read_tensor(name, value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if callable(value):
        return Dynamic(name, value)
    if is_number(value):
        return check_amount(name, value)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, set, frozenset)):
        return Dynamic(name, _read_values(name, value))
    raise TypeError(
        f"{name} must be a number, a tensor, an iterable with one number per step, or a callable "
        f"of the step, not {show(value)}"
    )


def read_weight_decay(name: str, value: object) -> float | Dynamic:
    """Read a weight decay: a number, or a callable of the 0-based step.

    Raises:
        TypeError, ValueError: the message names the argument and the allowed values.
    """
    if callable(value) and not isinstance(value, torch.Tensor):
        return Dynamic(name, value)
    if not is_number(value):
        raise TypeError(f"{name} must be a number or a callable of the step, not {show(value)}")
    return check_amount(name, value)


def check_amount(name: str, value: Any) -> float:
    """Check for a finite number of at least 0, and return it as a float.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, not {show(value)}")
    # An int or a Fraction may be too large for a float: compare it unconverted.
    number: Any = value if isinstance(value, numbers.Rational) else float(value)
    if not 0.0 <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and at least 0, not {show(value)}")
    return float(number)


def _read_tensor(name: str, value: torch.Tensor) -> float | Dynamic:
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must hold numbers, not {value.dtype}")
    if value.dim() > 1:
        raise ValueError(
            f"{name} must be a tensor of 0 or 1 dimensions, not of shape {tuple(value.shape)}"
        )
    if value.dim() == 0:
        return check_amount(name, value.item())
    return Dynamic(name, _vector(name, value.detach().to("cpu", torch.float64, copy=True)))


def _read_values(name: str, values: Iterable[object]) -> ValueVector:
    """Read all values of an iterable, which may be a generator."""
    numbers_: list[float] = []
    for position, value in enumerate(values):
        if position == MAX_NUM_VALUES:
            raise ValueError(
                f"{name} has more than {MAX_NUM_VALUES} values. Pass a callable of the step."
            )
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        numbers_.append(check_amount(f"{name}[{position}]", value))
    return _vector(name, torch.tensor(numbers_, dtype=torch.float64, device="cpu"))


def _vector(name: str, values: torch.Tensor) -> ValueVector:
    if values.numel() == 0:
        raise ValueError(f"{name} has no values. Pass one for every step.")
    if values.numel() > MAX_NUM_VALUES:
        raise ValueError(
            f"{name} has more than {MAX_NUM_VALUES} values. Pass a callable of the step."
        )
    bad = torch.nonzero(~(torch.isfinite(values) & (values >= 0))).flatten()
    if bad.numel() > 0:
        position = int(bad[0])
        check_amount(f"{name}[{position}]", float(values[position]))  # raises an error
    return ValueVector(values)


def _nothing() -> None:
    """Load nothing: the hyperparameter has no state besides the one that was already restored."""
