"""Profiles the job: records spans and memory while it trains, then writes the report."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch.distributed as dist

from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.errors import MissingExtraError
from offload_adam.gradients.stand_in import local_gradient_of
from offload_adam.kernels.threads import threads_per_rank
from offload_adam.layout.budget import Category
from offload_adam.layout.flat import ParameterSpec
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import predict
from offload_adam.plan.timing import predict_time, update_nbytes
from offload_adam.profiling.diagnosis import Diagnosis, RunFacts, diagnose
from offload_adam.profiling.environment import describe_environment
from offload_adam.profiling.json_lines import read_objects
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
from offload_adam.train.speeds import faster_than_measured, known_speeds, limit_gb_per_s

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"


@contextmanager
def profiled_job(job: Job) -> Iterator[None]:
    """Record the steps in the body if `profile.enabled`. Collective at its start and end."""
    section = job.config.profile
    if not section.enabled:
        yield
        return
    with profiled(
        run_folder(job.config),
        lambda: by_category([*job.optimizer.memory_ledger(), *_gradients(job)]),
        partial(_report, job),
        interval_s=section.interval_ms / 1e3,
        rank=job.world.rank,
        world_size=job.world.world_size,
        store=default_store() if dist.is_initialized() else None,
    ):
        yield


def _gradients(job: Job) -> Iterator[LedgerEntry]:
    """Yield the bytes of each gradient in `.grad`. The optimizer's ledger has all others."""
    for parameter in job.model.parameters():
        gradient = local_gradient_of(parameter)
        nbytes = 0 if gradient is None or gradient.is_sparse else gradient.nbytes
        yield LedgerEntry(Category.GRADIENTS, None, str(parameter.device), nbytes)


def _report(job: Job, profiles: Sequence[RankProfile]) -> None:
    """Log the diagnosis and the memory peaks, and write the report if its extra is installed."""
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
    """Return the settings of the run on which the advice of a diagnosis depends."""
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
    records = [record for _, record in read_objects(metrics, "step", "loss", "skipped")]
    section = job.config.optimizer
    title = f"Profile of {job.config.run.name}: {section.name} on {job.world.world_size} rank(s)"
    specs, training = specs_of(job.model), training_of_job(job)
    # A lazy update moves only the rows that have a gradient, so its traffic is not known.
    lazy = isinstance(section, AdamSection) and section.use_lazy
    achieved = None if lazy else _achieved_gb_per_s(update_nbytes(specs, training), profiles[0])
    limit = None if achieved is None else limit_gb_per_s(job)
    if achieved is not None and limit is not None and achieved > limit:
        logger.warning("%s", faster_than_measured(achieved, limit))
    return ReportInputs(
        title,
        profiles,
        found,
        records,
        predicted=_predicted(job, specs, training, profiles[0].peaks),
        update_gb_per_s=achieved,
        memory_gb_per_s=limit,
        buckets=by_bucket(job.optimizer.memory_ledger()),
        planned_ms=_planned_ms(specs, training),
        environment=describe_environment(
            job.world.device, [profile.host for profile in profiles], Path.cwd()
        ),
    )


def _planned_ms(
    specs: list[ParameterSpec], training: Training
) -> dict[Resource, tuple[float, str]]:
    """Return the planned ms in a step, and the source of the speed, by resource.

    Only for updates and network transfers, and only where the speed is known.
    """
    machine = known_speeds(training)
    timing = predict_time(specs, training, machine)
    seconds = {} if timing is None else timing.seconds
    return {
        resource: (seconds[name] * 1e3, machine.source_of(name).value)
        for name, resource in (("update", Resource.UPDATE), ("network", Resource.TRANSFERS))
        if name in seconds
    }


def _predicted(
    job: Job, specs: list[ParameterSpec], training: Training, categories: Iterable[str]
) -> dict[str, int]:
    """Return the planned bytes of the given categories.

    Gradients that are copied out of `.grad` during backward are left out, since the samples of the
    memory are unlikely to catch their peak.
    """
    plan = predict(specs, training)
    leaves = training.streams and training.reduces
    every = {**plan.host, **{f"{name} on {job.world.device}": n for name, n in plan.device.items()}}
    known = [name for name in categories if not (leaves and name.startswith(Category.GRADIENTS))]
    return {name: every.get(name, 0) for name in known}


def _achieved_gb_per_s(nbytes: int, profile: RankProfile) -> float | None:
    """Return the bandwidth of a rank's updates in 1e9 bytes a second, None if it has none.

    It is the traffic of an update over the sum of the buckets' median times.

    Args:
        nbytes: traffic of one update on the host, 0 if all updates run on a device.
    """
    if nbytes == 0:
        return None
    durations_ns: dict[int, list[int]] = defaultdict(list)
    for span in profile.spans:
        if span.name == "update" and span.bucket != NO_BUCKET:
            durations_ns[span.bucket].append(span.end_ns - span.start_ns)
    busy_ns = sum(median(durations) for durations in durations_ns.values())
    return nbytes / busy_ns if busy_ns > 0 else None
