"""Metrics as TensorBoard event files."""

from __future__ import annotations

from pathlib import Path

from offload_adam.errors import MissingExtraError
from offload_adam.sinks.sink import Record, numbers_of


class TensorBoardSink:
    """Writes each number of a record as a scalar at its step.

    Owns: an event file in `folder`.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "observe.tensorboard needs tensorboard: pip install 'offload-adam[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        """Take one record."""
        for name, number in numbers_of(record).items():
            if name != "step":
                self._writer.add_scalar(name, number, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
