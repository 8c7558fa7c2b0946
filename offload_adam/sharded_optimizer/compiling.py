"""Methods that `torch.compile` leaves as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def never_compiled(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method as it is within `torch.compile`, which cannot follow threads and collectives.

    `torch.compiler.disable` as a decorator would import the compiler together with this package,
    which takes about as long as torch itself; by the first call `torch.optim` has imported it.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return run
