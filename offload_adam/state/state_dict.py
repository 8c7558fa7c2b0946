"""Read and write state dicts: of this rank, full ones, and those of torch's Adam and AdamW."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from offload_adam.coordinator.rank_checks import gather_texts
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.fsdp_private import local_of
from offload_adam.memory.codes import values_of
from offload_adam.memory.planes import SCALED_KEY
from offload_adam.options import CODED_FORMATS, STATE_FORMAT, StateFormat
from offload_adam.params.bucket import BucketState
from offload_adam.params.elements import in_memory_order, in_shape_of
from offload_adam.params.groups import (
    FIXED_OPTIONS,
    LOCAL_OPTIONS,
    TORCH_OPTIONS,
    bare_name,
)
from offload_adam.printable import show
from offload_adam.state.boxes import Box, views_of
from offload_adam.state.load_plan import check_step_count
from offload_adam.state.state_shard import SCALE_KEY, ParameterShard, decoded, placed_as
from offload_adam.torch_private import all_gather

STATE_KEY = "offload_adam"
"""Key of our own entries in a state dict, such as world size and names. torch ignores it."""

FORMATS_KEY = "state_formats"
"""Key under `STATE_KEY`: format of each parameter's state, by packed id; fp32 is omitted."""

_PLANES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weight", "master_remainder")
_KEYS_APART = {"master_weight", SCALE_KEY}  # under `STATE_KEY` in a full state dict
_STATE_KEYS = ("step", *_PLANES, SCALED_KEY, SCALE_KEY)
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay", "amsgrad")


@dataclass(frozen=True, slots=True)
class StateReference:
    """What a state dict holds in place of state that is saved in a folder of its own.

    label: random text that is also in the folder, so that a reference never loads another save.
    parent: absolute path of the folder's parent at the time of the save.
    group_sizes: numbers of parameters of the saved groups; empty if they are not to be checked.
    """

    label: str
    parent: str
    group_sizes: Sequence[int] = ()

    def as_state_dict(self) -> dict[str, Any]:
        """Return a state dict that any optimizer but ours rejects: it has no groups."""
        return {
            "state": {},
            "param_groups": [],
            STATE_KEY: {
                "saved_apart": {
                    "label": self.label,
                    "parent": self.parent,
                    "group_sizes": list(self.group_sizes),
                }
            },
        }

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> StateReference | None:
        """Return the reference that a state dict holds, or None if it holds state.

        Raises:
            ValueError: it holds something else in the place of a reference.
        """
        marker = state_dict.get(STATE_KEY)
        entry = marker.get("saved_apart") if isinstance(marker, Mapping) else None
        if entry is None:
            return None
        try:
            found = cls(**entry)
        except TypeError:
            found = None
        if found is None or not all(isinstance(v, str) for v in (found.label, found.parent)):
            raise ValueError(
                f"The state dict refers to a folder in an unknown way: {show(entry)}. Load a state "
                "dict that this package has saved."
            )
        return found


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state dict after `read_saved` has checked it.

    state: the entry of each parameter with torch's keys, and with `master_weight` if it was saved.
        By packed id: torch's number of a parameter, which counts over all groups.
    groups: the saved parameter groups.
    further: the entries under `STATE_KEY`; empty if another optimizer saved the state.
    names: names of each group's parameters, None if they were saved without names.
    added: values that a user or a hook has put into `optimizer.state` under a text of their own.
    formats: formats of parameters' state by packed id, as far as they were saved; see `format_of`.
    """

    state: Mapping[int, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    further: Mapping[str, Any]
    names: Sequence[Sequence[str]] | None
    added: Mapping[str, Any]
    formats: Mapping[int, str]

    def format_of(self, packed: Any, own: StateFormat) -> str:
        """Return the format in which the state of a parameter was saved.

        Args:
            packed: the packed id of the parameter.
            own: format of its state in this optimizer.
        """
        tag = self.formats.get(packed)
        if tag is not None:
            return tag
        # torch's state dict functions drop the entries under `STATE_KEY`, but keep the planes.
        entry = self.state.get(packed, {})
        if SCALED_KEY in entry:  # the planes do not show which one it is
            return own if own in CODED_FORMATS else CODED_FORMATS[0]
        return "bf16" if "master_remainder" in entry else "fp32"

    def ids_for(self, names: Sequence[Sequence[str]] | None) -> list[list[Any]]:
        """Return the saved ids of each group's parameters, in the order of this optimizer.

        Parameters are matched by name if both sides have names, else by position.

        Args:
            names: names of this optimizer's parameters by group, or None.

        Raises:
            ValueError: the names of a group differ, or no group lists an entry of the state.
        """
        ids = [list(group["params"]) for group in self.groups]
        unlisted = sorted({*self.state} - {*chain(*ids)}, key=str)
        if unlisted:
            raise ValueError(
                f"The saved state has entries that no group lists: {show(unlisted[:5])}. Check "
                "whether a conversion changed its keys, for example from numbers to text."
            )
        if names is None or self.names is None:
            return ids
        ours, theirs = bare_names(names), bare_names(self.names)
        found = []
        for number, (own, saved, group_ids) in enumerate(zip(ours, theirs, ids, strict=True)):
            id_of = dict(zip(saved, group_ids, strict=True))
            missing, unexpected = sorted({*own} - {*saved}), sorted({*saved} - {*own})
            if missing or unexpected:
                raise ValueError(
                    f"The saved group {number} has other parameters: missing {missing}, "
                    f"unexpected {unexpected}. Construct the optimizer with the same names and "
                    "groups as when the state was saved."
                )
            found.append([id_of[name] for name in own])
        return found


def bare_names(names: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return names without the prefixes of DDP, torch.compile and activation checkpointing."""
    bare = [[bare_name(name) for name in group] for group in names]
    # DDP adds "module." to every name. If some names lack it, it is an attribute of the model.
    if all(name.startswith("module.") for group in bare for name in group):
        bare = [[name.removeprefix("module.") for name in group] for group in bare]
    return bare


def _saved_names(state_dict: Mapping[str, Any]) -> list[list[str]] | None:
    """Return the saved names of each group's parameters, None if any is missing or repeated."""
    groups = state_dict["param_groups"]
    if any(isinstance(saved_id, str) for group in groups for saved_id in group["params"]):
        # torch's set_optimizer_state_dict has reordered `params` for this optimizer, but not
        # `param_names`, which would now assign the wrong names.
        return None
    # Our own entry comes first: it also has names that were taken from `module`.
    listed = state_dict.get(STATE_KEY, {}).get("param_names")
    names = [group.get("param_names") for group in groups] if listed is None else listed
    if len(names) != len(groups) or any(
        group_names is None or len(group_names) != len(group["params"])
        for group_names, group in zip(names, groups, strict=True)
    ):
        return None
    every = [str(name) for group_names in names for name in group_names]
    return [list(map(str, group)) for group in names] if len(every) == len({*every}) else None


def read_saved(state_dict: Mapping[str, Any], world_size: int, rank: int) -> SavedState:
    """Read and check a state dict.

    Raises:
        ValueError: it is not a state dict, it has the ranges of another rank or world size, it is
            not the state of an Adam or AdamW, or it has an unknown format.
    """
    _check_structure(state_dict)
    marker = state_dict.get(STATE_KEY, {})
    if "world_size" in marker and (marker["world_size"], marker["rank"]) != (world_size, rank):
        raise ValueError(
            f"This state was saved by rank {marker['rank']} of {marker['world_size']} and holds "
            f"only its ranges. It cannot be loaded into rank {rank} of {world_size}. Save with "
            "full_state_dict() on the old ranks, and load that here."
        )
    apart = {key: marker.get(key, {}) for key in _KEYS_APART}
    groups, every = state_dict["param_groups"], state_dict["state"]
    listed = {saved_id for group in groups for saved_id in group["params"]}
    added = {
        key: value
        for key, value in every.items()
        if isinstance(key, str) and key not in listed and not _is_entry(value)
    }
    for packed, entry in every.items():
        if packed not in added and not isinstance(entry, Mapping):
            raise TypeError(
                f"The saved state of parameter {show(packed)} must be a dict, not {show(entry)}."
            )
    state = {
        packed: {**entry, **{key: of[packed] for key, of in apart.items() if packed in of}}
        for packed, entry in every.items()
        if packed not in added
    }
    _reject_foreign(state, groups)
    formats = marker.get(FORMATS_KEY, {})
    for packed, stored in formats.items():
        STATE_FORMAT.check(f"The saved state_format of parameter {show(packed)}", stored)
    return SavedState(state, groups, marker, _saved_names(state_dict), added, formats)


def _check_structure(state_dict: Mapping[str, Any]) -> None:
    """Check that a state dict consists of mappings and lists as torch's."""
    groups = state_dict.get("param_groups")
    marker = state_dict.get(STATE_KEY, {})
    is_valid = (
        isinstance(state_dict.get("state"), Mapping)
        and isinstance(groups, Sequence)
        and all(isinstance(group, Mapping) for group in groups)
        and all(isinstance(group.get("params"), Sequence) for group in groups)
        and isinstance(marker, Mapping)
        and all(isinstance(marker.get(key, {}), Mapping) for key in (*_KEYS_APART, FORMATS_KEY))
        and ("world_size" in marker) == ("rank" in marker)
    )
    if not is_valid:
        raise ValueError(
            "This is not an optimizer's state dict: it needs 'state', a dict, and 'param_groups', "
            "a list of dicts with 'params'. Pass the result of state_dict(), local_state_dict() or "
            "full_state_dict()."
        )


def _is_entry(value: object) -> bool:
    """Return whether a value of a saved state is that of a parameter."""
    return isinstance(value, Mapping) and not value.keys().isdisjoint(_STATE_KEYS)


def _reject_foreign(
    state: Mapping[Any, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Reject state of optimizers other than Adam and AdamW: equal keys may mean something else.

    Unknown keys in a group are allowed, because schedulers and users add their own.
    """
    for number, group in enumerate(groups):
        for key in _GROUP_KEYS:
            if key not in group:
                raise ValueError(
                    f"The saved group {number} has no {key!r}, which Adam and AdamW always save. "
                    "Load a state that was saved by Adam, AdamW or this optimizer."
                )
    for packed, entry in state.items():
        for key in entry:
            if key not in _STATE_KEYS:
                raise ValueError(
                    f"The saved state of parameter {packed} has {key!r}, which Adam and AdamW do "
                    "not have. Load a state that was saved by Adam, AdamW or this optimizer."
                )
        check_step_count(f"The saved step of parameter {packed}", entry.get("step", 0))


def reject_other_format(name: str, saved: str, own: str, *, can_convert: bool = True) -> None:
    """Reject state in low precision if this optimizer stores it in another format.

    Args:
        name: the parameter's name, for the message.
        saved: format of the saved state.
        own: format of the state in this optimizer.
        can_convert: the caller has an argument `convert`.

    Raises:
        ValueError: the formats differ, and the saved one is not "fp32".
    """
    if saved not in ("fp32", own):
        convert = ", or pass convert=True to convert it" if can_convert else ""
        raise ValueError(
            f"The state of parameter {name!r} was saved with state_format={show(saved)}, but this "
            f"optimizer stores it with {own!r}. Construct the optimizer with the saved "
            f"format{convert}."
        )


def check_group_sizes(groups: Sequence[Mapping[str, Any]], saved: Sequence[int]) -> None:
    """Check that groups have as many parameters as were saved.

    Raises:
        ValueError: the number of groups or of parameters differs.
    """
    sizes = [len(group["params"]) for group in groups]
    if sizes != saved:
        raise ValueError(
            f"The saved state has groups of {saved} parameters, but this optimizer has "
            f"groups of {sizes}. Construct it with the groups that were saved."
        )


def merge_groups(
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    check: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Return the options to set in each group: those that were saved, without `params`.

    Args:
        groups: the optimizer's groups, which are not modified.
        check: raises an error if a group's hyperparameters are wrong.

    Raises:
        ValueError: the number of groups or of parameters differs, or one of `FIXED_OPTIONS` does.
    """
    check_group_sizes(groups, [len(group["params"]) for group in saved])
    merged = []
    for number, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        for key in FIXED_OPTIONS:
            made_with = group.get(key, False)
            # By identity: both are bools, and a tensor would not compare as one.
            if saved_group.get(key, made_with) is not made_with:
                raise ValueError(
                    f"Group {number} was saved with {key}={show(saved_group[key])}, but this "
                    f"optimizer has {key}={made_with}. Construct it with the saved value."
                )
        kept = {
            key: copy.deepcopy(value)  # an lr tensor must not be shared with the saved state
            for key, value in saved_group.items()
            if key not in LOCAL_OPTIONS
        }
        completed = {**group, **kept}
        check(completed)  # before any group is modified
        merged.append({key: completed[key] for key in kept})  # numbers are plain now
    return merged


def pack_full(
    groups: Sequence[dict[str, Any]],
    packed_ids: Mapping[int, int],
    whole: Mapping[int, Mapping[str, Any]],
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a plain `torch.optim.AdamW` state dict, with master weights under `STATE_KEY`.

    So are the scales of second moments that were in codes: with them, a load is exact.

    Args:
        groups: packed groups, as in `Optimizer.state_dict()["param_groups"]`.
        packed_ids: torch's packed id by parameter index.
        whole: state with torch's keys by parameter index. Values are tensors, or placeholders that
            the caller replaces later.
        further: more entries under `STATE_KEY`.
    """
    apart: dict[str, dict[int, Any]] = {key: {} for key in _KEYS_APART}
    state = {}
    for index, entry in sorted(whole.items()):
        entry = dict(entry)
        for key in _KEYS_APART & entry.keys():
            apart[key][packed_ids[index]] = entry.pop(key)
        state[packed_ids[index]] = entry
    if not apart[SCALE_KEY]:
        del apart[SCALE_KEY]
    return {
        "state": state,
        "param_groups": [{**TORCH_OPTIONS, **group} for group in groups],
        STATE_KEY: {**apart, **further},
    }


def gather_bucket(
    state: BucketState, ranks: RankGroup
) -> dict[int, dict[str, torch.Tensor]] | None:
    """Gather the whole state of one bucket's parameters on rank 0. Collective.

    Returns:
        On rank 0, fp32 copies in each parameter's shape, with torch's keys by parameter index. None
        on other ranks.

    Cost: one plane of the bucket in host memory, in addition to the result.
    """
    whole: dict[int, dict[str, torch.Tensor]] = {
        index: {"step": state.step_counts[position].clone()}
        for position, index in enumerate(state.indices.tolist())
    }
    if state.scales is not None:
        for position, index in enumerate(state.indices.tolist()):
            whole[index][SCALE_KEY] = state.scales[position].clone()
    planes = state.planes.named(own_master=state.own_master)
    for saved_key, plane in decoded(planes, state.planes.master_weight):
        flat = _gather_plane(plane, ranks, state.layout.world_size)
        if flat is None:
            continue
        for position, index in enumerate(state.indices.tolist()):
            placed = state.layout.placements[position]
            parameter = state.parameters[position]
            # The plane is in memory order: fill a tensor of the parameter's strides, then reorder.
            values = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=plane.dtype, device="cpu"
            )
            in_memory_order(values).copy_(flat[placed.start : placed.end])
            if saved_key == SCALED_KEY and state.scales is not None:
                values.mul_(state.scales[position])
            whole[index][_torch_key(saved_key)] = values.contiguous()
    return whole if ranks.rank == 0 else None


def gather_shards(
    shards: Sequence[ParameterShard], ranks: RankGroup
) -> list[dict[str, torch.Tensor]]:
    """Gather the whole state of parameters that are sharded, one tensor at a time. Collective.

    Args:
        shards: this rank's, in the same order of parameters on every rank.

    Returns:
        On rank 0, for each parameter, fp32 copies in its shape, with torch's keys. [] on others.

    Cost: on rank 0, the largest part of a tensor for each rank, in addition to the result.
    """
    own = [(shard.order, shard.boxes() if shard.counted else []) for shard in shards]
    of_ranks = list(map(json.loads, gather_texts(ranks, json.dumps(own))))
    whole: list[dict[str, torch.Tensor]] = []
    for number, shard in enumerate(shards):
        orders, lists = zip(*(places[number] for places in of_ranks), strict=True)
        boxes = [[Box(tuple(offsets), tuple(sizes)) for offsets, sizes in each] for each in lists]
        numels = [sum(box.numel for box in each) for each in boxes]
        # On all ranks, so that none waits for rank 0 below.
        assert sum(numels) == shard.parameter.numel(), "each element is counted on one rank"
        whole.append({"step": shard.step.clone()})
        if shard.scale is not None:
            whole[-1][SCALE_KEY] = shard.scale.clone()
        for saved_key, plane in decoded(shard.planes, shard.high):
            parts = _gather_parts(plane, numels, ranks)
            if ranks.rank != 0:
                continue
            value = torch.empty(shard.parameter.shape, dtype=plane.dtype, device="cpu")
            for order, each, part in zip(orders, boxes, parts, strict=True):
                in_order = value.permute(order)
                for box, elements in views_of(part, each):
                    in_order[box.slices()] = elements
            if saved_key == SCALED_KEY and shard.scale is not None:
                value.mul_(shard.scale)
            whole[-1][_torch_key(saved_key)] = value
    return whole if ranks.rank == 0 else []


def _torch_key(key: str) -> str:
    return "exp_avg_sq" if key == SCALED_KEY else key


def _gather_parts(
    plane: torch.Tensor, numels: Sequence[int], ranks: RankGroup
) -> list[torch.Tensor]:
    """Return each rank's part of a tensor, on the host of rank 0; [] on other ranks.

    Args:
        plane: this rank's part, which is ignored if it is not counted.
        numels: by rank, the elements of its part; 0 if it is not counted.
    """
    own = plane[: numels[ranks.rank]].cpu()  # the control group only supports host memory
    longest = max(numels[1:], default=0)
    if longest == 0:  # rank 0 has all of it
        return [own, *(own[:0] for _ in numels[1:])] if ranks.rank == 0 else []
    # A gather needs tensors of one size, so each part is padded to that of the longest.
    longest = max(longest, numels[0])
    padded = torch.zeros(longest, dtype=plane.dtype, device="cpu")
    padded[: own.numel()] = own
    parts = [torch.empty_like(padded) for _ in numels] if ranks.rank == 0 else None
    _gather(padded, parts, ranks)
    return [part[:numel] for part, numel in zip(parts or [], numels, strict=False)]


def _gather(tensor: torch.Tensor, parts: list[torch.Tensor] | None, ranks: RankGroup) -> None:
    """Gather host tensors of one size into `parts` on rank 0, where these are not None."""
    # Not a blocking gather: `ranks.wait` raises an error if a peer dies meanwhile.
    rank_0 = ranks.global_ranks[0]
    ranks.wait(dist.gather(tensor, parts, dst=rank_0, group=ranks.control, async_op=True))


def _gather_plane(plane: torch.Tensor, ranks: RankGroup, num_shards: int) -> torch.Tensor | None:
    """Return all ranks' shards of one plane, concatenated, on rank 0; None on other ranks.

    With one shard, every rank has the whole plane and returns it.
    """
    if num_shards == 1:
        return plane
    if plane.numel() == 0:  # on every rank, so no other rank waits in this gather
        return plane if ranks.rank == 0 else None
    plane = plane.cpu()  # the control group only supports host memory
    parts: list[torch.Tensor] | None = None
    flat = None
    if ranks.rank == 0:
        flat = torch.empty(plane.numel() * ranks.world_size, dtype=plane.dtype, device="cpu")
        parts = list(flat.chunk(ranks.world_size))
    _gather(plane, parts, ranks)
    return flat


def join_replicas(state: BucketState, ranks: RankGroup) -> dict[int, dict[str, torch.Tensor]]:
    """Gather the state of a bucket that ranks with the same parts divide. Collective for these.

    Returns:
        DTensors with torch's keys by parameter index, empty if no other rank has a part of it.

    Cost: the planes of this rank's parts, in host memory.
    """
    shard = state.local_shard
    if shard is None or state.layout.world_size == 1 or state.layout.numel == 0:
        return {}
    found: dict[int, dict[str, torch.Tensor]] = {i: {} for i in state.indices.tolist()}
    ranks.open_part("cpu", shard.replicas)
    group = ranks.parts["cpu", shard.replicas]
    for key, plane in state.planes.named(own_master=state.own_master).items():
        flat = torch.empty(state.layout.numel, dtype=plane.dtype, device="cpu")
        # As bytes: gloo has no collectives for int16.
        sent = values_of(plane).cpu().view(torch.uint8)
        ranks.wait(all_gather(flat.view(torch.uint8), sent, group=group, async_op=True))
        for position, index in enumerate(state.indices.tolist()):
            placed, parameter = state.layout.placements[position], state.parameters[position]
            part = in_shape_of(flat[placed.start : placed.end].clone(), local_of(parameter))
            found[index][key] = placed_as(parameter, part)
    return found
