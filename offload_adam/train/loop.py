"""The training loop: microbatches, one optimizer step, its record, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from offload_adam.config import RunConfig
from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.coordinator.agreement import Notice
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.shutdown import Preemption
from offload_adam.coordinator.startup import World
from offload_adam.mindspore.adam import Adam
from offload_adam.optimizer import OffloadAdam
from offload_adam.profiling.phases import STEP
from offload_adam.spans import Stopwatch, span
from offload_adam.train.data import Batch, Corpus, sample_batch
from offload_adam.train.model import evaluate, next_token_loss
from offload_adam.train.records import StepRecord
from offload_adam.train.run_state import describe_kept

if TYPE_CHECKING:
    from offload_adam.train.saving import CheckpointSaver


@dataclass(frozen=True)
class Job:
    """The parts of a run, on one rank.

    model: sharded by FSDP2 if the configuration has a section `parallel`.
    parallel_model: `model`, or DistributedDataParallel around it.
    schedule: to step after each update; None if `optimizer` has its own.
    first_step: the first step of this process, counted from 1; above 1 if the run was resumed.
    first_sample: number of samples that all ranks together have seen before `first_step`.
    resumed_from: the checkpoint from which the run was resumed.
    resumed_loss: this rank's loss of the step before `first_step`, 0-d, if the optimizer has
        completed its update from kept state. What follows the update is then still to be done.
    """

    config: RunConfig
    world: World
    corpus: Corpus
    model: nn.Module
    parallel_model: nn.Module
    optimizer: OffloadAdam | Adam
    schedule: LRScheduler | None
    preemption: Preemption
    first_step: int = 1
    first_sample: int = 0
    resumed_from: Path | None = None
    resumed_loss: torch.Tensor | None = None

    @property
    def steps(self) -> range:
        """The steps of this process, with the one that was resumed from kept state."""
        first = self.first_step - (self.resumed_loss is not None)
        return range(first, self.config.train.num_steps + 1)

    @cached_property
    def config_text(self) -> str:
        """The configuration as JSON, which is kept with each step."""
        return json.dumps(self.config.model_dump(mode="json"))

    @property
    def samples_per_step(self) -> int:
        """The sequences that all ranks together train on in one step."""
        train = self.config.train
        return train.batch_size * train.gradient_accumulation_steps * self.world.data_world_size

    def samples_before(self, step: int) -> int:
        """Return the samples that all ranks together have seen before a step.

        Steps before `first_step` may have run with another number of ranks.
        """
        return self.first_sample + (step - self.first_step) * self.samples_per_step

    @property
    def tokens_per_step(self) -> int:
        """The tokens that all ranks together train on in one step."""
        return self.samples_per_step * self.config.train.sequence_length


def run_steps(job: Job, saver: CheckpointSaver) -> Iterator[StepRecord]:
    """Train, and yield a record after each step. Collective.

    After a signal, the run ends with the step in which all ranks agree to stop, and saves a
    checkpoint.
    """
    train, every = job.config.train, job.config.checkpoint.every
    for step in job.steps:
        with span(STEP, step):
            record = _run_step(job, step)
        if step == train.num_steps or (train.eval_every and step % train.eval_every == 0):
            with PROGRESS.at("evaluation"), span("evaluation"), job.world.ranks.naming_failures():
                val_loss = evaluate(job.model, job.corpus.validation, train, job.world)
            record = dataclasses.replace(record, val_loss=val_loss)
        # Before the checkpoint, so that every step of a committed checkpoint has its record.
        yield record
        outcome = job.optimizer.last_step
        stops = outcome is not None and outcome.notice.stop
        is_last = stops or step == train.num_steps
        saver.commit_written()
        is_due = stops or (every > 0 and (is_last or step % every == 0))
        # The process that began a resumed step may also have written its checkpoint.
        if is_due and not (step < job.first_step and saver.is_saved(step)):
            with span("checkpoint"):
                saver.save(step, last=is_last)
        if stops:
            return


def _run_step(job: Job, step: int) -> StepRecord:
    """Run one optimizer step, or what is left of a resumed one, and return its record."""
    start_s = time.perf_counter()
    watch = Stopwatch()
    is_resumed = step < job.first_step
    if is_resumed:
        assert job.resumed_loss is not None
        loss = job.resumed_loss
    else:
        PROGRESS.begin_step(job.optimizer.num_steps + 1)
        with job.world.ranks.naming_failures():
            loss = _accumulate_gradients(job, step, watch)
        job.optimizer.notice = Notice(stop=job.preemption.is_requested)
        if job.config.memory.keep != "none":
            job.optimizer.kept_extra = describe_kept(job, step, loss)
        with watch.span("step"):
            job.optimizer.step()
            job.optimizer.zero_grad()
    # Read after step(), which sets the rate of Adam's own schedule, and before our schedule's step.
    lr = job.optimizer.param_groups[0]["lr"]
    with watch.span("loss"):
        mean_loss = _mean_over_ranks(loss, job.world)
    outcome = job.optimizer.last_step
    assert outcome is not None, "step() has run"
    # A skipped step updates nothing and does not count for the bias correction, nor for the rate.
    if not outcome.skipped and job.schedule is not None:
        job.schedule.step()
    # Most of a resumed step has run in an earlier process.
    step_ms = math.nan if is_resumed else (time.perf_counter() - start_s) * 1e3
    within = {f"optimizer.{name}": seconds for name, seconds in outcome.timings.items()}
    timings_s = watch.elapsed_s | within
    return StepRecord(
        step=step,
        loss=mean_loss,
        lr=float(lr),
        grad_norm=outcome.total_norm,
        skipped=outcome.skipped,
        step_ms=step_ms,
        tokens_per_s=job.tokens_per_step / step_ms * 1e3,
        timings_ms={} if is_resumed else {name: s * 1e3 for name, s in timings_s.items()},
        non_finite=outcome.non_finite,
    )


def _accumulate_gradients(job: Job, step: int, watch: Stopwatch) -> torch.Tensor:
    """Run forward and backward of all microbatches; return their mean loss, 0-d.

    Gradients are reduced in the last backward only, or in every backward if `accumulate` is "host".
    FSDP2 always reduces them in every backward, because their sum has the size of the whole model
    before. It sums the shards in `.grad`.
    """
    num_microbatches = job.config.train.gradient_accumulation_steps
    section = job.config.optimizer
    scale = section.loss_scale if isinstance(section, AdamSection) else 1.0
    total = torch.zeros((), dtype=torch.float32, device=job.world.device)
    for microbatch in range(num_microbatches):
        is_last = microbatch == num_microbatches - 1
        with ExitStack() as stack:
            if not is_last and section.accumulate != "host":
                stack.enter_context(job.optimizer.no_sync())
                if isinstance(job.parallel_model, DistributedDataParallel):
                    stack.enter_context(job.parallel_model.no_sync())
            with watch.span("data"):
                batch = _next_batch(job, step, microbatch)
            with watch.span("forward"):
                loss = next_token_loss(job.parallel_model, batch) / num_microbatches
            with watch.span("backward"):
                (loss * scale).backward()
            total += loss.detach()
    return total


def _next_batch(job: Job, step: int, microbatch: int) -> Batch:
    """Return this rank's batch. Samples of a step are numbered by microbatch, then by data rank."""
    train, world = job.config.train, job.world
    number = microbatch * world.data_world_size + world.data_rank
    first = job.samples_before(step) + number * train.batch_size
    seed = job.config.run.seed
    tokens = job.corpus.training
    batch = sample_batch(tokens, train.batch_size, train.sequence_length, seed=seed, first=first)
    return batch.to(world.device)


def _mean_over_ranks(loss: torch.Tensor, world: World) -> float:
    """Return the mean of a 0-d tensor over all ranks."""
    total = loss.cpu()
    if world.world_size > 1:
        with span("all-reduce"):
            world.ranks.all_reduce(total)
    return float(total) / world.world_size
