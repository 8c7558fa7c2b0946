"""The job's optimizer and learning-rate schedule, built from the configuration."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from offload_adam.config import RunConfig
from offload_adam.config.declared import read_options
from offload_adam.config.optimizer_sections import AdamSection, ExecutionKeys
from offload_adam.fsdp_private import num_sharing
from offload_adam.mindspore.adam import Adam
from offload_adam.optimizer import OffloadAdam
from offload_adam.options import ExecutionOptions, FailurePolicy, OffloadPolicy
from offload_adam.schedules import schedule_from_state
from offload_adam.train.run_folder import run_folder


def build_optimizer(
    config: RunConfig, model: nn.Module, *, resumes_kept: bool = False
) -> OffloadAdam | Adam:
    """Return the optimizer of `model`'s trainable parameters.

    Args:
        resumes_kept: continue from kept state if there is any; if False, replace it.
    """
    section = config.optimizer
    # The keys of a section are the names of its optimizer's arguments. `read_options` returns those
    # that both optimizers have.
    own = type(section).model_fields.keys() - ExecutionKeys.model_fields.keys() - {"name"}
    arguments = {key: getattr(section, key) for key in own} | read_options(config, ExecutionOptions)
    if config.parallel is not None:
        arguments["gradient_reduction"] = None  # FSDP2 averages them
    arguments["reduce_dtype"] = torch.float32 if section.reduce_dtype else None
    arguments["offload"] = replace(offload_policy(config), resume_kept=resumes_kept)
    arguments["failures"] = failure_policy(config)
    if isinstance(section, AdamSection):
        if isinstance(section.learning_rate, dict):
            arguments["learning_rate"] = schedule_from_state(section.learning_rate)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return Adam(named, module=model, **arguments)
    module = model if arguments.pop("streaming") else None
    return OffloadAdam(list(decay_groups(model, section.weight_decay)), module=module, **arguments)


def offload_policy(config: RunConfig) -> OffloadPolicy:
    """Return the options for where the optimizer stores its state and how it moves data."""
    options = read_options(config, OffloadPolicy)
    if config.memory.keep != "none":
        options["keep_path"] = keep_path(config)
    return OffloadPolicy(**options, snapshot_buffer_nbytes=config.checkpoint.used_buffer_nbytes)


def keep_path(config: RunConfig) -> str:
    """Return the folder of kept state: as configured, or one of this user and run."""
    if config.memory.keep_path is not None:
        return str(config.memory.keep_path)
    # Runs of one name in different folders must not meet in one file.
    folder = hashlib.sha256(os.fsencode(run_folder(config).absolute())).hexdigest()[:8]
    # The keeper's folder has only its socket. systemd may empty /dev/shm when the user logs out.
    parent = "/tmp" if config.memory.keep == "keeper" else "/dev/shm"
    return f"{parent}/offload_adam-{os.getuid()}/{config.run.name}-{folder}"


def failure_policy(config: RunConfig) -> FailurePolicy:
    """Return the time limits after which a rank is declared dead or hung."""
    return FailurePolicy(**read_options(config, FailurePolicy))


def decay_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups of the trainable parameters.

    Tensors with two or more dimensions get the weight decay; biases and norms get none.

    Tensor parallelism divides only some parameters. The others are sharded over fewer ranks, of
    which there are several sets with the same parameters, and have groups of their own.

    Source: common practice since Brown et al., "Language Models are Few-Shot Learners" (2020).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    most = max(map(num_sharing, trainable))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in trainable:
        key = (num_sharing(parameter) < most, parameter.dim() < 2)
        groups.setdefault(key, []).append(parameter)
    for (has_copies, is_vector), parameters in sorted(groups.items()):
        group = {"params": parameters, "weight_decay": 0.0 if is_vector else weight_decay}
        yield group | ({"replicas": "copies"} if has_copies else {})


def build_schedule(optimizer: Optimizer, config: RunConfig) -> LRScheduler | None:
    """Return the scheduler to step after each update, or None if Adam's own schedule applies.

    The rate rises linearly over W warmup updates, then falls along a cosine. Update u of N, counted
    from 0, uses `lr * (u + 1) / (W + 1)` while u < W, and then
    `floor + (lr - floor) * (1 + cos(pi * (u - W) / (N - W))) / 2` with `floor = min_lr_ratio * lr`.
    """
    section = config.optimizer
    if isinstance(section, AdamSection) and section.schedules_itself:
        return None
    warmup_steps = config.schedule.warmup_steps
    # At least 1, since torch divides by it, and a run that ends within its warmup has no decay.
    decay_steps = max(1, config.train.num_steps - warmup_steps)
    floor = config.schedule.min_lr_ratio * optimizer.param_groups[0]["lr"]
    decay = CosineAnnealingLR(optimizer, decay_steps, eta_min=floor)
    if warmup_steps == 0:
        return decay
    # The learning rate of the first update must be above zero.
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
