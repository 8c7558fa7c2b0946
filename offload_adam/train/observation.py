"""The sinks of a run, and what its HTTP server shows: `/status`, `/healthz` and `/metrics`.

Come here to add a metric. `launch/grafana.json` draws the metrics; a test checks that both agree.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from offload_adam.config import ConfigError
from offload_adam.coordinator.progress import PROGRESS, PeerRecord, Process
from offload_adam.printable import show
from offload_adam.sinks.server import StatusServer
from offload_adam.sinks.sink import GuardedSinks
from offload_adam.sinks.trackers import TensorBoardSink, WandbSink
from offload_adam.step.ledger import by_category
from offload_adam.train.loop import Job
from offload_adam.train.records import CheckpointTotals, RunTotals
from offload_adam.train.run_folder import run_folder

if TYPE_CHECKING:
    from prometheus_client import Metric

Samples = float | None | Mapping[Any, float]
"""The value of a metric: a number, None if not known yet, or one number per tuple of labels."""

METRICS = {
    "steps_total": "Steps, skipped ones included.",
    "skipped_steps_total": "Steps that were skipped.",
    "tokens_total": "Tokens that all ranks together trained on.",
    "step_seconds_total": "Wall time of steps, without evaluation and checkpoints.",
    "phase_seconds_total": (
        "Wall time of each phase of a step. Phases optimizer.* overlap with other phases."
    ),
    "final_step": "The last step of the run, as configured.",
    "validation_loss": "Loss of the last evaluation in nats per token, mean over ranks.",
    "step": "The last step that has run, counted from the first start of the run.",
    "loss": "Training loss of the last step in nats per token, mean over ranks.",
    "learning_rate": "Learning rate of the last step.",
    "gradient_norm": "Global gradient norm of the last step, before clipping.",
    "tokens_per_second": "Tokens of the last step, of all ranks together, divided by its time.",
    "checkpoints_written_total": "Committed checkpoints.",
    "checkpoints_failed_total": "Checkpoints that could not be written.",
    "checkpoint_written_bytes_total": "Size of the committed checkpoints, files of all ranks.",
    "checkpoint_age_seconds": "Time since the newest checkpoint was committed.",
    "checkpoint_duration_seconds": "Time from the start to the commit of the newest checkpoint.",
    "rank_step": "The optimizer step that each rank began last.",
    "rank_heartbeat_age_seconds": (
        "Time since rank 0 saw a new heartbeat of a rank, to the precision of the scrapes."
    ),
    "rank_progress_age_seconds": "Time since the training thread of each rank last made progress.",
    "memory_bytes": "Memory that the optimizer holds, parameters included.",
    "process_resident_bytes": "Resident memory of the process.",
    "node_available_bytes": "Memory that is available on the node.",
    "device_allocated_bytes": "Memory that torch has allocated on the GPU.",
}
"""Metric -> its help text. Counters end in `_total`, all others are gauges."""
_LABELS = {
    "phase_seconds_total": ("rank", "phase"),
    "rank_step": ("rank", "host"),
    "rank_heartbeat_age_seconds": ("rank", "host"),
    "rank_progress_age_seconds": ("rank", "host"),
    "memory_bytes": ("rank", "category", "device"),
    "process_resident_bytes": ("rank",),
    "node_available_bytes": ("rank",),
    "device_allocated_bytes": ("rank",),
}
"""Metric -> its labels, apart from `run`."""


class Observation:
    """The state of a run as its HTTP server shows it. Lives on rank 0.

    The metrics follow Prometheus's conventions: base units, and names of counters end in `_total`.
    Counters count the work of this process, so they restart at zero when a run resumes, which
    `rate()` handles. Every metric has the label `run`, and a number of a single rank the label
    `rank`.

    A NaN loss or norm of a skipped step is exported as NaN, which Prometheus stores and Grafana
    draws as a gap. A metric whose value is not known yet has no samples.

    Threads: the server's threads call all methods, while the training thread changes both totals.

    error: the exception that ended the training, set by the owner.
    """

    def __init__(self, job: Job, totals: RunTotals, checkpoints: CheckpointTotals) -> None:
        self.error: BaseException | None = None
        self._job = job
        self._totals = totals
        self._checkpoints = checkpoints
        self._process = Process.own()
        self._moves, self._moved_s = PROGRESS.moves, time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}

    def status(self) -> dict[str, Any]:
        """Return the values of `/status`, apart from the last record, which the server adds."""
        job = self._job
        memory = by_category(job.optimizer.memory_ledger())
        memory |= {name: nbytes for name, _, nbytes in self._process_memory()}
        return {
            "run": job.config.run.name,
            "of_steps": job.config.train.num_steps,
            "world_size": job.world.world_size,
            "last_checkpoint": self._checkpoints.last_step,
            "memory_bytes": {name: nbytes for name, nbytes in memory.items() if nbytes},
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
        """Return why the run makes no progress, or None if it does.

        There are three reasons: training raised an exception; the ranks declared a rank dead or
        hung; or no rank made progress for `coordinator.stuck_after` seconds. The third covers hangs
        that no rank declares: in a collective of DDP, or in a run with one rank. While any rank is
        in a long-running phase, such as a compilation or a checkpoint, no rank counts as hung.
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

        known = dict((*self._of_run(), *self._of_ranks(), *self._of_memory()))
        for name, text in METRICS.items():
            kind: Any = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"offload_adam_{name}", text, labels=("run", *_LABELS.get(name, ())))
            samples = known.get(name)
            if not isinstance(samples, Mapping):
                samples = {} if samples is None else {(): samples}
            for values, number in samples.items():
                family.add_metric((self._job.config.run.name, *values), number)
            yield family

    def _of_run(self) -> Iterator[tuple[str, Samples]]:
        totals, last, saved = self._totals, self._totals.last, self._checkpoints
        yield "steps_total", totals.num_steps
        yield "skipped_steps_total", totals.num_skipped
        yield "tokens_total", totals.num_steps * totals.tokens_per_step
        yield "step_seconds_total", totals.total_ms / 1e3
        # dict() copies without releasing the GIL: the training thread may add phases.
        phases = {("0", phase): ms / 1e3 for phase, ms in dict(totals.timings_ms).items()}
        yield "phase_seconds_total", phases
        yield "final_step", self._job.config.train.num_steps
        yield "validation_loss", totals.val_loss
        if last is not None:
            yield "step", last.step
            yield "loss", last.loss
            yield "learning_rate", last.lr
            yield "gradient_norm", last.grad_norm
            yield "tokens_per_second", last.tokens_per_s
        yield "checkpoints_written_total", saved.num_written
        yield "checkpoints_failed_total", saved.num_failed
        yield "checkpoint_written_bytes_total", saved.nbytes
        commit_s = saved.last_commit_s
        yield "checkpoint_age_seconds", None if commit_s is None else time.monotonic() - commit_s
        yield "checkpoint_duration_seconds", saved.last_duration_s

    def _of_ranks(self) -> Iterator[tuple[str, Samples]]:
        now_s = time.monotonic()
        records = {(str(r.rank), r.process.host): r for r in self._ranks()}
        for record in records.values():
            # The clocks of hosts differ, so a beat's age counts from the call that saw it first.
            if self._beats.get(record.rank, (None, 0.0))[0] != record.beat:
                self._beats[record.rank] = record.beat, now_s
        ages = {labels: now_s - self._beats[r.rank][1] for labels, r in records.items()}
        yield "rank_step", {labels: r.progress.step for labels, r in records.items()}
        yield "rank_heartbeat_age_seconds", ages
        yield "rank_progress_age_seconds", {labels: r.still_s for labels, r in records.items()}

    def _of_memory(self) -> Iterator[tuple[str, Samples]]:
        held: Counter[tuple[str, ...]] = Counter()
        for entry in self._job.optimizer.memory_ledger():
            held["0", entry.category, entry.device] += entry.nbytes
        yield "memory_bytes", held
        for _, name, nbytes in self._process_memory():
            yield name, {("0",): nbytes}

    def _process_memory(self) -> Iterator[tuple[str, str, int]]:
        """Yield (name in `/status`, name in `/metrics`, bytes) for rank 0 and its node."""
        yield "resident", "process_resident_bytes", psutil.Process().memory_info().rss
        yield "available on the node", "node_available_bytes", psutil.virtual_memory().available
        if torch.cuda.is_initialized():
            allocated = torch.cuda.memory_allocated(self._job.world.device)
            yield "allocated on the device", "device_allocated_bytes", allocated

    def _ranks(self) -> tuple[PeerRecord, ...]:
        """Return the progress of every rank, as published with its last heartbeat."""
        watch = self._job.world.ranks.watch
        if watch is not None:
            return watch.read_records()
        # A single rank sends no heartbeats, so `still_s` counts from the last call with a change.
        now_s = time.monotonic()
        if PROGRESS.moves != self._moves:
            self._moves, self._moved_s = PROGRESS.moves, now_s
        beat = time.monotonic_ns()  # a new one in every call: this process is alive
        return (PeerRecord(0, self._process, beat, replace(PROGRESS), now_s - self._moved_s),)


@contextmanager
def opened_sinks(
    job: Job, totals: RunTotals, checkpoints: CheckpointTotals
) -> Iterator[GuardedSinks]:
    """Open the configured sinks, and close them after the body.

    Args:
        totals, checkpoints: read by the server while the training thread adds to them.

    Raises:
        ConfigError: the server cannot listen: its port is in use, or its host unknown.
    """
    section, folder = job.config.observe, run_folder(job.config)
    state = Observation(job, totals, checkpoints)
    sinks = GuardedSinks()
    try:
        if section.tensorboard:
            sinks.add(TensorBoardSink(folder / "tensorboard"))
        if section.wandb_project is not None:
            values = job.config.model_dump(mode="json")
            sinks.add(WandbSink(section.wandb_project, job.config.run.name, folder, values))
        if section.http_port is not None:
            # Closed last, so that /healthz reports an error of the run until then.
            port, host = section.http_port, section.http_host
            try:
                server = StatusServer(port, host, state.status, state.problem, state)
            except UnicodeError as error:  # the name cannot be encoded for DNS
                problem = f"{show(host)} is not the name or the address of a host"
                raise ConfigError.at("observe.http_host", problem) from error
            except OSError as error:
                problem = f"cannot listen on {host}, port {port}: {error.strerror}"
                raise ConfigError.at("observe.http_port", problem) from error
            sinks.add(server)
        yield sinks
    except BaseException as error:
        state.error = error
        raise
    finally:
        sinks.close()
