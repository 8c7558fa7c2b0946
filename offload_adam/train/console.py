"""What rank 0 prints about a run: its steps, as a progress bar or as lines, and a summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from offload_adam.train.records import RunTotals, StepRecord
from offload_adam.units import format_count

# Seconds between two lines in a log file: progress is visible, and an hour has at most 720 lines.
_LINE_EVERY_S = 5.0
# train.num_steps of configs/quickstart.yaml.
_QUICKSTART_STEPS = 500
WIDTH = 100
"""Columns of the line of a step."""


def describe(record: StepRecord, num_steps: int) -> str:
    """Return a step and its metrics in one line of at most `WIDTH` columns.

    It ends with the milliseconds of phases, as many as fit: the optimizer's step first, then the
    longest ones.
    """
    figures = [f"step {record.step}/{num_steps}", f"loss {_loss(record.loss)}"]
    if record.val_loss is not None:
        figures.append(f"val {_loss(record.val_loss)}")
    figures += [f"lr {record.lr:.2e}", f"norm {record.grad_norm:.3g}"]
    if record.is_resumed:
        figures.append("completed from kept state")
    else:
        speed = format_count(record.tokens_per_s).replace(" ", "")
        figures += [f"{speed} tokens/s", _time(record.step_ms)]
    skipped = ["skipped"] if record.skipped else []  # the log says which gradients are non-finite
    phases = {name: ms for name, ms in record.timings_ms.items() if "." not in name and ms >= 0.5}
    longest = sorted(phases, key=lambda name: (name != "step", -phases[name]))
    for number in range(len(longest), -1, -1):
        shown = [f"{name} {ms:.0f}" for name, ms in phases.items() if name in longest[:number]]
        split = [f"({', '.join(shown)})"] if shown else []
        line = "  ".join([*figures, *split, *skipped])
        if len(line) <= WIDTH:
            return line
    return " ".join([*figures, *skipped])


def _loss(loss: float) -> str:
    """Return a loss with 4 decimals, or 4 digits if it is large."""
    return f"{loss:.4f}" if not abs(loss) >= 100 else f"{loss:.4g}"


def _time(ms: float) -> str:
    """Return the time of a step, such as '12 ms' or '12.3 s'."""
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1e3:.1f} s"


def print_line(console: Console, line: str) -> None:
    """Print one line without wrapping or markup, and flush it."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.file.flush()


class StepDisplay:
    """Shows the steps of a run on the console.

    On a terminal: a progress bar, and below it the metrics of the last step. In a file or a pipe: a
    line for the first and the last step, for each evaluation, and every 5 s. On both: a line for
    each skipped step.

    Lifecycle: call `show` inside the context `shown()`.
    """

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._last_line_s = float("-inf")
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("training", total=num_steps)
        self._live = Live(self._bar, console=console)

    def shown(self) -> AbstractContextManager[object]:
        """Return the context inside which steps are shown."""
        return self._live if self._console.is_terminal else nullcontext()

    def show(self, record: StepRecord) -> None:
        """Show one step."""
        text, now_s = describe(record, self._num_steps), time.monotonic()
        if self._console.is_terminal:
            self._bar.update(self._task, completed=record.step)
            self._live.update(Group(self._bar, Text(text)))
            due = False
        else:
            due = record.val_loss is not None or record.step == self._num_steps
            due |= now_s - self._last_line_s >= _LINE_EVERY_S
        if due or record.skipped:
            self._last_line_s = now_s
            print_line(self._console, text)


def summary_table(totals: RunTotals, bigram_loss: float, folder: Path) -> Table:
    """Return the table that ends a run. Losses are in nats a token.

    A validation loss is in the table only if the last step was evaluated: the last step of a
    preempted run may not be.
    """
    last = totals.last
    assert last is not None, "a run has a step"
    table = Table(title=f"{folder.name}: {totals.num_steps} steps", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right", overflow="fold")
    if last.val_loss is not None:
        table.add_row("final validation loss", f"{last.val_loss:.4f} nats")
    table.add_row("bigram baseline, same split", f"{bigram_loss:.4f} nats")
    table.add_row("final training loss", f"{last.loss:.4f} nats")
    table.add_row("steps (of these skipped)", f"{totals.num_steps} ({totals.num_skipped})")
    seconds = totals.total_ms / 1e3
    table.add_row("time in steps", f"{seconds:.1f} s")
    if totals.num_steps > 0:  # none if only a step's end was left, after a resume from kept state
        table.add_row(
            "throughput", f"{totals.num_steps * totals.tokens_per_step / seconds:,.0f} tokens/s"
        )
    table.add_section()
    for phase, total_ms in totals.timings_ms.items():
        share = total_ms / totals.total_ms
        table.add_row(phase, f"{total_ms / totals.num_steps:.2f} ms a step  {share:4.0%}")
    table.add_section()
    table.add_row("run folder", Text(str(folder)))  # rich reads [name] in a string as markup
    return table


def compare_with_bigram(
    val_loss: float | None, bigram_loss: float, num_steps: int, tokens: int, training_tokens: int
) -> Iterator[str]:
    """Yield what it means if the model is worse than the bigram baseline, nothing if it is not.

    Args:
        val_loss: of the last step in nats a token; None if it was not evaluated.
        tokens: seen in `num_steps` steps, since the first start of the run.
        training_tokens: tokens of the training split.
    """
    if val_loss is None or not val_loss > bigram_loss:
        return
    losses = f"{val_loss:.4f} nats) than a bigram model ({bigram_loss:.4f} nats"
    yield f"The model predicts worse ({losses})."
    seen = f"{num_steps:,} steps are {tokens:,} tokens"
    if tokens < training_tokens:
        share = 100 * tokens / training_tokens
        yield f"The run was short: {seen}, {share:.2g}% of the training text."
        other = ", or run configs/quickstart.yaml" if num_steps < _QUICKSTART_STEPS else ""
        yield f"Train longer, with --train.num_steps={10 * num_steps}{other}."
    else:
        yield f"The run was not short: {seen}. Change optimizer.lr or model.sizes."
