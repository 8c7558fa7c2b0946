"""Metrics as TensorBoard event files, and to Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_adam.sinks.sink import Record, numbers_of


class TensorBoardSink:
    """Writes each number of a record as a scalar of its step.

    Owns: an event file in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        """Write one record and flush the file."""
        for name, number in numbers_of(record).items():
            if name != "step":
                self._writer.add_scalar(name, number, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """Logs each number of a record at its step.

    Owns: a wandb run. Wandb's own settings (such as `WANDB_MODE=offline`) decide what is sent, and
    to which account.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
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
