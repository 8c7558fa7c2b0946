"""Adam and AdamW for models whose optimizer state does not fit on a GPU.

The state is stored in host memory and sharded over the ranks. The update is fp32 Adam, without
approximations.

    optimizer = OffloadAdamW(model.parameters(), lr=3e-4, module=model)

OffloadAdam, OffloadAdamW                            with the arguments of torch.optim; start here
Adam                                                 with the arguments of mindspore.nn.Adam
OffloadPolicy, FailurePolicy                         their options for memory and for failed ranks
save_checkpoint, begin_checkpoint, load_checkpoint   checkpoints of model and optimizer

Schedules of the learning rate under MindSpore's names are in `offload_adam.schedules`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offload_adam.version import __version__

if TYPE_CHECKING:
    from offload_adam.checkpoint.background import PendingCheckpoint, begin_checkpoint
    from offload_adam.checkpoint.load import load_checkpoint
    from offload_adam.checkpoint.save import save_checkpoint
    from offload_adam.errors import (
        CheckpointError,
        HostMemoryError,
        ParameterReplacedError,
        PeerError,
        PeerFailedError,
        RankDisagreementError,
        UnreadyParameterError,
    )
    from offload_adam.mindspore.adam import Adam
    from offload_adam.optimizer import OffloadAdam, OffloadAdamW
    from offload_adam.options import FailurePolicy, OffloadPolicy
    from offload_adam.step.messages import StepReport

__all__ = [
    "Adam",
    "CheckpointError",
    "FailurePolicy",
    "HostMemoryError",
    "OffloadAdam",
    "OffloadAdamW",
    "OffloadPolicy",
    "ParameterReplacedError",
    "PeerError",
    "PeerFailedError",
    "PendingCheckpoint",
    "RankDisagreementError",
    "StepReport",
    "UnreadyParameterError",
    "__version__",
    "begin_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]

_MODULE_OF = {
    "CheckpointError": "offload_adam.errors",
    "PendingCheckpoint": "offload_adam.checkpoint.background",
    "begin_checkpoint": "offload_adam.checkpoint.background",
    "load_checkpoint": "offload_adam.checkpoint.load",
    "save_checkpoint": "offload_adam.checkpoint.save",
    "Adam": "offload_adam.mindspore.adam",
    "HostMemoryError": "offload_adam.errors",
    "OffloadAdam": "offload_adam.optimizer",
    "OffloadAdamW": "offload_adam.optimizer",
    "OffloadPolicy": "offload_adam.options",
    "FailurePolicy": "offload_adam.options",
    "ParameterReplacedError": "offload_adam.errors",
    "PeerError": "offload_adam.errors",
    "PeerFailedError": "offload_adam.errors",
    "RankDisagreementError": "offload_adam.errors",
    "StepReport": "offload_adam.step.messages",
    "UnreadyParameterError": "offload_adam.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line can start without torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
