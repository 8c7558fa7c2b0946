"""An optimizer's state as dicts: this rank's, the whole of it, and what is no tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.errors import CheckpointError
from offload_adam.parameters.group_watch import LAID_OUT
from offload_adam.parameters.groups import known_names
from offload_adam.sharded_optimizer.base import CoreOptimizer
from offload_adam.sharded_optimizer.locking import serialized
from offload_adam.step.full_state import gather_bucket
from offload_adam.step.local_state import plan_load, state_shard
from offload_adam.step.saved_state import (
    STATE_KEY,
    check_step_count,
    merge_groups,
    pack_full,
    read_saved,
)

_NOT_PLAIN = ("params", "param_names")


class StateDicts(CoreOptimizer):
    """Gives and takes state: in torch's form, local or full, and as a checkpoint keeps it.

    What stands at an index there is the index of `_indices`: a parameter's place among all that are
    trained.
    """

    @serialized
    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain tensors with one rank, else a `StateShard` of each.

        Tensors share memory with the optimizer, as torch's do. A `StateShard` has the parameter's
        shape and this rank's elements: `torch.distributed.checkpoint` saves it and loads it in any
        world, `torch.save` raises an error. Loads into the same rank of the same world.
        """
        saved = self.local_state_dict()
        core = self._alive()
        if self._share()[1] == 1:
            return saved
        for index, packed in self._trainable_ids().items():
            bucket, position = core.place_of(index)
            entry = saved["state"][packed]
            for key in bucket.planes.named(own_master=bucket.own_master):
                entry[key] = state_shard(bucket, position, entry[key])
        return saved

    @serialized
    def local_state_dict(self) -> dict[str, Any]:
        """Return this rank's state as plain tensors: whole with one rank, else its 1-d ranges.

        For a file for each rank. Loads into the same rank of the same world.
        """
        self._settled()
        rank, world_size = self._share()
        saved = super().state_dict()
        # Copies of the entries: an edit of the saved dict must not become one of optimizer.state.
        saved["state"] = {packed: dict(entry) for packed, entry in saved["state"].items()}
        saved[STATE_KEY] = {"world_size": world_size, "rank": rank, **self._marked()}
        return saved

    @serialized
    def full_state_dict(self) -> dict[str, Any]:
        """Return a plain `torch.optim.AdamW` state dict on rank 0, else {}. Collective.

        Moments are fp32 copies in each parameter's shape. The master weights of 16-bit parameters
        stand under the key "offload_adam", which torch ignores. It loads into an `OffloadAdam` of
        any world size, when every rank is given it.
        """
        with raise_on_all_ranks(self._ranks, "full_state_dict"):
            core = self._settled()
        whole: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for state in core.states:
                whole.update(gather_bucket(state, self._ranks) or {})
        if self._ranks.rank != 0:
            return {}
        groups = super().state_dict()["param_groups"]
        return pack_full(groups, self._trainable_ids(), whole, self._marked())

    def _marked(self) -> dict[str, Any]:
        """Return what a saved state holds besides torch's entries, the parameters' names first."""
        names = known_names(self.param_groups, self._module)
        return {**({} if names is None else {"param_names": names}), **self._further_state()}

    @serialized
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state in place: this rank's own, a full one, or one of torch's Adam and AdamW.

        Everything is checked before anything is changed. Parameters are matched by name where
        both sides have names, else by position.

        Raises:
            ValueError: another world or rank, other groups, names or shapes, by name.
        """
        core = self._settled()
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        rank, world_size = self._share()
        saved = read_saved(state_dict, world_size, rank)
        groups = merge_groups(self.param_groups, saved.groups, self._check_group)
        saved_ids = saved.ids_for(known_names(self.param_groups, self._module))
        entries = {
            self._indices[parameter]: saved.state.get(saved_id, {})
            for group, group_ids in zip(self.param_groups, saved_ids, strict=True)
            for parameter, saved_id in zip(group["params"], group_ids, strict=True)
            if parameter in self._indices
        }
        with torch.no_grad():
            loads = [plan_load(*core.place_of(index), entry) for index, entry in entries.items()]
            load_further = self._plan_further_state(saved.further, entries)
            core.outside_writes.finish_reading()
            for load in loads:
                load.apply()
            core.outside_writes.compare_all()
        load_further()
        for group, merged in zip(self.param_groups, groups, strict=True):
            dict.update(group, merged)  # a saved value may be one that users cannot set
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _trainable_ids(self) -> dict[int, int]:
        """Return torch's packed id (place over all groups) by each parameter's index."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        return {
            self._indices[parameter]: packed
            for packed, parameter in enumerate(every)
            if parameter in self._indices
        }

    @serialized
    def plain_state(self, name_of: Callable[[torch.Tensor], str]) -> dict[str, Any]:
        """Return what is no tensor: groups, step counts by name, and the face's own state."""
        groups = [
            {
                "parameters": [name_of(parameter) for parameter in group["params"]],
                "options": {k: value for k, value in group.items() if k not in _NOT_PLAIN},
            }
            for group in self.param_groups
        ]
        steps = {name_of(shard.parameter): float(shard.step) for shard in self.shards()}
        return {"groups": groups, "steps": steps, "further": self._further_state()}

    def check_plain_state(
        self, saved: Mapping[str, Any], name_of: Callable[[torch.Tensor], str]
    ) -> None:
        """Refuse what `load_plain_state` could not load.

        Raises:
            CheckpointError: other groups or parameters, or hyperparameters that this optimizer
                cannot have.
        """
        try:
            self._plan_plain_state(saved, name_of)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved optimizer does not fit this one: {error}") from error

    @serialized
    def load_plain_state(
        self, saved: Mapping[str, Any], name_of: Callable[[torch.Tensor], str]
    ) -> None:
        """Load what `plain_state` returned."""
        groups, load_further = self._plan_plain_state(saved, name_of)
        for shard in self.shards():
            shard.step.fill_(saved["steps"][name_of(shard.parameter)])
        load_further()
        for group, kept in zip(self.param_groups, groups, strict=True):
            dict.update(group, kept)  # a saved value may be one that users cannot set

    def _plan_plain_state(
        self, saved: Mapping[str, Any], name_of: Callable[[torch.Tensor], str]
    ) -> tuple[list[dict[str, Any]], Callable[[], None]]:
        """Check a plain state; return the groups' options and what loads the rest."""
        if len(saved["groups"]) != len(self.param_groups):
            raise ValueError(f"it has {len(saved['groups'])} groups, not {len(self.param_groups)}")
        steps = {name_of(shard.parameter) for shard in self.shards()}
        _refuse_other_names("its step counts", saved["steps"], steps)
        for name, count in saved["steps"].items():
            check_step_count(f"the step count of {name!r}", count)
        groups = []
        for number, (group, entry) in enumerate(
            zip(self.param_groups, saved["groups"], strict=True)
        ):
            names = {name_of(parameter) for parameter in group["params"]}
            _refuse_other_names(f"its group {number}", entry["parameters"], names)
            kept = entry["options"]
            for key in LAID_OUT:
                if kept.get(key, False) != group.get(key, False):
                    raise ValueError(f"it has {key}={kept.get(key, False)} in group {number}")
            self._check_group({**group, **kept})
            groups.append(kept)
        entries = {
            self._indices[shard.parameter]: {"step": saved["steps"][name_of(shard.parameter)]}
            for shard in self.shards()
        }
        return groups, self._plan_further_state(saved["further"], entries)


def _refuse_other_names(where: str, saved: Iterable[str], here: Collection[str]) -> None:
    """Refuse names that differ, whatever their order."""
    for name in sorted({*saved} ^ {*here}):
        which = "this optimizer alone has" if name in here else "this optimizer does not have"
        raise ValueError(f"{where}: {which} {name!r}")
