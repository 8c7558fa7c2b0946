"""Reads the planner's inputs from a configuration or a job, without allocating parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from offload_adam.config import ConfigError, RunConfig
from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.fsdp_private import local_of
from offload_adam.layout.flat import ParameterSpec
from offload_adam.params.selection import bucket_key_of
from offload_adam.plan.inputs import Training
from offload_adam.train.loop import Job
from offload_adam.train.model import build_model
from offload_adam.train.optimizer import offload_policy


def planner_inputs_of(
    config: RunConfig, *, on_device: bool
) -> tuple[list[ParameterSpec], Training]:
    """Return a configuration's trainable parameters, and how it trains them on one rank.

    The model is built on the meta device. The caller sets the world size.

    Args:
        on_device: plan for a GPU even if none is visible.

    Raises:
        ConfigError: the model cannot be built, or is to be sharded.
    """
    if config.parallel is not None:
        raise ConfigError.at(
            "parallel",
            "offload-adam plan does not know the memory of sharded parameters yet: remove the "
            "section, or add --parallel=null, to plan for a whole model on each rank",
        )
    with torch.device("meta"):
        model = build_model(config)
    return specs_of(model), training_of(config, on_device or torch.cuda.is_available())


def specs_of(model: nn.Module) -> list[ParameterSpec]:
    """Return the sizes and bucket keys of a model's trainable parameters.

    Of a sharded model, those of this rank's shards.
    """
    trainable = [local_of(parameter) for parameter in model.parameters() if parameter.requires_grad]
    return [
        ParameterSpec(i, p.numel(), p.element_size(), bucket_key_of(p))
        for i, p in enumerate(trainable)
    ]


def training_of_job(job: Job) -> Training:
    """Return how a job trains, with its world size."""
    world, parallel = job.world, job.config.parallel
    training = training_of(job.config, world.device.type == "cuda")
    if parallel is not None:
        # Each rank updates its own shards, as a run of one rank. FSDP2 sends all that is sent.
        on_device = training.on_device and not parallel.offload_weights
        return replace(training, on_device=on_device, reduces=False)
    return replace(training, world_size=world.world_size, local_world_size=world.local_world_size)


def training_of(config: RunConfig, on_device: bool) -> Training:
    """Return how a configuration trains its parameters; the caller sets the world size."""
    section, train = config.optimizer, config.train
    return Training(
        on_device=on_device,
        streams=section.streams,
        reduces=section.gradient_reduction == "optimizer",
        overlap=section.overlap,
        accumulates=section.accumulate == "host",
        reduce_fp32=section.reduce_dtype is not None,
        amsgrad=section.use_amsgrad if isinstance(section, AdamSection) else section.amsgrad,
        offload=offload_policy(config),
        replicated=isinstance(section, AdamSection) and not section.streams,
        saves=config.checkpoint.every > 0,
        num_tokens=train.batch_size * train.sequence_length * train.gradient_accumulation_steps,
    )
