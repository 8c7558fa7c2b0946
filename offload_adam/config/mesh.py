"""The sizes of the mesh of ranks over which the section `parallel` shards a model."""

from __future__ import annotations

from typing import NamedTuple

from offload_adam.config.mistakes import ConfigError
from offload_adam.config.sections import ParallelSection


class MeshSizes(NamedTuple):
    """The sizes of the mesh. Their product is the number of ranks."""

    replicate: int
    shard: int
    tensor: int


def mesh_sizes(section: ParallelSection, world_size: int) -> MeshSizes:
    """Return the sizes of the mesh on `world_size` ranks.

    Raises:
        ConfigError: the sizes do not multiply to the number of ranks.
    """
    replicate, tensor = section.replicate, section.tensor
    shard, rest = divmod(world_size, replicate * tensor)
    if section.shard in (None, shard) and rest == 0:
        return MeshSizes(replicate, shard, tensor)
    if section.shard is None:
        given = f"replicate {replicate} * tensor {tensor} is {replicate * tensor}"
        problem = f"{given}, which does not divide the {world_size} rank(s) of this run"
        remedy = f"change one of them, or start a multiple of {replicate * tensor} ranks"
    else:
        total = replicate * section.shard * tensor
        given = f"replicate {replicate} * shard {section.shard} * tensor {tensor} is {total}"
        problem = f"{given}, but this run has {world_size} rank(s)"
        remedy = f"change one of them, or start {total} rank(s) with torchrun"
        if rest == 0:
            remedy = f"set parallel.shard to {shard}, or start {total} rank(s) with torchrun"
    raise ConfigError.at("parallel", f"{problem}: {remedy}")
