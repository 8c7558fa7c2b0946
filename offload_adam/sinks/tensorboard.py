"""Metrics as TensorBoard event files."""

from __future__ import annotations

from pathlib import Path

from offload_adam.sinks.sink import Record, numbers_of, require_extra


class TensorBoardSink:
    """Writes each number of a record as a scalar of its step.

    Owns: an event file in `folder`.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        require_extra("tensorboard")
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
