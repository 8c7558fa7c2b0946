"""What a run came to, as the table at its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from offload_adam.train.records import StepRecord


@dataclass
class RunTotals:
    """Sums over the steps of a run."""

    tokens_per_step: int
    num_steps: int = 0
    num_skipped: int = 0
    total_ms: float = 0.0
    timings_ms: Counter[str] = field(default_factory=Counter)
    last: StepRecord | None = None

    def add(self, record: StepRecord) -> None:
        """Count one step in."""
        self.num_steps += 1
        self.num_skipped += record.skipped
        self.total_ms += record.step_ms
        self.timings_ms.update(record.timings_ms)
        self.last = record


def summary_table(totals: RunTotals, bigram_loss: float, folder: Path) -> Table:
    """Return the table of a run that has ended; losses are in nats a token.

    One that was preempted has no final validation loss.
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
    table.add_row(
        "throughput", f"{totals.num_steps * totals.tokens_per_step / seconds:,.0f} tokens/s"
    )
    table.add_section()
    for phase, total_ms in totals.timings_ms.items():
        share = total_ms / totals.total_ms
        table.add_row(phase, f"{total_ms / totals.num_steps:.2f} ms a step  {share:4.0%}")
    table.add_section()
    table.add_row("run folder", str(folder))
    return table
