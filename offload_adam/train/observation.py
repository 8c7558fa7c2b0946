"""What rank 0 shows of a run over HTTP: `/status`, `/healthz` and the metrics of `/metrics`.

Come here to add a metric. `launch/grafana.json` draws the metrics, and a test compares the two.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch

from offload_adam.coordinator.progress import PROGRESS, PeerRecord, Process
from offload_adam.step.ledger import by_category
from offload_adam.train.loop import Job
from offload_adam.train.records import CheckpointTotals, RunTotals
from offload_adam.train.saving import CheckpointSaver

if TYPE_CHECKING:
    from prometheus_client import Metric

Samples = float | None | Mapping[tuple[str, ...], float]
"""A number, None if it is not known yet, or the number for each combination of label values."""
Family = Callable[..., "Metric"]
"""`Observation._family` for one type of metric."""

_OF_LAST_STEP = {
    "step": ("step", "The last step, counted from the run's first start."),
    "loss": ("loss", "Training loss of the last step in nats per token, mean over ranks."),
    "learning_rate": ("lr", "Learning rate of the last step."),
    "gradient_norm": ("grad_norm", "Global gradient norm of the last step, before clipping."),
    "tokens_per_second": ("tokens_per_s", "Tokens of the last step by its time, of all ranks."),
}
"""Gauge -> the field of `StepRecord` that it shows, and its help text."""


class Observation:
    """The state of a run as its HTTP server reads it, always on rank 0.

    Prometheus conventions hold for the metrics: base units, counters end in `_total`. Counters
    count the work of this process, so they restart at zero when a run resumes, which `rate()`
    handles. Every metric has the label `run`. Numbers of one rank have the label `rank`.

    A NaN loss or norm of a skipped step is exported as NaN, which Prometheus stores and Grafana
    draws as a gap. A metric that is not known yet has no samples.

    Threads: the server's threads call all methods, while the training thread adds to `totals`.

    error: the exception that ended the training, set by the owner.
    """

    def __init__(self, job: Job, totals: RunTotals) -> None:
        self.error: BaseException | None = None
        self._job = job
        self._totals = totals
        self._process = Process.own()
        self._moves, self._moved_s = PROGRESS.moves, time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}

    def status(self) -> dict[str, Any]:
        """Return the values of `/status`, apart from the last record."""
        job = self._job
        return {
            "run": job.config.run.name,
            "of_steps": job.config.train.num_steps,
            "world_size": job.world.world_size,
            "last_checkpoint": self._checkpoints().last_step,
            "memory_bytes": self._memory(),
            "ranks": [
                {
                    "rank": record.rank,
                    "host": record.process.host,
                    "step": record.progress.step,
                    "phase": record.progress.phase,
                    "bucket": record.progress.bucket,
                    "waiting": record.progress.waiting,
                    "still_s": round(record.still_s, 1),
                }
                for record in self._ranks()
            ],
        }

    def problem(self) -> str | None:
        """Return why the run makes no progress, None while it does.

        There are three reasons: training raised an exception; the ranks declared a rank dead or
        hung; or no rank made progress for `coordinator.stuck_after` seconds. The third covers hangs
        that no rank declares: in a collective of DDP, or in a run with one rank. Long-running
        phases (evaluation, compilation, checkpoints) never count as a hang.
        """
        if self.error is not None:
            return f"Training ended with {type(self.error).__name__}: {self.error}"
        failure = self._job.world.ranks.failure
        if failure is not None:
            return failure.text
        stuck_after = self._job.config.coordinator.stuck_after
        live = [record for record in self._ranks() if record.left is None]
        # While one rank is in a long-running phase, its peers may wait for it in any phase.
        if not live or any(r.progress.long_running or r.still_s <= stuck_after for r in live):
            return None
        hung = [record for record in live if not record.progress.waiting] or live
        places = "; ".join(f"rank {r.rank} ({r.address}) in {r.progress.where}" for r in hung)
        return f"No rank has made progress for {stuck_after:g} s: {places}."

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families of `/metrics`, with values as of now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counter = partial(self._family, CounterMetricFamily)
        gauge = partial(self._family, GaugeMetricFamily)
        totals, last = self._totals, self._totals.last
        yield counter("steps_total", "Steps, skipped ones included.", totals.num_steps)
        yield counter("skipped_steps_total", "Steps that were skipped.", totals.num_skipped)
        yield counter(
            "tokens_total",
            "Tokens that all ranks together trained on.",
            totals.num_steps * totals.tokens_per_step,
        )
        yield counter(
            "step_seconds_total",
            "Wall time of steps, without evaluation and checkpoints.",
            totals.total_ms / 1e3,
        )
        yield counter(
            "phase_seconds_total",
            "Wall time of each phase of a step. Phases optimizer.* overlap with other phases.",
            # dict() copies without releasing the GIL: the training thread may add phases.
            {("0", phase): ms / 1e3 for phase, ms in dict(totals.timings_ms).items()},
            ("rank", "phase"),
        )
        yield gauge(
            "final_step", "The step after which the run ends.", self._job.config.train.num_steps
        )
        yield gauge(
            "validation_loss",
            "Loss of the last evaluation in nats per token, mean over ranks.",
            totals.val_loss,
        )
        for name, (field, text) in _OF_LAST_STEP.items():
            yield gauge(name, text, None if last is None else getattr(last, field))
        yield from self._collect_checkpoints(counter, gauge)
        yield from self._collect_ranks(gauge)
        yield from self._collect_memory(gauge)

    def _collect_checkpoints(self, counter: Family, gauge: Family) -> Iterator[Metric]:
        totals = self._checkpoints()
        commit_s = totals.last_commit_s
        yield counter("checkpoints_written_total", "Committed checkpoints.", totals.num_written)
        yield counter(
            "checkpoints_failed_total", "Checkpoints that failed to be written.", totals.num_failed
        )
        yield counter(
            "checkpoint_written_bytes_total",
            "Size of the committed checkpoints, files of all ranks.",
            totals.nbytes,
        )
        yield gauge(
            "checkpoint_age_seconds",
            "Time since the newest checkpoint was committed.",
            None if commit_s is None else time.time() - commit_s,
        )
        yield gauge(
            "checkpoint_duration_seconds",
            "Time from the start to the commit of the newest checkpoint.",
            totals.last_duration_s,
        )

    def _collect_ranks(self, gauge: Family) -> Iterator[Metric]:
        now_s = time.monotonic()
        steps: dict[tuple[str, ...], float] = {}
        ages: dict[tuple[str, ...], float] = {}
        still: dict[tuple[str, ...], float] = {}
        for record in self._ranks():
            # Clocks of hosts differ, so the age counts from the scrape that first saw this beat.
            if self._beats.get(record.rank, (None, 0.0))[0] != record.beat:
                self._beats[record.rank] = record.beat, now_s
            values = str(record.rank), record.process.host
            steps[values] = record.progress.step
            ages[values] = now_s - self._beats[record.rank][1]
            still[values] = record.still_s
        for name, text, samples in (
            ("rank_step", "The optimizer step that each rank began last.", steps),
            (
                "rank_heartbeat_age_seconds",
                "Time since rank 0 saw a new heartbeat of a rank, to the precision of the scrapes.",
                ages,
            ),
            (
                "rank_progress_age_seconds",
                "Time since the training thread of each rank last made progress.",
                still,
            ),
        ):
            yield gauge(name, text, samples, ("rank", "host"))

    def _collect_memory(self, gauge: Family) -> Iterator[Metric]:
        held: Counter[tuple[str, ...]] = Counter()
        for entry in self._job.optimizer.memory_ledger():
            held["0", entry.category, entry.device] += entry.nbytes
        yield gauge(
            "memory_bytes",
            "Memory that the optimizer holds, parameters included.",
            held,
            ("rank", "category", "device"),
        )
        resident = psutil.Process().memory_info().rss
        available = psutil.virtual_memory().available
        on_device = None
        if torch.cuda.is_initialized():
            on_device = torch.cuda.memory_allocated(self._job.world.device)
        for name, text, nbytes in (
            ("process_resident_bytes", "Resident memory of the process.", resident),
            ("node_available_bytes", "Memory that is available on the node.", available),
            ("device_allocated_bytes", "Memory that torch has allocated on the GPU.", on_device),
        ):
            yield gauge(name, text, {} if nbytes is None else {("0",): nbytes}, ("rank",))

    def _family(
        self, kind: Any, name: str, text: str, samples: Samples, labels: tuple[str, ...] = ()
    ) -> Metric:
        family: Any = kind(f"offload_adam_{name}", text, labels=("run", *labels))
        if not isinstance(samples, Mapping):
            samples = {} if samples is None else {(): samples}
        for values, number in samples.items():
            family.add_metric((self._job.config.run.name, *values), number)
        return family  # type: ignore[no-any-return]

    def _memory(self) -> dict[str, int]:
        """Return bytes of rank 0: by category, of its process and its GPU, and free on its node."""
        memory = by_category(self._job.optimizer.memory_ledger())
        memory["resident"] = psutil.Process().memory_info().rss
        memory["available on the node"] = psutil.virtual_memory().available
        if torch.cuda.is_initialized():
            memory["allocated on the device"] = torch.cuda.memory_allocated(self._job.world.device)
        return {name: nbytes for name, nbytes in memory.items() if nbytes}

    def _checkpoints(self) -> CheckpointTotals:
        saver = self._job.saver
        return saver.totals if isinstance(saver, CheckpointSaver) else CheckpointTotals()

    def _ranks(self) -> tuple[PeerRecord, ...]:
        """Return the progress of every rank, as published with its last heartbeat."""
        watch = self._job.world.ranks.watch
        if watch is not None:
            return watch.places()
        # A single rank sends no heartbeats, so `still_s` counts from the last call with a change.
        now_s = time.monotonic()
        if PROGRESS.moves != self._moves:
            self._moves, self._moved_s = PROGRESS.moves, now_s
        beat = time.monotonic_ns()  # a new one in every call: this process is alive
        return (PeerRecord(0, self._process, beat, replace(PROGRESS), now_s - self._moved_s),)
