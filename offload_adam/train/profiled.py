"""Profiling of the job: what is recorded while it trains, and the report of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from offload_adam.config.optimizer_sections import OffloadAdamSection
from offload_adam.errors import MissingExtraError
from offload_adam.kernels.threads import threads_per_rank
from offload_adam.plan.prediction import predict
from offload_adam.profiling.diagnosis import Diagnosis, RunFacts, diagnose
from offload_adam.profiling.profile import RankProfile
from offload_adam.profiling.report import ReportInputs, write_report
from offload_adam.profiling.session import ProfiledRank, profiled
from offload_adam.step.ledger import by_category
from offload_adam.train.loop import Job
from offload_adam.train.planned import specs_of, training_of
from offload_adam.train.run_folder import METRICS_NAME, run_folder

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"


@contextmanager
def profiled_job(job: Job) -> Iterator[None]:
    """Record the steps inside where `profile.enabled` is set. Collective at its end."""
    section = job.config.profile
    if not section.enabled:
        yield
        return
    store = _get_default_store() if dist.is_initialized() else None
    place = ProfiledRank(job.world.rank, job.world.world_size, run_folder(job.config), store)

    def ledger() -> Mapping[str, int]:
        return by_category(job.optimizer.memory_ledger())

    def finish(profiles: list[RankProfile]) -> None:
        _report(job, profiles)

    with profiled(place, ledger, finish, interval_s=section.interval_ms / 1e3):
        yield


def _report(job: Job, profiles: Sequence[RankProfile]) -> None:
    """Write the report, and say what bounds the run even where it cannot be drawn."""
    folder = run_folder(job.config)
    found = diagnose(profiles, facts_of(job))
    if found is not None:
        logger.info("%s", found.sentence)
    try:
        write_report(_inputs(job, profiles, found, folder), folder / REPORT_NAME)
    except MissingExtraError as error:
        logger.warning("%s; memory.jsonl and trace.json are written", error)
        return
    logger.info("the profile is in %s, beside trace.json and memory.jsonl", folder / REPORT_NAME)


def facts_of(job: Job) -> RunFacts:
    """Return the settings of the run that a diagnosis may ask to change."""
    optimizer, train = job.config.optimizer, job.config.train
    num_cores = threads_per_rank(job.world.local_world_size)
    return RunFacts(
        num_threads=optimizer.num_threads or num_cores,
        num_cores=num_cores,
        pinned=job.config.memory.pin is not False,
        on_device=job.world.device.type == "cuda",
        streams=optimizer.streams,
        reduce_dtype=optimizer.reduce_dtype,
        dtype=train.dtype,
        world_size=job.world.world_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
    )


def _inputs(
    job: Job, profiles: Sequence[RankProfile], found: Diagnosis | None, folder: Path
) -> ReportInputs:
    lines = (folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    name = "Adam" if not isinstance(job.config.optimizer, OffloadAdamSection) else "OffloadAdam"
    title = f"Profile of {job.config.run.name}: {name} on {job.world.world_size} rank(s)"
    return ReportInputs(
        title,
        profiles,
        found,
        records,
        predicted=_predicted(job, profiles[0]),
        achieved=_achieved_gb_per_s(job, profiles[0]),
    )


def _predicted(job: Job, profile: RankProfile) -> dict[str, int]:
    """Return what the plan says of the categories that the ledger knows."""
    training = replace(
        training_of(job.config, job.world.device.type == "cuda"),
        world_size=job.world.world_size,
        local_world_size=job.world.local_world_size,
    )
    plan = predict(specs_of(job.model), training)
    on_device = {f"{name} on {job.world.device}": n for name, n in plan.device.items()}
    every = {**plan.host, **on_device}
    return {name: every.get(name, 0) for name in profile.peaks}


def _achieved_gb_per_s(job: Job, profile: RankProfile) -> float | None:
    """Return the bytes of state that rank 0's updates have read and written, by their time.

    Each update reads and writes every plane of its bucket once; the gradient's 2 or 4 bytes an
    element, and the rounded parameter's 2, are not counted.
    """
    planes = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weight"}
    nbytes: dict[int, int] = {}
    for entry in job.optimizer.memory_ledger():
        if entry.bucket is not None and entry.category in planes:
            nbytes[entry.bucket] = nbytes.get(entry.bucket, 0) + 2 * entry.nbytes
    updates = [span for span in profile.spans if span.name == "update" and span.bucket in nbytes]
    busy_ns = sum(span.end_ns - span.start_ns for span in updates)
    if busy_ns == 0:
        return None
    return sum(nbytes[span.bucket] for span in updates) / busy_ns
