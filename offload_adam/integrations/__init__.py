"""Train with the optimizers of this package in Trainer, Accelerate and Lightning.

OffloadAdamCallback   saves and loads the complete optimizer state in a Trainer    --> trainer
keep_state_sharded    the same in an Accelerator's save_state and load_state       --> accelerator
OffloadAdamStrategy   the same in Lightning, and streaming on several ranks        --> lightning
saved_apart           the state in a folder of its own, beside the tool's own file
missing               the error if a library is not installed, and how to install an extra

Tools save the `state_dict()` of rank 0, which lacks the state of the other ranks. The integrations
write each rank's state into the folder of the tool's checkpoint. The tool's own file of the
optimizer then only refers to that folder:

    checkpoint-500/
        model.safetensors            written by the tool
        optimizer.pt                 written by the tool: a reference
        offload_adam-<label>/        the state, as written by `save_optimizer_state`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_adam.integrations.accelerator import keep_state_sharded
    from offload_adam.integrations.lightning import OffloadAdamStrategy
    from offload_adam.integrations.trainer import OffloadAdamCallback

__all__ = ["OffloadAdamCallback", "OffloadAdamStrategy", "keep_state_sharded"]

_MODULE_OF = {
    "OffloadAdamCallback": "offload_adam.integrations.trainer",
    "OffloadAdamStrategy": "offload_adam.integrations.lightning",
    "keep_state_sharded": "offload_adam.integrations.accelerator",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: each needs a library that may not be installed."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
