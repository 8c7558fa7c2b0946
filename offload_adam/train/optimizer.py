"""The job's `OffloadAdam`, made from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from offload_adam.config import RunConfig
from offload_adam.config.sections import OptimizerSection
from offload_adam.optimizer import OffloadAdam


def build_optimizer(config: RunConfig, model: nn.Module) -> OffloadAdam:
    """Return the optimizer of `model`'s trainable parameters."""
    section = config.optimizer
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
        max_grad_norm=section.max_grad_norm,
        module=model if section.streaming else None,
        gradient_reduction=section.gradient_reduction,
        reduce_dtype=torch.float32 if section.reduce_dtype else None,
        accumulate=section.accumulate,
        num_threads=section.num_threads,
        pin_memory=config.memory.pin,
        **_bucket_size(section),
    )


def decay_groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups: weight decay acts on matrices, not on biases and norms.

    Source: common practice since Brown et al., "Language Models are Few-Shot Learners" (2020).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    others = [parameter for parameter in trainable if parameter.dim() < 2]
    if matrices:
        yield {"params": matrices, "weight_decay": weight_decay}
    if others:
        yield {"params": others, "weight_decay": 0.0}


def _bucket_size(section: OptimizerSection) -> dict[str, Any]:
    """Return the bucket size where one is given, and leave the optimizer's default alone else."""
    return {} if section.bucket_nbytes is None else {"bucket_nbytes": section.bucket_nbytes}
