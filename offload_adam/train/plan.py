"""Reads the planner's inputs from a configuration or a job, without allocating parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from offload_adam.config import RunConfig
from offload_adam.config.mesh import mesh_sizes
from offload_adam.config.optimizer_sections import AdamSection
from offload_adam.config.sections import ParallelSection
from offload_adam.fsdp_private import local_of
from offload_adam.integrations.model_config import UNKNOWN_SIZES, ModelSizes
from offload_adam.layout.flat import ParameterSpec
from offload_adam.params.selection import bucket_key_of, follows_state_format
from offload_adam.plan.inputs import Training
from offload_adam.plan.shape import ModelShape, saved_numel_of
from offload_adam.sharded_optimizer.kept_values import KeptValues
from offload_adam.train.loop import Job
from offload_adam.train.model import DTYPES, build_model
from offload_adam.train.optimizer import offload_policy


def planner_inputs_of(
    config: RunConfig, *, on_device: bool, world_size: int
) -> tuple[list[ParameterSpec], Training]:
    """Return a configuration's trainable parameters, and how it trains them on one rank.

    The model is built on the meta device. The caller sets the world size of the result.

    Args:
        on_device: plan for a GPU even if none is visible.
        world_size: number of ranks, over which the section `parallel` shards the model.

    Raises:
        ConfigError: the model cannot be built, or not be sharded over these ranks.
    """
    with torch.device("meta"):
        model = build_model(config)
    training = training_of(config, on_device or torch.cuda.is_available())
    if training.policy.keeps:
        training = replace(training, buffers_nbytes=KeptValues(model).buffers_nbytes)
    training = replace(
        training,
        shape=shape_of(model),
        batch_size=config.train.batch_size,
        sequence_length=config.train.sequence_length,
        frozen_nbytes=frozen_nbytes(model),
    )
    if config.parallel is None:
        return specs_of(model), training
    return sharded_inputs(model, config.parallel, training, world_size)


_LEAST_SHARE_OF_MATRICES = 0.8
"""Share of a layer's parameters in matrices, below which its activations are not estimated."""


def shape_of(model: nn.Module, sizes: ModelSizes = UNKNOWN_SIZES) -> ModelShape:
    """Return the sizes from which a model's activations and gathered layers are estimated.

    Its layers are the children of the outermost lists of modules. Those of the list with the most
    parameters, and of others of its width, count for activations: encoder and decoder, but not the
    vision tower of a language model. Without lists, the whole model is one layer.

    Args:
        sizes: those that the model's configuration names.
    """
    lists = [*_outermost_lists(model)]
    layers = [layer for one in lists for layer in one if _numel_of(layer)] or [model]
    in_layers = _numel_of(nn.ModuleList(layers))
    main = max(lists, key=_numel_of, default=nn.ModuleList([model]))
    width = sizes.width or _common_width(main)
    counted = [
        layer
        for one in (lists or [main])
        if one is main or _common_width(one) == _common_width(main)
        for layer in one
        if _numel_of(layer)
    ]
    saved = [_saved_numel(layer, width, sizes.num_experts) for layer in counted]
    num_logits = sizes.num_logits
    if num_logits is None:
        num_logits = _num_logits(model, lists, width)
    passes = max(1.0, (sizes.num_layers or 0) / max(1, len(counted)))  # of shared layers
    is_known = sizes.reads_tokens and width > 0 and None not in saved
    known = [numel for numel in saved if numel is not None] if is_known else []
    return ModelShape(
        num_layers=round(passes * len(counted)),
        layer_numel=max(map(_numel_of, layers)),
        root_numel=_numel_of(model) - in_layers,
        width=width,
        saved_numel=round(passes * sum(known)),
        largest_saved_numel=max(known, default=0),
        vocabulary=num_logits,
        itemsize=max(parameter.element_size() for parameter in model.parameters()),
    )


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _common_width(module: nn.Module) -> int:
    """Return the most common dimension of the matrices in a module; 0 without any."""
    widths: Counter[int] = Counter()
    for parameter in module.parameters():
        if parameter.ndim == 2:
            widths.update(parameter.shape)
    return widths.most_common(1)[0][0] if widths else 0


def _saved_numel(layer: nn.Module, width: int, num_experts: tuple[int, int] | None) -> int | None:
    """Return the elements that a layer saves for a token; None if it is not made of matrices."""
    matrices: list[tuple[float, float]] = []
    total = in_matrices = 0
    experts, active = num_experts or (0, 0)
    for name, parameter in layer.named_parameters():
        total += parameter.numel()
        is_stacked = parameter.ndim == 3 and parameter.shape[0] == experts
        if parameter.ndim == 2 or is_stacked:
            in_matrices += parameter.numel()
            rows, columns = parameter.shape[-2:]
            share = float(active) if is_stacked else 1.0
            if parameter.ndim == 2 and experts and ".experts." in f".{name}":
                share = active / experts
            matrices.append((rows * share, columns * share))
    if in_matrices < _LEAST_SHARE_OF_MATRICES * total:
        return None
    return saved_numel_of(matrices, width)


def _num_logits(model: nn.Module, lists: Sequence[nn.ModuleList], width: int) -> int:
    """Return the outputs of the widest Linear outside of layers that reads a token's elements."""
    inside = {module for one in lists for module in one.modules()}
    heads = (m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside)
    return max((m.out_features for m in heads if m.in_features == width), default=0)


def frozen_nbytes(model: nn.Module) -> int:
    """Return the bytes of the parameters that are not trained."""
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in frozen)


def _numel_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sharded_inputs(
    model: nn.Module, section: ParallelSection, training: Training, world_size: int
) -> tuple[list[ParameterSpec], Training]:
    """Return the sizes of rank 0's parts of a model that is not sharded yet, and how it trains.

    Rank 0 has the largest parts. The bytes of gathered layers are an estimate: those of the root
    and of two units, and the gradients of one unit, which FSDP2 copies once to average them.
    """
    sizes = mesh_sizes(section, world_size)
    # FSDP2 takes a second to import, so only a plan with this section imports it.
    from offload_adam.train.parallel import split_dims, units_of

    split = split_dims(model, sizes.tensor)
    unit_of = {
        parameter: number
        for number, unit in enumerate(dict.fromkeys(units_of(model)))
        for parameter in unit.parameters()
    }
    itemsize = 0  # of the dtype in which layers compute
    specs: list[ParameterSpec] = []
    gathered: Counter[int] = Counter()
    for parameter in model.parameters():
        unit = unit_of.get(parameter, -1)
        shape, dim = list(parameter.shape), split.get(parameter)
        if dim is not None:
            shape[dim] //= sizes.tensor
        computed = DTYPES[section.param_dtype] if section.param_dtype else parameter.dtype
        itemsize = max(itemsize, computed.itemsize)
        gathered[unit] += math.prod(shape) * computed.itemsize
        shape[0] = -(-shape[0] // sizes.shard)
        if parameter.requires_grad:
            # As `LocalShard.key`: parameters share a bucket if the same ranks have copies of them.
            specs.append(
                ParameterSpec(
                    len(specs),
                    math.prod(shape),
                    parameter.element_size(),
                    bucket_key_of(parameter),
                    unit=f"{unit}, {'whole' if dim is None else 'split'}",
                    num_shards=sizes.replicate,
                    is_bfloat16=parameter.dtype == torch.bfloat16,
                    follows_state_format=follows_state_format(parameter),
                )
            )
    root = gathered.pop(-1, 0)
    largest = max(gathered.values(), default=root)
    return specs, replace(
        training,
        on_device=training.on_device and not section.offload_weights,
        sharded=True,
        reduces=False,
        gathered_nbytes=root + 4 * largest,
        gathers_on_device=training.on_device,
        frozen_nbytes=-(-training.frozen_nbytes // sizes.shard),
        shape=training.shape and replace(training.shape, itemsize=itemsize),
    )


def specs_of(model: nn.Module) -> list[ParameterSpec]:
    """Return the sizes and bucket keys of a model's trainable parameters, for `Training.plan`.

    Of a sharded model, those of this rank's shards.
    """
    trainable = [local_of(parameter) for parameter in model.parameters() if parameter.requires_grad]
    return [
        ParameterSpec(
            i,
            p.numel(),
            p.element_size(),
            bucket_key_of(p),
            is_bfloat16=p.dtype == torch.bfloat16,
            follows_state_format=follows_state_format(p),
        )
        for i, p in enumerate(trainable)
    ]


def rows_of(model: nn.Module) -> list[int]:
    """Return the size of the first dimension of each parameter in `specs_of`, at least 1."""
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [max(1, *parameter.shape[:1]) if parameter.ndim else 1 for parameter in trainable]


def training_of_job(job: Job) -> Training:
    """Return how a job trains, with its world size."""
    world, parallel = job.world, job.config.parallel
    training = training_of(job.config, world.device.type == "cuda")
    if parallel is not None:
        # Each rank updates its own shards, as a run of one rank. FSDP2 sends all that is sent.
        on_device = training.on_device and not parallel.offload_weights
        return replace(training, on_device=on_device, sharded=True, reduces=False)
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
        state_format=section.state_format,
        amsgrad=section.use_amsgrad if isinstance(section, AdamSection) else section.amsgrad,
        offload=offload_policy(config),
        replicated=isinstance(section, AdamSection) and not section.streams,
        saves=config.checkpoint.every > 0,
        num_tokens=train.batch_size * train.sequence_length * train.gradient_accumulation_steps,
    )
