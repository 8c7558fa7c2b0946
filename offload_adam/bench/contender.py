"""What every measured piece of work is to the benchmark, and the AdamW that all of them compute."""

from __future__ import annotations

from typing import Protocol

from offload_adam.kernels.scalars import Hyperparameters

ADAMW = Hyperparameters(
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    nesterov=False,
    maximize=False,
)
MAX_GRAD_NORM = 1.0


class Contender(Protocol):
    """One implementation of the work that is measured; `run` does it once, on its own data.

    name: as it stands in the table and in the JSON.
    memory: what kind of memory its data lies in.
    bytes_per_param: memory traffic that its passes cannot avoid, each stream read and written once.
    """

    name: str
    memory: str
    bytes_per_param: int

    def run(self) -> None:
        """Do the work once."""
        ...
