"""Runs a job from its configuration to its summary: checks, ranks, optimizer, steps, saves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import chain
from typing import NamedTuple, TextIO, TypeVar

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from offload_adam.config import ConfigError, Mistake, RunConfig
from offload_adam.config.mesh import mesh_sizes
from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.coordinator.launcher import launched
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import require_same
from offload_adam.coordinator.shutdown import EndingGuard, preemptible
from offload_adam.coordinator.startup import COLLECTIVE_TIMEOUT, World, final, joined_world
from offload_adam.errors import (
    CheckpointError,
    HostMemoryError,
    KeptStateError,
    RankDisagreementError,
)
from offload_adam.kernels.threads import ThreadSettingsError, cores_per_rank
from offload_adam.mindspore.adam import Adam
from offload_adam.optimizer import OffloadAdam
from offload_adam.sinks.sink import reject_missing_extras
from offload_adam.train.console import StepDisplay, compare_with_bigram, print_line, summary_table
from offload_adam.train.data import Corpus, bigram_loss, load_corpus
from offload_adam.train.kept import may_resume_kept, resume_kept
from offload_adam.train.loop import Job, run_steps
from offload_adam.train.model import build_model, find_factory
from offload_adam.train.observation import opened_sinks
from offload_adam.train.optimizer import build_optimizer, build_schedule, failure_policy
from offload_adam.train.profiler import profiled_job
from offload_adam.train.records import RunTotals
from offload_adam.train.run_folder import (
    has_record,
    locked_run_folder,
    open_run_folder,
    require_writable,
    run_folder,
)
from offload_adam.train.saving import (
    CheckpointSaver,
    checkpoint_path,
    describe_lost_steps,
    require_shared_folder,
    resume,
)
from offload_adam.train.speeds import update_speed

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Outcome(NamedTuple):
    """How a run that raised no error ended.

    step: the last step that has run.
    preempted: whether a signal ended the run before its last step.
    saved: whether there is a checkpoint of `step`.
    """

    step: int
    preempted: bool
    saved: bool


def run_job(config: RunConfig, console: Console | None = None) -> Outcome:
    """Train as configured, alone or as one of torchrun's ranks.

    Rank 0 alone prints the steps and writes their records; all ranks write checkpoints. Mistakes in
    the configuration that one rank can find alone are reported before the ranks join.

    Raises:
        ConfigError: the data, the model or the environment do not fit the configuration.
        HostMemoryError: the state does not fit into a node's memory.
        PeerFailedError: ranks have died, hung, or never joined. If the training thread cannot
            raise it, because it hangs in a collective of DDP or of the user, the process exits.
    """
    corpus, model = prepare(config)
    # Left in reverse order: an error in the body first starts the time limit of the clean-up, the
    # optimizer closes before its process groups, and the lock is released last.
    with (
        locked_run_folder(config) as require_held,
        _joined(config) as world,
        EndingGuard(world.ranks) as guard,
        preemptible(world.ranks, lambda: describe_lost_steps(config)) as preemption,
        _assembled(config, world, corpus, model) as (parallel_model, optimizer),
        guard.hurried(),
    ):
        schedule = build_schedule(optimizer, config)
        job = Job(config, world, corpus, model, parallel_model, optimizer, schedule, preemption)
        with final(CheckpointError, ConfigError):  # a restart would raise them again
            job = resume(job) if optimizer.resumed_step is None else resume_kept(job)
            require_shared_folder(job)
        last_step = job.first_step - 1
        saver = CheckpointSaver(job, require_held)
        if not job.steps:
            if world.rank == 0:
                logger.info(
                    "Nothing to do: the run is at step %d, and train.num_steps is %d",
                    last_step,
                    config.train.num_steps,
                )
        elif world.rank == 0:
            last_step = _train_and_report(job, saver, console or Console(), require_held)
        else:
            with profiled_job(job):
                for record in run_steps(job, saver):
                    last_step = record.step
        preempted = last_step < config.train.num_steps
        saved = checkpoint_path(config, last_step).is_dir()
        is_over = last_step == config.train.num_steps and config.checkpoint.every == 0
        if not preempted and (saved or is_over):
            optimizer.discard_kept()
        return Outcome(last_step, preempted, saved)


@contextmanager
def _joined(config: RunConfig) -> Iterator[World]:
    """Join the ranks for the body."""
    failures, parallel = failure_policy(config), config.parallel
    # Above `stuck_after`, so that a hung rank is declared hung, with its name, before a collective
    # times out without one.
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * failures.stuck_after))
    # FSDP2 needs a process group also on one rank.
    with joined_world(timeout, failures, opens_alone=parallel is not None) as world:
        yield world if parallel is None else replace(world, ranks_per_batch=parallel.tensor)


def prepare(config: RunConfig) -> tuple[Corpus, nn.Module]:
    """Make all checks that need no other rank; return the data, and the model on the CPU.

    Raises:
        ConfigError: with every mistake found in environment, packages, run folder, data and model.
            The user's model factory may take long, so it is imported but not called if there are
            mistakes already.
    """
    mistakes: list[Mistake] = []

    def collect(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except ConfigError as error:
            mistakes.extend(error.mistakes)
            return None

    collect(_require_environment)
    collect(lambda: _require_one_rank_for_amsgrad(config))
    collect(lambda: _require_ranks_of_mesh(config))
    collect(lambda: reject_missing_extras(config.observe))
    if launched("RANK") == 0:
        collect(lambda: require_writable(config))
    corpus = collect(lambda: load_corpus(config.data, config.train.sequence_length))
    factory = config.model.factory
    if mistakes and factory is not None:
        collect(lambda: find_factory(factory))
    model = None if mistakes else collect(lambda: build_model(config))
    if corpus is None or model is None:
        raise ConfigError("configuration", mistakes)
    return corpus, model


def _require_environment() -> None:
    """Check torchrun's variables."""
    try:
        World.from_environment()
    except ValueError as error:
        raise ConfigError.at("environment", str(error)) from error


def _require_one_rank_for_amsgrad(config: RunConfig) -> None:
    key = "use_amsgrad" if isinstance(config.optimizer, AdamSection) else "amsgrad"
    # Not from `World`, so that this mistake is also found if the environment is invalid.
    world_size = launched("WORLD_SIZE")
    if getattr(config.optimizer, key) and world_size > 1:
        raise ConfigError.at(
            f"optimizer.{key}",
            f"works on one rank only, not on {world_size}: set it to false, or start one rank",
        )


def _require_ranks_of_mesh(config: RunConfig) -> None:
    world_size = launched("WORLD_SIZE")
    if config.parallel is not None and world_size > 0:
        mesh_sizes(config.parallel, world_size)


@contextmanager
def _assembled(
    config: RunConfig, world: World, corpus: Corpus, model: nn.Module
) -> Iterator[tuple[nn.Module, OffloadAdam | Adam]]:
    """Build the optimizer on this rank's device, and close it after the body.

    Errors during construction are final: a restart would raise them again.

    Yields:
        The model, sharded, or in DistributedDataParallel if that averages the gradients; and the
        optimizer.

    Raises:
        ConfigError: Numba cannot start its threads as set in the environment.
    """
    with final(TypeError, ValueError, RankDisagreementError, HostMemoryError, KeptStateError):
        # What must be the same on all ranks before they build the optimizer.
        fields: list[tuple[str, str]] = []
        for section, values in config.model_dump(mode="json").items():
            present = values or {}  # a section may be absent
            fields += [(f"{section}.{key}", json.dumps(value)) for key, value in present.items()]
        fields.append(("the data", corpus.description))
        require_same(world.ranks, "configuration", fields)
        resumes_kept = may_resume_kept(config, world.ranks)
        parallel_model = _distributed(config, world, model)
        try:
            optimizer = build_optimizer(config, parallel_model, resumes_kept=resumes_kept)
        except ThreadSettingsError as error:
            raise ConfigError.at("environment", str(error)) from error
    with closing(optimizer):
        # After the optimizer is built: Numba then starts its OpenMP threads, which also sets
        # torch's number of threads.
        torch.set_num_threads(cores_per_rank(world.local_world_size))
        yield parallel_model, optimizer


def _distributed(config: RunConfig, world: World, model: nn.Module) -> nn.Module:
    """Move the model with rank 0's weights to this rank's device; shard or wrap it if configured.

    Raises:
        ConfigError: the model cannot be sharded.
    """
    if config.parallel is None:
        model = model.to(world.device)
    if world.world_size > 1:
        # A user's factory may ignore the seed, so ranks may have different weights.
        for tensor in chain(model.parameters(), model.buffers()):
            received = tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
            world.ranks.broadcast(received)
            tensor.detach().copy_(received)
    # Another seed for each batch: their dropout must differ.
    torch.manual_seed(config.run.seed + world.data_rank)
    if config.parallel is not None:
        from offload_adam.train.parallel import shard_model  # with FSDP2, which takes a second

        # From host memory, layer by layer: the whole model may not fit into a GPU.
        shard_model(config.parallel, world, model)
        return model
    if config.optimizer.gradient_reduction == "external" and world.world_size > 1:
        return DistributedDataParallel(model)
    return model


def _train_and_report(
    job: Job, saver: CheckpointSaver, console: Console, require_held: Callable[[], None]
) -> int:
    """Run the steps on rank 0, write and print their records, and return the last step.

    Args:
        require_held: raises an error if another job has taken over the run's folder.
    """
    config = job.config
    with PROGRESS.at("the bigram baseline", long_running=True):
        baseline = bigram_loss(job.corpus.training, job.corpus.validation)
    for line in _introduction(job, baseline):
        print_line(console, line)
    totals = RunTotals(job.tokens_per_step)
    speed = update_speed(job)
    display = StepDisplay(console, config.train.num_steps)
    with (
        opened_sinks(job, totals, saver.totals) as sinks,
        display.shown(),
        profiled_job(job),
        ExitStack() as opened,
    ):
        metrics: TextIO | None = None
        for record in run_steps(job, saver):
            is_written = record.is_resumed and has_record(config, record)
            if metrics is None:
                # Only now, so that a run whose first step fails leaves an earlier run's files as
                # they are.
                last_step = record.step if is_written else record.step - 1
                metrics = opened.enter_context(open_run_folder(config, last_step))
            require_held()
            if not is_written:
                metrics.write(record.to_json() + "\n")
            totals.add(record)
            if speed is not None:
                speed.add(record)
            sinks.write(asdict(record))
            display.show(record)
    assert totals.last is not None, "a run has a step"
    last = totals.last.step
    if last < config.train.num_steps:
        saved = checkpoint_path(config, last).is_dir()
        words = "with a checkpoint" if saved else "without a checkpoint"
        print_line(console, f"preempted: ended after step {last}, {words}")
    console.print(summary_table(totals, baseline, run_folder(config)))
    tokens = job.samples_before(last + 1) * config.train.sequence_length
    for line in compare_with_bigram(
        totals.last.val_loss, baseline, last, tokens, len(job.corpus.training)
    ):
        print_line(console, line)
    return last


def _introduction(job: Job, baseline: float) -> Iterator[str]:
    """Yield the lines that describe the run before its first step."""
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
