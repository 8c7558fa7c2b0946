"""Metrics to Weights & Biases, with the account and mode of the user's environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_adam.sinks.sink import Record, numbers_of, require_extra


class WandbSink:
    """Logs each number of a record at its step.

    Owns: a wandb run. Wandb's own settings (such as `WANDB_MODE=offline`) decide what is sent.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        require_extra("wandb_project")
        import wandb

        self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config))

    def write(self, record: Record) -> None:
        """Log one record."""
        numbers = numbers_of(record)
        del numbers["step"]
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()
