"""Keep methods out of `torch.compile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def never_compiled(method: Callable[P, R]) -> Callable[P, R]:
    """Run a method uncompiled in `torch.compile`, which cannot trace threads and collectives."""
    # At the first call, not at import: `torch.compiler.disable` imports the compiler, which takes
    # about as long as importing torch. By the first call, `torch.optim` has imported it anyway.
    disabled: list[Callable[P, R]] = []

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return run
