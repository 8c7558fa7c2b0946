"""What a run records: one record a step, and totals over the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

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
