"""Metrics to Weights & Biases, with the account and mode of the user's own environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_adam.errors import MissingExtraError
from offload_adam.sinks.sink import Record, numbers_of


class WandbSink:
    """Logs each number of a record at its step.

    Owns: a wandb run. What it sends where is wandb's own configuration (`WANDB_MODE=offline` and
    the like).

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "observe.wandb_project needs wandb: pip install 'offload-adam[wandb]'"
            ) from error
        self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config))

    def write(self, record: Record) -> None:
        """Take one record."""
        numbers = numbers_of(record)
        del numbers["step"]
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
