"""What a run records: one record for each step, and totals over the run."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from offload_adam.sinks.sink import to_json


@dataclass(frozen=True)
class StepRecord:
    """The metrics of one step, as seen by rank 0. All sinks use the names of these fields.

    step: counts from 1 and includes skipped steps.
    loss: mean over ranks and microbatches, in nats a token. It may be NaN or infinite.
    lr: the learning rate of this step.
    grad_norm: the global norm before clipping, non-finite if a gradient is.
    step_ms: wall time of the step, without evaluation and checkpoints. NaN if the step was resumed
        from kept state.
    tokens_per_s: of all ranks together. NaN as `step_ms`.
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

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier process has run the step, as far as its update."""
        return math.isnan(self.step_ms)

    def is_recorded_in(self, line: bytes) -> bool:
        """Return whether a line of the records is of this step, with the same results."""
        own, found = json.loads(self.to_json()), json.loads(line)
        return all(found.get(key) == own[key] for key in ("step", "loss", "lr", "grad_norm"))

    def to_json(self) -> str:
        """Return one line of JSON, with exact floats, and null for non-finite ones."""
        values: dict[str, Any] = asdict(self)
        if not self.non_finite:
            del values["non_finite"]
        if self.val_loss is None:
            del values["val_loss"]
        return to_json(values)


@dataclass
class RunTotals:
    """Sums over the steps of this process. A resumed run starts at zero again.

    val_loss: validation loss of the last evaluation, None before it.
    """

    tokens_per_step: int
    num_steps: int = 0
    num_skipped: int = 0
    total_ms: float = 0.0
    timings_ms: Counter[str] = field(default_factory=Counter)
    last: StepRecord | None = None
    val_loss: float | None = None

    def add(self, record: StepRecord) -> None:
        """Add one step. One that an earlier process has run only becomes the last one."""
        self.last = record
        if record.val_loss is not None:
            self.val_loss = record.val_loss
        if record.is_resumed:
            return
        self.num_steps += 1
        self.num_skipped += record.skipped
        self.total_ms += record.step_ms
        self.timings_ms.update(record.timings_ms)


@dataclass
class CheckpointTotals:
    """The checkpoints that this process has written. Ranks other than 0 count only failures.

    nbytes: size of the committed checkpoints, files of all ranks together.
    last_step: step of the newest checkpoint. If the run was resumed, this is first the checkpoint
        that was loaded.
    last_commit_s: when the newest checkpoint was committed, as a `time.monotonic()`.
    last_duration_s: seconds from the start to the commit of the newest checkpoint, None before this
        process has written one. Training steps during a background write are included.
    """

    num_written: int = 0
    num_failed: int = 0
    nbytes: int = 0
    last_step: int | None = None
    last_commit_s: float | None = None
    last_duration_s: float | None = None
