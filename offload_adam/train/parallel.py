"""Shards the job's model over the ranks: FSDP2, and tensor parallelism of the built-in model.

parallel: {replicate: 2, shard: 2, tensor: 2} on 8 ranks

rank             0  1  2  3  4  5  6  7
replica          0  0  0  0  1  1  1  1
shard            0  0  1  1  0  0  1  1
part of a block  0  1  0  1  0  1  0  1    tensor parallelism
batch            0  0  1  1  2  2  3  3    `World.data_rank`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from offload_adam.config import ConfigError
from offload_adam.config.mesh import mesh_sizes
from offload_adam.config.sections import ParallelSection
from offload_adam.coordinator.startup import World
from offload_adam.train.model import DTYPES, GPT, Block

_STYLES: dict[str, type[ColwiseParallel] | type[RowwiseParallel]] = {
    "attention.query": ColwiseParallel,
    "attention.key": ColwiseParallel,
    "attention.value": ColwiseParallel,
    "attention.output": RowwiseParallel,
    "mlp_input": ColwiseParallel,
    "mlp_output": RowwiseParallel,
}
"""How tensor parallelism splits the layers of a block: by the rows or columns of a weight."""


def shard_model(section: ParallelSection, world: World, model: nn.Module) -> None:
    """Shard a model on the CPU, and move this rank's part to its device. Collective.

    Args:
        model: with the same values on all ranks.

    Raises:
        ConfigError: FSDP2 cannot shard the model.
    """
    sizes = mesh_sizes(section, world.world_size)
    used = {name: n for name, n in sizes._asdict().items() if n > 1 or name == "shard"}
    mesh = init_device_mesh(
        world.device.type, tuple(used.values()), mesh_dim_names=tuple(used.keys())
    )
    units = list(dict.fromkeys(units_of(model)))
    _reject_shared(model, units)
    if "tensor" in used:
        assert isinstance(model, GPT), "the configuration rejects other models"
        _divide_blocks(model, mesh["tensor"])
    offloads, on_device = section.offload_weights, world.device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if "replicate" in used else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=section.param_dtype and DTYPES[section.param_dtype],
            reduce_dtype=section.reduce_dtype and DTYPES[section.reduce_dtype],
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_device) if offloads else OffloadPolicy(),
    }
    try:
        for unit in units:
            fully_shard(unit, reshard_after_forward=section.reshard_after_forward, **options)
        # The backward begins with the root, which would be gathered again at once.
        fully_shard(model, reshard_after_forward=False, **options)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError.at("parallel", f"FSDP2 cannot shard the model: {error}") from error


def units_of(module: nn.Module, *, listed: bool = False) -> Iterator[nn.Module]:
    """Yield what FSDP2 gathers at a time: the children of ModuleLists that have parameters.

    Containers in a ModuleList have no forward, so their children are yielded instead.
    """
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList)
        if is_list or not listed or isinstance(child, nn.ModuleDict):
            yield from units_of(child, listed=listed or is_list)
        elif any(True for _ in child.parameters()):
            yield child


def _reject_shared(model: nn.Module, units: list[nn.Module]) -> None:
    """Reject a parameter of two units, or of one and the rest, which FSDP2 would shard twice.

    The two would train apart.

    Raises:
        ConfigError: with the names that the parameter has.
    """
    inside = {module for unit in units for module in unit.modules()}
    rest = [module for module in model.modules() if module not in inside]
    owners = [set(unit.parameters()) for unit in units]
    owners.append({own for module in rest for own in module.parameters(recurse=False)})
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, both in names.items():
        if sum(parameter in owned for owned in owners) > 1:
            raise ConfigError.at(
                "parallel",
                f"{' and '.join(both)} are one parameter, which FSDP2 would shard twice, because "
                "it shards each child of a ModuleList apart: move the modules that share it out "
                "of the ModuleLists",
            )


def _divide_blocks(model: GPT, mesh: DeviceMesh) -> None:
    """Give each rank of the mesh an equal share of the heads and of the MLP of each block."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.split_projection()
        plan: dict[str, ParallelStyle] = {
            # One DTensor for the three projections, whose input gradients are then summed once.
            "attention": PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
            ),
            **{name: style() for name, style in _STYLES.items()},
        }
        # All ranks have the same values already, so none is sent.
        parallelize_module(block, mesh, plan, src_data_rank=None)


def split_dims(model: nn.Module, num_parts: int) -> dict[nn.Parameter, int]:
    """Return the dimension along which tensor parallelism splits each parameter that it splits.

    Splits the projections of the built-in model first, as `shard_model` does.

    Args:
        num_parts: ranks that share a block; the result is empty for 1.
    """
    found: dict[nn.Parameter, int] = {}
    for block in model.blocks if isinstance(model, GPT) and num_parts > 1 else ():
        assert isinstance(block, Block)
        block.attention.split_projection()
        for name, module in block.named_modules():
            style = _STYLES.get(name)
            if isinstance(module, nn.Linear) and style is not None:
                assert isinstance(module.weight, nn.Parameter)
                found[module.weight] = 0 if style is ColwiseParallel else 1
                if style is ColwiseParallel and module.bias is not None:
                    found[module.bias] = 0
    return found
