"""The command line, killed once: `python -m tests.support.killed_train RANK PLACE STEP train ...`.

The rank gets SIGKILL in the first attempt, at PLACE of STEP: `decided`, when it has recorded the
step's decision and has updated nothing; or `recorded`, when the step's line is in metrics.jsonl.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from torch import nn

from offload_adam.cli.app import main
from offload_adam.step.kept_steps import KeptSteps
from offload_adam.train.saving import CheckpointSaver


def make_model() -> nn.Module:
    """Return a model with dropout, which shows whether random states are restored."""
    return nn.Sequential(nn.Embedding(256, 16), nn.Dropout(0.2), nn.Linear(16, 256))


def kill_after(kind: type, name: str, num_calls: int) -> None:
    """Let the process kill itself after this many calls of a method."""
    method, count = getattr(kind, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = method(*args, **kwargs)
        count += 1
        if count == num_calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, call)


if __name__ == "__main__":
    _, rank, place, step, *arguments = sys.argv
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if is_first and os.environ.get("RANK", "0") == rank:
        if place == "decided":
            kill_after(KeptSteps, "decide", int(step))
        else:
            kill_after(CheckpointSaver, "commit_written", int(step))
    sys.argv = [sys.argv[0], *arguments]
    main()
