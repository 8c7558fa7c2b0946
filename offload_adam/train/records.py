"""What a run records: one record a step, the file of these records, and totals over the run."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload_adam.sinks.sink import to_json


@dataclass(frozen=True)
class StepRecord:
    """The metrics of one step, as rank 0 sees them. All sinks use these names.

    step: counts from 1 and includes skipped steps.
    loss: mean over ranks and microbatches, in nats a token. It may be NaN or infinite.
    lr: the learning rate of this step.
    grad_norm: the global norm before clipping, non-finite if a gradient is.
    step_ms: wall time of the step, without evaluation and checkpoints.
    timings_ms: how the host spent `step_ms`, by phase. Phases named `optimizer.*` overlap with
        other phases.
    non_finite: names of parameters with non-finite gradients.
    val_loss: None unless an evaluation followed the step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    step_ms: float
    tokens_per_s: float
    timings_ms: dict[str, float] = field(default_factory=dict)
    non_finite: tuple[str, ...] = ()
    val_loss: float | None = None

    def to_json(self) -> str:
        """Return one line of JSON. Floats read back exactly, and non-finite ones become null."""
        values: dict[str, Any] = asdict(self)
        if not self.non_finite:
            del values["non_finite"]
        if self.val_loss is None:
            del values["val_loss"]
        return to_json(values)


class MetricsFile:
    """Writes the records of one run, one JSON object a line.

    Owns: the open file. Lifecycle: a context manager. `write` flushes, so that a killed run keeps
    its records.
    """

    def __init__(self, path: Path, *, goes_on: bool = False) -> None:
        """Open an empty file, or append to the file of a resumed run if `goes_on`."""
        self._file = path.open("a" if goes_on else "w", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        """Append one record."""
        self._file.write(record.to_json() + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


@dataclass
class RunTotals:
    """Sums over the steps of this process. A resumed run starts at zero again.

    val_loss: of the last evaluation.
    """

    tokens_per_step: int
    num_steps: int = 0
    num_skipped: int = 0
    total_ms: float = 0.0
    timings_ms: Counter[str] = field(default_factory=Counter)
    last: StepRecord | None = None
    val_loss: float | None = None

    def add(self, record: StepRecord) -> None:
        """Add one step."""
        self.num_steps += 1
        self.num_skipped += record.skipped
        self.total_ms += record.step_ms
        self.timings_ms.update(record.timings_ms)
        self.last = record
        if record.val_loss is not None:
            self.val_loss = record.val_loss


@dataclass
class CheckpointTotals:
    """The checkpoints of this process. Rank 0 counts all of them, other ranks only failures.

    nbytes: size of the committed checkpoints, files of all ranks together.
    last_step, last_commit_s: of the newest checkpoint, which is the loaded one at first if the run
        was resumed. `last_commit_s` is a `time.time()`.
    last_duration_s: from the start to the commit of the newest checkpoint. If it was written in
        the background, training steps are included.
    """

    num_written: int = 0
    num_failed: int = 0
    nbytes: int = 0
    last_step: int | None = None
    last_commit_s: float | None = None
    last_duration_s: float | None = None
    _step: int = 0
    _start_s: float = 0.0

    @classmethod
    def of_resumed(cls, path: Path | None, step: int) -> Self:
        """Return the totals of a run that has loaded the checkpoint `path`, None for a new run."""
        totals = cls()
        if path is not None:
            totals.last_step = step
            with suppress(OSError):
                totals.last_commit_s = path.stat().st_mtime
        return totals

    def start(self, step: int) -> None:
        """Note that the checkpoint of this step is being written."""
        self._step, self._start_s = step, time.monotonic()

    def add(self, path: Path) -> int | None:
        """Count the checkpoint that was started last and is committed now.

        Returns:
            Its size in bytes, None if the files cannot be read.
        """
        self.num_written += 1
        self.last_step, self.last_commit_s = self._step, time.time()
        self.last_duration_s = time.monotonic() - self._start_s
        try:
            nbytes = sum(file.stat().st_size for file in path.iterdir())
        except OSError:  # the disk may vanish after the commit, which must not end the run
            return None
        self.nbytes += nbytes
        return nbytes
