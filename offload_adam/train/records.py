"""What one step has to say, and the file that keeps it: one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class StepRecord:
    """One step of the job, as rank 0 saw it.

    `step` counts from 1 and includes skipped steps; `loss` is the mean over ranks and microbatches
    in nats a token, `lr` the rate this step used, `grad_norm` the global norm before clipping.
    `timings_ms` splits `step_ms` by what the host was doing; names that begin with `optimizer.`
    lie within the others. `val_loss` stands only where the step was followed by an evaluation,
    whose time is not part of `step_ms`.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    step_ms: float
    tokens_per_s: float
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    non_finite: tuple[str, ...] = ()
    val_loss: float | None = None

    def to_json(self) -> str:
        """Return one line of JSON whose floats read back exactly; what is not finite is null."""
        values = asdict(self)
        if not self.non_finite:
            del values["non_finite"]
        if self.val_loss is None:
            del values["val_loss"]
        return json.dumps(_finite_or_null(values), allow_nan=False)


class MetricsFile:
    """Writes the records of one run.

    Owns: the open file. Lifecycle: a context manager; a line is on its way to the disk when
    `write` returns, so that a run that is cut short keeps what it said.
    """

    def __init__(self, path: Path, *, goes_on: bool = False) -> None:
        """Open the file, anew or behind the records that it has."""
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


def _finite_or_null(value: Any) -> Any:
    """Return `value` with None for every NaN and infinity, which JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite_or_null(inner) for key, inner in value.items()}
    return value
