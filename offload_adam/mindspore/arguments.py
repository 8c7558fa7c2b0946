"""Checks of the scalar arguments of `Adam`. Each returns the value if it is valid."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from offload_adam.printable import show

_KWARGS = ("use_lazy", "use_offload")
_NAMES_IN_TORCH = {"lr": "learning_rate", "betas": "beta1 and beta2", "amsgrad": "use_amsgrad"}


def check_flag(name: str, value: object) -> bool:
    """Check that the value is a bool.

    Raises:
        TypeError: the message names the argument.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {show(value)}")
    return value


def check_beta(name: str, value: object) -> float:
    """Check for a float in the open interval (0.0, 1.0).

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if not isinstance(value, float):
        raise TypeError(f"{name} must be a float, not {show(value)}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie in the open interval (0.0, 1.0), not {value}")
    return float(value)  # np.float64 is a float, too


def check_eps(value: object) -> float:
    """Check for a finite float above 0.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if not isinstance(value, float):
        raise TypeError(f"eps must be a float, not {show(value)}")
    return _positive("eps", value)


def check_loss_scale(value: object) -> float:
    """Check for a finite number above 0, and return it as a float.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"loss_scale must be a number, not {show(value)}")
    return _positive("loss_scale", value)


def check_kwargs(kwargs: Mapping[str, object]) -> tuple[bool, bool]:
    """Return `use_lazy` and `use_offload`.

    Raises:
        KeyError: an unknown keyword.
        TypeError: a value is not a bool.
        ValueError: both are True.
    """
    for name in kwargs:
        if name not in _KWARGS:
            named = (
                f"It is called {_NAMES_IN_TORCH[name]} here"
                if name in _NAMES_IN_TORCH
                else "Besides its named arguments, it only accepts use_lazy and use_offload"
            )
            raise KeyError(
                f"Adam has no argument {name!r}. {named}. For the arguments of torch.optim.Adam, "
                "use OffloadAdam."
            )
    lazy = check_flag("use_lazy", kwargs.get("use_lazy", False))
    offload = check_flag("use_offload", kwargs.get("use_offload", False))
    if lazy and offload:
        raise ValueError(
            "use_lazy=True and use_offload=True exclude each other, because a lazy update needs "
            "the state of whole rows on the parameter's device. Pass only one of them."
        )
    return lazy, offload


def check_amsgrad(*, amsgrad: bool, lazy: bool, offload: bool) -> None:
    """Reject amsgrad together with `use_lazy` or `use_offload`.

    Raises:
        ValueError: the message names both arguments.
    """
    for name, given in (("use_lazy", lazy), ("use_offload", offload)):
        if amsgrad and given:
            raise ValueError(
                f"use_amsgrad=True and {name}=True exclude each other. Pass only one of them."
            )


def _positive(name: str, value: float) -> float:
    # Not math.isfinite, which raises OverflowError for an int that no float can hold.
    if not 0.0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and above 0, not {show(value)}")
    return float(value)
