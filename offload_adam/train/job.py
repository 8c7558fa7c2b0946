"""A run from its configuration to its summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from offload_adam.config import ConfigError, RunConfig
from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.coordinator.startup import World, joined_world
from offload_adam.kernels.threads import threads_per_rank
from offload_adam.train.bigram import bigram_loss
from offload_adam.train.corpus import Corpus, load_corpus
from offload_adam.train.loop import Job, run_steps
from offload_adam.train.model import build_model
from offload_adam.train.optimizer import build_optimizer
from offload_adam.train.progress import step_display
from offload_adam.train.records import MetricsFile, StepRecord
from offload_adam.train.run_folder import METRICS_NAME, prepare_run_folder, run_folder
from offload_adam.train.schedule import build_schedule
from offload_adam.train.summary import RunTotals, summary_table


def run_job(config: RunConfig, console: Console | None = None) -> None:
    """Train as configured, alone or as one of torchrun's ranks; rank 0 writes and reports.

    Everything that can be wrong with the configuration is tried before the ranks join.

    Raises: ConfigError where data, model or world do not fit the configuration.
    """
    world = World.from_environment()
    _refuse_unshardable(config, world)
    corpus = load_corpus(config.data, config.train.sequence_length)
    model = build_model(config)
    with joined_world() as world, _assembled(config, world, corpus, model) as job:
        if world.rank == 0:
            _train_and_report(job, console or Console())
        else:
            for _ in run_steps(job):
                pass


def _refuse_unshardable(config: RunConfig, world: World) -> None:
    section = config.optimizer
    key = "use_amsgrad" if isinstance(section, AdamSection) else "amsgrad"
    if getattr(section, key) and world.world_size > 1:
        raise ConfigError.at(
            f"optimizer.{key}", f"works on one rank only, and there are {world.world_size}"
        )


@contextmanager
def _assembled(config: RunConfig, world: World, corpus: Corpus, model: nn.Module) -> Iterator[Job]:
    """Put the job together on this rank's device, and close the optimizer after the block."""
    model = model.to(world.device)
    _copy_from_rank_0(model, world)
    # From here on each rank draws for itself: two ranks must not drop the same activations.
    torch.manual_seed(config.run.seed + world.rank)
    parallel_model = model
    if config.optimizer.gradient_reduction == "external" and world.world_size > 1:
        parallel_model = DistributedDataParallel(model)
    with closing(build_optimizer(config, parallel_model)) as optimizer:
        # Not before: where Numba starts its OpenMP threads it also sets how many torch uses.
        torch.set_num_threads(threads_per_rank(world.local_world_size))
        schedule = build_schedule(optimizer, config)
        yield Job(config, world, corpus, model, parallel_model, optimizer, schedule)


@torch.no_grad()
def _copy_from_rank_0(model: nn.Module, world: World) -> None:
    """Give all ranks rank 0's weights, should a user's factory draw them without the seed."""
    if world.world_size == 1:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        received = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(received, src=0)
        tensor.copy_(received)


def _train_and_report(job: Job, console: Console) -> None:
    """Run the steps on rank 0, which shows and writes them, and close with the summary."""
    config = job.config
    baseline = bigram_loss(job.corpus.training, job.corpus.validation)
    for line in [*prepare_run_folder(config), *_introduction(job, baseline)]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    folder = run_folder(config)
    totals = RunTotals(job.tokens_per_step)
    display = step_display(console, config.train.num_steps)
    with MetricsFile(folder / METRICS_NAME) as metrics, display.shown():
        for record in run_steps(job):
            _take(record, metrics, totals)
            display.show(record)
    console.print(summary_table(totals, baseline, folder))


def _take(record: StepRecord, metrics: MetricsFile, totals: RunTotals) -> None:
    metrics.write(record)
    totals.add(record)


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
