"""Keep functions out of `torch.compile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_REASON = (
    "offload_adam updates parameters in threads and kernels of its own, which cannot be part of a "
    "graph. Leave fullgraph=True out, or compile the model alone."
)


def never_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function uncompiled in `torch.compile`, which cannot trace threads and collectives.

    Compiled code that calls the function consists of the graphs before and after this call. With
    `fullgraph=True`, torch raises an error that quotes `_REASON`.
    """
    # At the first call, not at import: `torch.compiler.disable` imports the compiler, which takes
    # about as long as importing torch. By the first call, `torch.optim` has imported it anyway.
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=_REASON))
        return disabled[0](*args, **kwargs)

    return run
