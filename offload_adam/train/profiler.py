"""Profile the job: record spans and memory while it trains, then write the report."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch.distributed as dist

from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.errors import MissingExtraError
from offload_adam.gradients.stand_in import gradient_of
from offload_adam.kernels.threads import threads_per_rank
from offload_adam.layout.budget import Category
from offload_adam.plan.prediction import predict
from offload_adam.plan.timing import predict_time, update_nbytes
from offload_adam.profiling.diagnosis import Diagnosis, RunFacts, diagnose
from offload_adam.profiling.peak import peaks_of
from offload_adam.profiling.phases import Resource
from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.report import ReportInputs, write_report
from offload_adam.profiling.session import profiled
from offload_adam.spans import NO_BUCKET
from offload_adam.step.ledger import LedgerEntry, by_bucket, by_category
from offload_adam.torch_private import default_store
from offload_adam.train.loop import Job
from offload_adam.train.plan import specs_of, training_of_job
from offload_adam.train.run_folder import METRICS_NAME, run_folder
from offload_adam.train.speeds import known_speeds, limit_gb_per_s

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"


@contextmanager
def profiled_job(job: Job) -> Iterator[None]:
    """Record the steps in the body if `profile.enabled`. Collective at its start and end."""
    section = job.config.profile
    if not section.enabled:
        yield
        return
    store = default_store() if dist.is_initialized() else None

    def ledger() -> Mapping[str, int]:
        return by_category([*job.optimizer.memory_ledger(), *_gradients(job)])

    def finish(profiles: list[RankProfile]) -> None:
        _report(job, profiles)

    with profiled(
        run_folder(job.config),
        ledger,
        finish,
        interval_s=section.interval_ms / 1e3,
        rank=job.world.rank,
        world_size=job.world.world_size,
        store=store,
    ):
        yield


def _gradients(job: Job) -> Iterator[LedgerEntry]:
    """Yield the gradients in `.grad` now; the optimizer's ledger has those that have left it."""
    for parameter in job.model.parameters():
        gradient = gradient_of(parameter)
        nbytes = 0 if gradient is None or gradient.is_sparse else gradient.nbytes
        yield LedgerEntry(Category.GRADIENTS, None, str(parameter.device), nbytes)


def _report(job: Job, profiles: Sequence[RankProfile]) -> None:
    """Log the diagnosis and the memory peaks, and write the report if plotly is installed."""
    path = run_folder(job.config) / REPORT_NAME
    found = diagnose(profiles, facts_of(job))
    for item in [found, *peaks_of(profiles)]:
        if item is not None:
            logger.info("%s", item.sentence)
    try:
        write_report(_inputs(job, profiles, found), path)
    except MissingExtraError as error:
        logger.warning("Skipping %s: %s; trace.json and memory.jsonl are written", path, error)
    else:
        logger.info("Wrote the profile to %s; trace.json and memory.jsonl are beside it", path)


def facts_of(job: Job) -> RunFacts:
    """Return the settings of the run that a diagnosis may suggest to change."""
    optimizer, train = job.config.optimizer, job.config.train
    on_device = job.world.device.type == "cuda"
    num_cores = threads_per_rank(job.world.local_world_size, on_device=on_device)
    return RunFacts(
        num_threads=optimizer.num_threads or num_cores,
        num_cores=num_cores,
        pinned=job.optimizer.pinned_nbytes >= job.optimizer.host_nbytes[Category.STATE],
        on_device=on_device,
        reduce_dtype=optimizer.reduce_dtype,
        dtype=train.dtype,
    )


def _inputs(job: Job, profiles: Sequence[RankProfile], found: Diagnosis | None) -> ReportInputs:
    metrics = run_folder(job.config) / METRICS_NAME
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    name = "Adam" if isinstance(job.config.optimizer, AdamSection) else "OffloadAdam"
    title = f"Profile of {job.config.run.name}: {name} on {job.world.world_size} rank(s)"
    achieved = _achieved_gb_per_s(job, profiles[0])
    return ReportInputs(
        title,
        profiles,
        found,
        records,
        predicted=_predicted(job, profiles[0]),
        achieved=achieved,
        limit=None if achieved is None else limit_gb_per_s(job),
        buckets=by_bucket(job.optimizer.memory_ledger()),
        planned_ms=_planned_ms(job),
    )


def _planned_ms(job: Job) -> dict[Resource, tuple[float, str]]:
    """Return the planned ms of a step's updates and network transfers, where speeds are known."""
    training = training_of_job(job)
    machine = known_speeds(training)
    timing = predict_time(specs_of(job.model), training, machine)
    if timing is None:
        return {}
    resources = {"update": Resource.UPDATE, "network": Resource.TRANSFERS}
    return {
        resource: (timing.seconds[name] * 1e3, machine.source_of(name).value)
        for name, resource in resources.items()
        if name in timing.seconds
    }


def _predicted(job: Job, profile: RankProfile) -> dict[str, int]:
    """Return the planned bytes of the categories that the ledger has.

    Without gradients that leave `.grad` during backward: no sample is taken at their peak.
    """
    training = training_of_job(job)
    plan = predict(specs_of(job.model), training)
    leaves = training.streams and training.reduces
    on_device = {f"{name} on {job.world.device}": n for name, n in plan.device.items()}
    every = {**plan.host, **on_device}
    known = [name for name in profile.peaks if not (leaves and name.startswith(Category.GRADIENTS))]
    return {name: every.get(name, 0) for name in known}


def _achieved_gb_per_s(job: Job, profile: RankProfile) -> float | None:
    """Return the bandwidth of rank 0's updates: their traffic over the sum of the buckets' medians.

    None if the traffic is not known: for updates on a device, and for lazy updates.
    """
    section = job.config.optimizer
    nbytes = update_nbytes(specs_of(job.model), training_of_job(job))
    if nbytes == 0 or (isinstance(section, AdamSection) and section.use_lazy):
        return None
    durations_ns: dict[int, list[int]] = defaultdict(list)
    for span in profile.spans:
        if span.name == "update" and span.bucket != NO_BUCKET:
            durations_ns[span.bucket].append(span.end_ns - span.start_ns)
    busy_ns = sum(median(durations) for durations in durations_ns.values())
    return nbytes / busy_ns if busy_ns > 0 else None
