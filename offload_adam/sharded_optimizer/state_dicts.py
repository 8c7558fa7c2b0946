"""An optimizer's state as dicts: this rank's, the whole of it, and what is no tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch

from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.errors import CheckpointError
from offload_adam.parameters.group_watch import LAID_OUT
from offload_adam.parameters.groups import known_names
from offload_adam.sharded_optimizer.base import CoreOptimizer, serialized
from offload_adam.state.state_dict import (
    STATE_KEY,
    gather_bucket,
    merge_groups,
    pack_full,
    read_saved,
)
from offload_adam.state.state_shard import check_step_count, plan_load, state_shard
from offload_adam.step.sharded_adam import ShardedAdam

_NOT_PLAIN = ("params", "param_names")
_values = methodcaller("values")


class WrittenState:
    """The tensors that `optimizer.state` shows, and a search for others in their place.

    Cost: one comparison of identities for each tensor; about 0.3 us for each parameter.
    """

    def __init__(self) -> None:
        self._own: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        self._tensors: list[torch.Tensor] = []

    def add(self, parameter: torch.nn.Parameter, entry: Mapping[str, torch.Tensor]) -> None:
        """Remember the tensors of one parameter."""
        self._own[parameter] = dict(entry)
        self._tensors += entry.values()

    def is_untouched(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> bool:
        """Tell whether every entry still holds the optimizer's own tensors."""
        found = chain.from_iterable(map(_values, state.values()))
        num_found = sum(map(len, state.values()))
        return num_found == len(self._tensors) and all(map(is_, found, self._tensors))

    def find(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]]
    ) -> Iterator[tuple[torch.nn.Parameter, dict[str, Any]]]:
        """Yield parameters of which a tensor was replaced, with their complete entries.

        Raises:
            KeyError: an entry lacks the key that it names.
            TypeError, ValueError: a value that is no tensor, or no count of updates.
        """
        for parameter, own in self._own.items():
            entry = state[parameter]
            found = {key: entry[key] for key in own}
            if all(map(is_, found.values(), own.values())):
                continue
            for key, value in found.items():
                if key == "step":
                    check_step_count("the step in optimizer.state", value)
                elif not isinstance(value, torch.Tensor):
                    raise TypeError(f"{key} in optimizer.state is no tensor but {value!r}")
            yield parameter, found

    def restore(self, state: Mapping[torch.Tensor, MutableMapping[str, Any]]) -> None:
        """Put the optimizer's own tensors back, beside what users have added."""
        for parameter, own in self._own.items():
            entry = state[parameter]
            added = {key: value for key, value in entry.items() if key not in own}
            entry.clear()
            entry.update({**own, **added})


class StateDicts(CoreOptimizer):
    """Gives and takes state: in torch's form, local or full, and as a checkpoint keeps it.

    What stands at an index there is the index of `_indices`: a parameter's place among all that are
    trained.
    """

    _written: WrittenState
    _state_made: Mapping[torch.Tensor, Any]

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
        with raise_on_all_ranks(self._membership, "full_state_dict"):
            core = self._settled()
        whole: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for state in core.states:
                whole.update(gather_bucket(state, self._membership) or {})
        if self._membership.rank != 0:
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
            copies = [
                copy
                for index, entry in entries.items()
                for copy in plan_load(*core.place_of(index), entry)
            ]
            load_further = self._plan_further_state(saved.further, entries)
            core.outside_writes.finish_reading()
            for target, source in copies:  # a source may be the target itself
                target.copy_(source)
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

    def _check_entries(self) -> None:
        if self.state is not self._state_made or len(self.state) < len(self._indices):
            raise ValueError(
                "optimizer.state was replaced or has lost entries: they show the state, which lies "
                "elsewhere. Use load_state_dict(), or make a new optimizer to begin anew"
            )

    def _take_written_state(self, core: ShardedAdam) -> None:
        self._check_entries()
        if self._written.is_untouched(self.state):
            return
        with torch.no_grad():
            try:
                copies = [
                    copy
                    for parameter, entry in self._written.find(self.state)
                    for copy in plan_load(*core.place_of(self._indices[parameter]), entry)
                ]
            except KeyError as error:
                raise ValueError(
                    f"an entry of optimizer.state has lost {error}. Use load_state_dict() to set "
                    "state, or make a new optimizer to begin anew"
                ) from error
            core.outside_writes.finish_reading()
            for target, source in copies:
                target.copy_(source)
        self._written.restore(self.state)


def _refuse_other_names(where: str, saved: Iterable[str], here: Collection[str]) -> None:
    """Refuse names that differ, whatever their order."""
    for name in sorted({*saved} ^ {*here}):
        which = "this optimizer alone has" if name in here else "this optimizer does not have"
        raise ValueError(f"{where}: {which} {name!r}")
