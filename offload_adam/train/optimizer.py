"""The job's optimizer and learning-rate schedule, built from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from offload_adam.config import RunConfig
from offload_adam.config.declared import read_options
from offload_adam.config.optimizer_sections import AdamSection, OffloadAdamSection
from offload_adam.mindspore.adam import Adam
from offload_adam.optimizer import OffloadAdam
from offload_adam.options import ExecutionOptions, FailurePolicy, OffloadPolicy
from offload_adam.schedules import schedule_from_state


def build_optimizer(config: RunConfig, model: nn.Module) -> OffloadAdam | Adam:
    """Return the optimizer of `model`'s trainable parameters."""
    section = config.optimizer
    execution = read_options(config, ExecutionOptions)  # the arguments that both optimizers take
    execution["reduce_dtype"] = torch.float32 if execution["reduce_dtype"] else None
    execution |= {"offload": offload_policy(config), "failures": failure_policy(config)}
    if isinstance(section, AdamSection):
        return _adam(section, model, execution)
    return _offload_adam(section, model, execution)


def _offload_adam(
    section: OffloadAdamSection, model: nn.Module, execution: dict[str, Any]
) -> OffloadAdam:
    return OffloadAdam(
        list(decay_groups(model, section.weight_decay)),
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        amsgrad=section.amsgrad,
        nesterov=section.nesterov,
        maximize=section.maximize,
        decoupled_weight_decay=section.decoupled_weight_decay,
        module=model if section.streaming else None,
        **execution,
    )


def _adam(section: AdamSection, model: nn.Module, execution: dict[str, Any]) -> Adam:
    rate = section.learning_rate
    return Adam(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        learning_rate=schedule_from_state(rate) if isinstance(rate, dict) else rate,
        beta1=section.beta1,
        beta2=section.beta2,
        eps=section.eps,
        use_locking=section.use_locking,
        use_nesterov=section.use_nesterov,
        weight_decay=section.weight_decay,
        loss_scale=section.loss_scale,
        use_amsgrad=section.use_amsgrad,
        use_lazy=section.use_lazy,
        use_offload=section.use_offload,
        epsilon_hat=section.epsilon_hat,
        decay_norms=section.decay_norms,
        module=model,
        **execution,
    )


def offload_policy(config: RunConfig) -> OffloadPolicy:
    """Return where the optimizer stores its state, and how it is moved."""
    return OffloadPolicy(
        **read_options(config, OffloadPolicy),
        snapshot_buffer_nbytes=config.checkpoint.used_buffer_nbytes,
    )


def failure_policy(config: RunConfig) -> FailurePolicy:
    """Return the time limits after which a rank is declared dead or hung."""
    return FailurePolicy(**read_options(config, FailurePolicy))


def decay_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups: weight decay for matrices, none for biases and norms.

    Source: common practice since Brown et al., "Language Models are Few-Shot Learners" (2020).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    others = [parameter for parameter in trainable if parameter.dim() < 2]
    if matrices:
        yield {"params": matrices, "weight_decay": weight_decay}
    if others:
        yield {"params": others, "weight_decay": 0.0}


def build_schedule(optimizer: Optimizer, config: RunConfig) -> LRScheduler | None:
    """Return the scheduler to step after each update; None if Adam has a schedule of its own.

    The rate rises linearly over W warmup updates, then falls along a cosine. Update u of N, counted
    from 0, uses `lr * (u + 1) / (W + 1)` while u < W, and then
    `floor + (lr - floor) * (1 + cos(pi * (u - W) / (N - W))) / 2` with `floor = min_lr_ratio * lr`.
    """
    section = config.optimizer
    if isinstance(section, AdamSection) and section.schedules_itself:
        return None
    warmup_steps = config.schedule.warmup_steps
    # At least 1: a run that ends within its warmup has no decay steps, and torch divides by them.
    decay_steps = max(1, config.train.num_steps - warmup_steps)
    floor = config.schedule.min_lr_ratio * optimizer.param_groups[0]["lr"]
    decay = CosineAnnealingLR(optimizer, decay_steps, eta_min=floor)
    if warmup_steps == 0:
        return decay
    # warmup_steps + 1, so that the first update has a rate above zero.
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
