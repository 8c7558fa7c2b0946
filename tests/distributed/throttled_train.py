"""The command line with one slow resource: `throttled_train.py WHAT[@RANK] profile CONFIG ...`.

Every use of it takes longer, where the package itself calls what uses it. The delays of a step are
long enough that a busy machine's forward and backward are still short beside them.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from offload_adam.cli.app import main
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.kernels import adam
from offload_adam.train import loop

USED_BY: dict[str, tuple[Any, str, float]] = {
    "forward": (loop, "next_token_loss", 0.15),
    "cpu": (adam, "update", 0.5),
    "copies": (torch.Tensor, "copy_", 0.05),
    "collectives": (RankGroup, "wait", 0.15),
}
"""What is called for each resource, and the seconds that a call takes longer."""


def slowed(function: Callable[..., Any], delay_s: float) -> Callable[..., Any]:
    """Return the function with the delay after it: ranks leave a slow collective together, too."""

    @functools.wraps(function)
    def slow(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        time.sleep(delay_s)
        return result

    return slow


if __name__ == "__main__":
    what, _, rank = sys.argv.pop(1).partition("@")
    owner, name, delay_s = USED_BY[what]
    if rank in ("", os.environ["RANK"]):
        setattr(owner, name, slowed(getattr(owner, name), delay_s))
    main()
