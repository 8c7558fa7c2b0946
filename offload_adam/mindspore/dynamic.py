"""Learning rates and weight decays: fixed numbers, or values that change with the step."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from offload_adam.schedules import BuiltInSchedule, schedule_from_state

MAX_NUM_VALUES = 10_000_000
"""A learning rate that is given as an iterable is read at once, up to this many values."""


class ValueVector:
    """One learning rate a step, read once; a step beyond its end is an error.

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
                f"learning_rate was given as {len(self)} values, and step {step} (counted from 0) "
                "needs another: give one value for every step, or a schedule"
            )
        return float(self.values[step])


class Dynamic:
    """A hyperparameter that is a function of the 0-based step.

    Args:
        name: the argument, for messages.
        function: called for every step, and again when it is read.
    """

    def __init__(self, name: str, function: Callable[[int], Any]) -> None:
        self.name = name
        self.function = function

    def at(self, step: int) -> float:
        """Return the value for a step.

        Raises:
            TypeError: the function returned no number.
            ValueError: it returned a negative number or one that is not finite, or has run out.
        """
        value = self.function(step)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        return check_amount(f"{self.name} at step {step}", value)

    @property
    def num_values(self) -> int | None:
        """How many steps there are values for, None without end."""
        return len(self.function) if isinstance(self.function, ValueVector) else None

    def shown_at(self, step: int) -> float:
        """Return the value for a step, or the last one there is."""
        return self.at(step if self.num_values is None else min(step, self.num_values - 1))

    def to_state(self) -> dict[str, Any]:
        """Return what `with_state` needs to go on from here."""
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
    """Return a saved hyperparameter's function, and what loads its own state.

    Args:
        saved: what `to_state` returned, None for a fixed number.
        present: the loading optimizer's, which is kept where it is the user's own callable.

    Raises:
        ValueError: the saved one was the user's own callable, and `present` is not.
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
            f"the saved {name} was a callable of your own, which a saved state cannot hold: make "
            "the optimizer with it, then load"
        )
    if saved["callable"] is None:
        return present, _nothing
    function: Any = present.function
    if not hasattr(function, "load_state_dict"):
        raise ValueError(f"the saved {name} has state, but {function!r} has no load_state_dict()")
    return present, lambda: function.load_state_dict(saved["callable"])


def read_learning_rate(name: str, value: object) -> float | Dynamic:
    """Read a learning rate: a number, one value a step, or a callable of the 0-based step.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if isinstance(value, torch.Tensor):
        return _read_tensor(name, value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if callable(value):
        return Dynamic(name, value)
    if _is_number(value):
        return check_amount(name, value)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, set, frozenset)):
        return Dynamic(name, _read_values(name, value))
    raise TypeError(
        f"{name} must be a number, a tensor, an iterable of one number a step, or a callable of "
        f"the step, not {value!r}"
    )


def read_weight_decay(name: str, value: object) -> float | Dynamic:
    """Read a weight decay: a number, or a callable of the 0-based step.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if callable(value) and not isinstance(value, torch.Tensor):
        return Dynamic(name, value)
    if not _is_number(value):
        raise TypeError(f"{name} must be a number or a callable of the step, not {value!r}")
    return check_amount(name, value)


def check_amount(name: str, value: Any) -> float:
    """Return a finite number of at least 0 as a float.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    # An integer or a fraction may be more than a float can hold; what else there is, is a float.
    number: Any = value if isinstance(value, numbers.Rational) else float(value)
    if not 0.0 <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and at least 0, not {value}")
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
    """Read an iterable, once and to its end."""
    numbers_: list[float] = []
    for position, value in enumerate(values):
        if position == MAX_NUM_VALUES:
            raise ValueError(
                f"{name} has more than {MAX_NUM_VALUES} values; give a callable of the step instead"
            )
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        numbers_.append(check_amount(f"{name}[{position}]", value))
    return _vector(name, torch.tensor(numbers_, dtype=torch.float64, device="cpu"))


def _vector(name: str, values: torch.Tensor) -> ValueVector:
    if values.numel() == 0:
        raise ValueError(f"{name} has no value: give one for every step")
    if values.numel() > MAX_NUM_VALUES:
        raise ValueError(f"{name} has more than {MAX_NUM_VALUES} values; give a callable instead")
    bad = torch.nonzero(~(torch.isfinite(values) & (values >= 0))).flatten()
    if bad.numel() > 0:
        position = int(bad[0])
        check_amount(f"{name}[{position}]", float(values[position]))
    return ValueVector(values)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _nothing() -> None:
    """Load nothing: a schedule is a function of the step alone."""
