"""Parameters that FSDP2 or tensor parallelism has sharded: this rank's part of each.

Such a parameter is a DTensor. The optimizer keeps the state of this rank's part only. Where a
dimension of the mesh replicates, other ranks have the same part. Those of HSDP divide its state,
and gather the updated parameters. Other copies are updated on each rank, and counted on one:

    mesh               placements               copies of a part   state    counted on
    4 ranks            Shard(0)                 1                  whole    every rank
    2 x 2 (HSDP)       Replicate(), Shard(0)    2                  a half   every rank, its half
    2 ranks (TP)       Replicate()              2                  whole    the first rank
    2 of 4 ranks       Shard(0)                 1 or 2             whole    see below

On a mesh of only some ranks, the parts of the other meshes may be copies of the same parameter, or
those of another parameter, such as another expert. Nothing in a DTensor tells them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never

import torch

from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import CheckpointError
from offload_adam.fsdp_private import (
    FsdpGroup,
    FsdpParameter,
    fsdp_groups,
    is_dtensor,
    largest_part,
    sharded_since,
)
from offload_adam.params.groups import bare_name

REPLICAS = ("copies", "distinct")
"""Values of a parameter group's option "replicas"."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalShard:
    """How this rank's part of one parameter is stored, and whether it counts.

    record: of FSDP2, which gathers the parameter; None if FSDP2 does not manage it.
    unit: index of the parameter's group in `ShardedModel.units`, -1 if FSDP2 does not manage it.
    replicas: the ranks of the default group that divide the state of this part, in their order.
    counted: this rank adds its elements to global sums, such as the gradient norm.
    is_distinct: each mesh has a parameter of its own under this name, such as an expert.
    key: equal for all parameters that may share a bucket. Two parameters have equal keys on all
        ranks or on none, or the ranks would have different buckets.
    padded_numel: the largest number of elements that any rank has, with FSDP2's padding.
    """

    record: FsdpParameter | None
    unit: int
    replicas: tuple[int, ...]
    counted: bool
    is_distinct: bool
    key: str
    padded_numel: int


class ShardedModel:
    """The FSDP2 groups that hold the parameters of one optimizer.

    Attributes:
        units: the groups that hold a trained parameter.

    Lifecycle: `find` before parameters are selected.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self.units: list[FsdpGroup] = []
        self._places: dict[int, tuple[int, FsdpParameter]] = {}

    def find(self, parameters: Collection[torch.Tensor]) -> None:
        """Look for the groups of these parameters, and drop what they have gathered.

        Raises:
            ValueError, RuntimeError: a group is of a kind that is not supported.
        """
        own = {id(parameter) for parameter in parameters}
        for group in fsdp_groups():
            if any(id(record.sharded) in own for record in group.parameters):
                _check_group(group)
                group.reshard()
                if group not in self.units:
                    self.units.append(group)
        trees: dict[int, set[int]] = {}
        for streams, tree in (group.streams_and_tree for group in self.units):
            trees.setdefault(streams, set()).add(tree)
        if any(len(sharing) > 1 for sharing in trees.values()):
            raise ValueError(
                "share_comm_ctx() lets several models, such as the stages of a pipeline, share the "
                "streams on which FSDP2 gathers, so that one would wait for the updates of "
                "another. Construct one optimizer for each of them."
            )
        self._places = {
            id(record.sharded): (number, record)
            for number, group in enumerate(self.units)
            for record in group.parameters
        }

    @property
    def can_wait(self) -> bool:
        """Whether FSDP2 can be made to wait before it gathers parameters."""
        return all(group.can_wait for group in self.units)

    @property
    def computes_on_device(self) -> bool:
        """Whether all layers that FSDP2 gathers compute on a device."""
        return bool(self.units) and all(group.computes_on_device for group in self.units)

    def reshard(self) -> None:
        """Drop what any group has gathered, so that no forward reads old parameters."""
        for group in self.units:
            group.reshard()

    def shard_of(self, name: str, parameter: torch.Tensor, replicas: Any) -> LocalShard:
        """Return where this rank's part of a parameter is.

        Args:
            replicas: the parameter group's option; None if it has none.

        Raises:
            ValueError: the mesh has ranks that the optimizer lacks, or has only some of its ranks,
                and `replicas` is not one of `REPLICAS`. The message names the parameter.
        """
        if replicas is not None and replicas not in REPLICAS:
            raise ValueError(
                f"replicas of the group of parameter {name!r} must be 'copies' or 'distinct', not "
                f"{replicas!r}"
            )
        unit, record = self._places.get(id(parameter), (-1, None))
        is_distinct = replicas == "distinct"
        own = self._ranks.global_ranks[self._ranks.rank]
        dividing = (own,) if unit < 0 else self.units[unit].replicas or (own,)
        counted = is_counted(self._ranks, name, parameter, replicas, dividing)
        key = f"unit {unit}, {'distinct' if is_distinct else 'copies'}"
        numel = parameter.numel()
        if is_dtensor(parameter):
            # Not `counted`, which differs between ranks. Reading a gradient may be collective, so
            # all ranks must read in one order.
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            copied = _copied_dims(parameter, dividing)
            key = f"{key}, mesh {hash(mesh)}, copied {copied}, {len(dividing)} divide"
            numel = largest_part(parameter) if record is None else record.padded_numel
        return LocalShard(record, unit, dividing, counted, is_distinct, key, numel)


def is_counted(
    ranks: RankGroup,
    name: str,
    tensor: torch.Tensor,
    replicas: Any,
    dividing: tuple[int, ...] = (),
) -> bool:
    """Return whether no rank before this one counts the same elements of a tensor of the model.

    Args:
        ranks: the ranks of the optimizer.
        tensor: a DTensor, or a tensor that all ranks have whole.
        replicas: the parameter group's option; None if it has none.
        dividing: ranks with copies of which each counts other elements.

    Raises:
        ValueError: the mesh has ranks that the optimizer lacks, or has only some of its ranks, and
            `replicas` is None. The message names the tensor.
    """
    if not is_dtensor(tensor):
        return replicas == "distinct" or ranks.rank == 0
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    members = mesh.mesh.flatten().tolist()
    _check_mesh(ranks, name, members, replicas)
    copied = _copied_dims(tensor, dividing)
    counted = not any(i for i, copies in zip(mesh.get_coordinate(), copied, strict=True) if copies)
    # One of the meshes with copies has the first rank of the optimizer.
    return counted and (replicas == "distinct" or ranks.global_ranks[0] in members)


def _copied_dims(tensor: torch.Tensor, dividing: tuple[int, ...]) -> list[bool]:
    """Return for each dimension of a DTensor's mesh whether ranks along it have copies.

    Args:
        dividing: the ranks along a dimension that does not count, because they divide the state.
    """
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = tensor.placements  # type: ignore[attr-defined]
    where = mesh.get_coordinate()
    copied = []
    for dim, placed in enumerate(placements):
        along = mesh.mesh[(*where[:dim], slice(None), *where[dim + 1 :])].tolist()
        copied.append(placed.is_replicate() and tuple(along) != dividing)
    return copied


def _check_mesh(ranks: RankGroup, name: str, members: Sequence[int], replicas: Any) -> None:
    outside = sorted({*members} - {*ranks.global_ranks})
    if outside:
        raise ValueError(
            f"Parameter {name!r} is sharded over the ranks {members}, but process_group lacks "
            f"{outside}. Pass a process group with all of them, or leave process_group out."
        )
    if len(members) < ranks.world_size and replicas is None:
        raise ValueError(
            f"Parameter {name!r} is sharded over {len(members)} of {ranks.world_size} "
            "ranks. Put such parameters into a group of their own, and say what the other "
            "ranks have: {'params': ..., 'replicas': 'copies'} for copies of the same "
            "parameters, or 'distinct' for other ones, such as other experts."
        )


def reject_distinct(name: str) -> Never:
    """Raise an error because a checkpoint cannot hold a parameter with replicas="distinct".

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{name!r} is in a group with replicas='distinct', so that ranks have different values "
        "under one name. Save the model's state dict and local_state_dict() of each rank in a "
        "file of its own, or shard the parameter over all ranks."
    )


def _check_group(group: FsdpGroup) -> None:
    """Reject groups whose parameters cannot be updated in place."""
    if group.lacks is not None:
        raise RuntimeError(
            f"torch {torch.__version__} has another FSDP2, which lacks {group.lacks!r}. Install "
            "torch 2.11 or 2.13, with which this version was tested."
        )
    if group.replicates:
        raise ValueError(
            "The model was wrapped by torch's replicate(), which is not supported. Wrap it in "
            "DistributedDataParallel, or use fully_shard() with a mesh of two dimensions."
        )
    if group.reshards_to_other_mesh:
        raise ValueError(
            "fully_shard(reshard_after_forward=<number>) is not supported, because the backward "
            "then reads copies of the parameters. Pass True or False."
        )


def reject_gathered(parameters: Collection[torch.Tensor]) -> None:
    """Reject the plain parameters that a module of FSDP2 shows while it is gathered.

    Raises:
        ValueError: one of them is among `parameters`.
    """
    gathered = {id(plain) for group in fsdp_groups() for plain in group.gathered_parameters()}
    for parameter in parameters:
        if id(parameter) in gathered:
            raise ValueError(
                f"A parameter of shape {tuple(parameter.shape)} is what FSDP2 has gathered for a "
                "forward, and updates of it would be lost. Call model.reshard() on the root before "
                "you pass model.parameters() to the optimizer."
            )


def replacements(
    parameters: Collection[torch.Tensor],
    name_of: Mapping[int, str],
    module: torch.nn.Module | None,
) -> dict[int, torch.nn.Parameter]:
    """Return the DTensors that have taken the places of plain parameters, by the ids of these.

    Args:
        name_of: names that the parameters had in `module`, by their ids.
        module: the model, to find parameters that tensor parallelism has sharded, too.
    """
    plain = [parameter for parameter in parameters if not is_dtensor(parameter)]
    found: dict[int, Any] = dict(sharded_since(plain))
    if module is not None:
        now = {bare_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
        for parameter in plain:
            other = now.get(bare_name(name_of.get(id(parameter), "")))
            if other is not None and is_dtensor(other):
                found.setdefault(id(parameter), other)
    return found
