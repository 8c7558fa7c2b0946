"""How rank 0 shows a run as it goes: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from offload_adam.train.records import StepRecord

_LINE_EVERY_S = 5.0


class StepDisplay(Protocol):
    """Shows each step; used within its own `shown()` block."""

    def shown(self) -> AbstractContextManager[object]:
        """Return the block within which steps are shown."""

    def show(self, record: StepRecord) -> None:
        """Show one step."""


def step_display(console: Console, num_steps: int) -> StepDisplay:
    """Return the display that suits the console."""
    if console.is_terminal:
        return BarDisplay(console, num_steps)
    return LineDisplay(console, num_steps)


def describe(record: StepRecord) -> str:
    """Return a step's figures in one line."""
    figures = [
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        f"norm {record.grad_norm:.3f}",
        f"{record.tokens_per_s:,.0f} tokens/s",
        f"{record.step_ms:.0f} ms",
        f"({describe_split(record)})",
    ]
    if record.val_loss is not None:
        figures.append(f"validation loss {record.val_loss:.4f}")
    return "  ".join(figures)


def describe_split(record: StepRecord) -> str:
    """Return where a step's time went, the optimizer's own phases left to the summary."""
    phases = {name: ms for name, ms in record.timings_ms.items() if "." not in name}
    return ", ".join(f"{name} {ms:.0f}" for name, ms in phases.items() if ms >= 0.5)


def describe_skip(record: StepRecord) -> str:
    """Return why a step changed nothing."""
    names = ", ".join(record.non_finite[:3]) or "a gradient"
    more = f" and {len(record.non_finite) - 3} more" if len(record.non_finite) > 3 else ""
    return f"step {record.step} was skipped: not finite in {names}{more}"


class BarDisplay:
    """A progress bar with the last step's figures below it."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("training", total=num_steps)
        self._live = Live(self._bar, console=console)

    def shown(self) -> AbstractContextManager[object]:
        return self._live

    def show(self, record: StepRecord) -> None:
        self._bar.update(self._task, completed=record.step)
        self._live.update(Group(self._bar, Text(describe(record))))
        if record.skipped:
            self._live.console.print(describe_skip(record), markup=False, highlight=False)


class LineDisplay:
    """A line for the first step, the last, each evaluation, and otherwise every few seconds."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._last_line_s = float("-inf")

    def shown(self) -> AbstractContextManager[object]:
        return nullcontext()

    def show(self, record: StepRecord) -> None:
        if record.skipped:
            self._print(describe_skip(record))
        now_s = time.monotonic()
        due = now_s - self._last_line_s >= _LINE_EVERY_S
        if due or record.val_loss is not None or record.step == self._num_steps:
            self._last_line_s = now_s
            self._print(f"step {record.step}/{self._num_steps}  {describe(record)}")

    def _print(self, line: str) -> None:
        # Logs are read by line: no wrapping, no markup, and at once.
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)
        self._console.file.flush()
