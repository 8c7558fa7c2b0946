"""A run from its configuration to its summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import chain

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from offload_adam.config import ConfigError, RunConfig
from offload_adam.coordinator.admission import Field, require_same
from offload_adam.coordinator.endings import EndingGuard, preemptible
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.startup import COLLECTIVE_TIMEOUT, World, final, joined_world
from offload_adam.errors import CheckpointError, HostMemoryError, RankDisagreementError
from offload_adam.kernels.threads import cores_per_rank
from offload_adam.mindspore.adam import Adam
from offload_adam.optimizer import OffloadAdam
from offload_adam.train.bigram import bigram_loss
from offload_adam.train.console import step_display, summary_table
from offload_adam.train.corpus import Corpus
from offload_adam.train.loop import Job, Saver, run_steps
from offload_adam.train.optimizer import build_optimizer, failure_policy
from offload_adam.train.preparation import prepare
from offload_adam.train.profiler import profiled_job
from offload_adam.train.records import MetricsFile, RunTotals
from offload_adam.train.run_folder import (
    METRICS_NAME,
    continue_run_folder,
    prepare_run_folder,
    run_folder,
)
from offload_adam.train.run_lock import locked_run_folder
from offload_adam.train.saving import (
    CheckpointSaver,
    checkpoint_path,
    require_place,
    resume,
    what_stands,
)
from offload_adam.train.schedule import build_schedule
from offload_adam.train.sinks import watched
from offload_adam.train.speeds import update_speed

logger = logging.getLogger(__name__)


def run_job(config: RunConfig, console: Console | None = None, saver: Saver | None = None) -> None:
    """Train as configured, alone or as one of torchrun's ranks; rank 0 writes and reports.

    Everything that can be wrong with the configuration is tried before the ranks join.

    Args:
        saver: writes the checkpoints, in place of the job's own.

    Raises:
        ConfigError: data, model or world do not fit the configuration.
        HostMemoryError: the state does not fit into a node's memory.
        PeerFailedError: ranks have died, hung, or never come. Where the training thread cannot
            raise it, because it is in a collective that is not ours, the process is ended.
    """
    corpus, model = prepare(config)
    failures = failure_policy(config)
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * failures.stuck_after))
    with (
        locked_run_folder(config) as require_held,
        joined_world(timeout, failures) as world,
        EndingGuard(world.ranks) as guard,
        preemptible(world.ranks, lambda: what_stands(config)) as preemption,
        _assembled(config, world, corpus, model) as (parallel_model, optimizer),
        guard.hurried(),
    ):
        schedule = build_schedule(optimizer, config)
        job = Job(config, world, corpus, model, parallel_model, optimizer, schedule, preemption)
        with final(CheckpointError, ConfigError):
            job = resume(job)
            require_place(job)
        first_step = job.first_step
        job = replace(job, saver=saver or CheckpointSaver(job, require_held))
        if first_step > config.train.num_steps:
            logger.info("all %d steps have been taken: nothing is left to do", first_step - 1)
        elif world.rank == 0:
            _train_and_report(job, console or Console(), require_held)
        else:
            with profiled_job(job):
                for _ in run_steps(job):
                    pass


@contextmanager
def _assembled(
    config: RunConfig, world: World, corpus: Corpus, model: nn.Module
) -> Iterator[tuple[nn.Module, OffloadAdam | Adam]]:
    """Make the optimizer on this rank's device, and close it after the block.

    Yields the model as the ranks train it, in DistributedDataParallel or as it is, and the
    optimizer. What goes wrong here goes wrong at every start.
    """
    with final(TypeError, ValueError, RankDisagreementError, HostMemoryError):
        require_same(world.ranks, "configuration", _fields(config, corpus))
        parallel_model = _distributed(config, world, model)
        optimizer = build_optimizer(config, parallel_model)
    with closing(optimizer):
        # Not before: where Numba starts its OpenMP threads it also sets how many torch uses.
        torch.set_num_threads(cores_per_rank(world.local_world_size))
        yield parallel_model, optimizer


def _fields(config: RunConfig, corpus: Corpus) -> list[Field]:
    """Return what the ranks of a run must have in common before they make the optimizer."""
    sections = config.model_dump(mode="json")
    fields = [
        (f"{section}.{key}", repr(value))
        for section, values in sections.items()
        for key, value in values.items()
    ]
    return [*fields, ("the data", corpus.description)]


def _distributed(config: RunConfig, world: World, model: nn.Module) -> nn.Module:
    """Put the model on this rank's device, with rank 0's weights, in DDP where that reduces."""
    model = model.to(world.device)
    _copy_from_rank_0(model, world)
    # From here on each rank draws for itself: two ranks must not drop the same activations.
    torch.manual_seed(config.run.seed + world.rank)
    if config.optimizer.gradient_reduction == "external" and world.world_size > 1:
        return DistributedDataParallel(model)
    return model


@torch.no_grad()
def _copy_from_rank_0(model: nn.Module, world: World) -> None:
    """Give all ranks rank 0's weights, should a user's factory draw them without the seed."""
    if world.world_size == 1:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        received = tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        world.ranks.broadcast(received)
        tensor.copy_(received)


def _train_and_report(job: Job, console: Console, require_held: Callable[[], None]) -> None:
    """Run the steps on rank 0, which shows and writes them, and close with the summary.

    Args:
        require_held: raises once another job has taken the run's folder over.
    """
    config = job.config
    with PROGRESS.at("the bigram baseline", long_running=True):
        baseline = bigram_loss(job.corpus.training, job.corpus.validation)
    for line in _introduction(job, baseline):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    folder = run_folder(config)
    totals = RunTotals(job.tokens_per_step)
    speed = update_speed(job)
    display = step_display(console, config.train.num_steps)
    with (
        watched(job, totals) as sinks,
        display.shown(),
        profiled_job(job),
        ExitStack() as opened,
    ):
        metrics: MetricsFile | None = None
        for record in run_steps(job):
            if metrics is None:  # a first step that fails touches nothing of an earlier run
                metrics = opened.enter_context(_metrics_file(job, console))
            require_held()
            metrics.write(record)
            totals.add(record)
            if speed is not None:
                speed.take(record)
            sinks.write(asdict(record))
            display.show(record)
    last = 0 if totals.last is None else totals.last.step
    if last < config.train.num_steps:
        saved = checkpoint_path(config, last).is_dir()
        words = "with a checkpoint" if saved else "without a checkpoint"
        console.print(f"preempted: ended after step {last}, {words}", highlight=False)
    console.print(summary_table(totals, baseline, folder))


def _metrics_file(job: Job, console: Console) -> MetricsFile:
    """Make the run's folder its own, and open the file for its records."""
    goes_on = job.first_step > 1
    if goes_on:
        notes = continue_run_folder(job.config, job.first_step - 1)
    else:
        notes = prepare_run_folder(job.config)
    for line in notes:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return MetricsFile(run_folder(job.config) / METRICS_NAME, goes_on=goes_on)


def _introduction(job: Job, baseline: float) -> Iterator[str]:
    """Yield the lines that say what is about to run."""
    world, config, train = job.world, job.config, job.config.train
    numel = sum(parameter.numel() for parameter in job.model.parameters())
    yield (
        f"model: {numel:,} parameters in {train.dtype} on {world.device.type}, "
        f"{world.world_size} rank(s) with {torch.get_num_threads()} thread(s) each"
    )
    yield f"data: {job.corpus.description}"
    yield f"steps: {train.num_steps} of {job.tokens_per_step:,} tokens"
    if config.schedule.warmup_steps >= train.num_steps:
        yield f"the run ends within its warmup of {config.schedule.warmup_steps} steps"
    yield f"a bigram model's validation loss: {baseline:.4f} nats"
