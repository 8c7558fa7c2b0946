"""An optimizer around its core: what callers may ask of the core, and its state as dicts."""

from __future__ import annotations

import functools
import threading
import weakref
from abc import abstractmethod
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import AbstractContextManager
from itertools import chain
from operator import is_, methodcaller
from typing import Any, Never, SupportsIndex, TypeVar, cast

import torch

from offload_adam.coordinator.admission import raise_on_all_ranks
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import CheckpointError
from offload_adam.params.groups import LAID_OUT, known_names
from offload_adam.state.state_dict import (
    STATE_KEY,
    gather_bucket,
    merge_groups,
    pack_full,
    read_saved,
)
from offload_adam.state.state_shard import (
    ParameterShard,
    check_step_count,
    plan_load,
    shards_of,
    state_shard,
)
from offload_adam.step.ledger import LedgerEntry
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.step.step import ShardedAdam
from offload_adam.torch_private import load_state_dict_post_hooks, load_state_dict_pre_hooks

Method = TypeVar("Method", bound=Callable[..., Any])
_NOT_PLAIN = ("params", "param_names")
_values = methodcaller("values")


def serialized(method: Method) -> Method:
    """Run a method while holding the optimizer's lock, so that calls of other threads wait.

    The lock is reentrant: a closure, a hook or a signal handler may call the optimizer again.
    Threads: only those that call the optimizer take the lock. Gradient hooks, the update thread and
    the thread that writes a checkpoint must not: the thread that holds it waits for them.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(Method, run)


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


class CoreOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over a `ShardedAdam`, once that has been made.

    A state dict is in torch's form, local or full. `_plain_state` is what a checkpoint keeps
    besides tensors.

    Lifecycle: `_core` is None before construction is over, and after `close`.
    Threads: calls of several threads run one after the other, each as a whole.
    """

    _core: ShardedAdam | None
    _module: torch.nn.Module | None
    _indices: dict[torch.nn.Parameter, int]  # each one's place among all that are trained
    _ranks: RankGroup
    _release: weakref.finalize[Any, Any]
    _written: WrittenState
    _state_made: Mapping[torch.Tensor, Any]
    _lock: threading.RLock

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse a completed group's hyperparameters, naming the argument."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        """Refuse `copy.copy`, `copy.deepcopy` and pickling.

        Raises:
            TypeError: naming what copies and saves the state.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it is tied to its model's "
            "parameters, hooks, process groups and memory of its own. Save full_state_dict() "
            "(whole, on rank 0), local_state_dict() (this rank's part) or a checkpoint "
            "(offload_adam.save_checkpoint), and load that into an optimizer that is made anew; "
            "copy the model without it"
        )

    def _further_state(self) -> dict[str, Any]:
        """Return what a saved state holds besides torch's entries."""
        return {}

    def _plan_further_state(
        self, further: Mapping[str, Any], entries: Mapping[int, Mapping[str, Any]]
    ) -> Callable[[], None]:
        """Check what `_further_state` saved, and return what loads it and cannot fail.

        Args:
            further: empty where another optimizer saved the state.
            entries: the saved state of each parameter, by index.
        """
        return lambda: None

    @serialized
    def synchronize(self) -> None:
        """Return when all parameters and all state hold the result of the last step.

        For whatever reads parameters in another way than through the model's forward or a state
        dict: on a device the current stream waits, so that what it is given from now on sees them.
        Collective where `step()` leaves updates running.

        Raises:
            Exception: what an update has raised beside this thread.
        """
        self._settled()

    def long_running(self, what: str) -> AbstractContextManager[None]:
        """Exempt the body from `stuck_after`, for example an evaluation on one rank alone.

        Args:
            what: name of the work, for error messages.
        """
        return PROGRESS.at(what, long_running=True)

    @serialized
    def refresh_master(self) -> None:
        """Let master weights follow parameters written through `.data` or NumPy.

        No version counter sees such writes. `step()` compares values, in later steps only a sample
        of them. Call this on every rank, after the same write on every rank.
        """
        with torch.no_grad():
            self._settled().external_edits.sync_all()

    @property
    def num_steps(self) -> int:
        """Calls of `step()` so far, skipped ones included; set it where a saved run goes on."""
        return self._alive().num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        self._alive().num_steps = num_steps

    @property
    def host_nbytes(self) -> Mapping[str, int]:
        """Host bytes that this rank's optimizer holds, by what they are for."""
        return self._alive().host_nbytes

    @property
    def pinned_nbytes(self) -> int:
        """Host bytes that are page-locked, exactly; 0 where no parameter is on a GPU."""
        return self._alive().pinned_nbytes

    @property
    def ranks(self) -> RankGroup:
        """The ranks that share this optimizer."""
        return self._ranks

    @property
    def _is_sharded(self) -> bool:
        """Whether each rank holds a part of the state, or all of it."""
        return self._alive().is_sharded

    def _holds(self, parameter: torch.nn.Parameter) -> bool:
        """Tell whether this optimizer, not closed yet, has state for this parameter."""
        return self._release.alive and parameter in self._indices

    def _shards(self) -> Iterator[ParameterShard]:
        """Yield this rank's range of every trained parameter and its state."""
        for state in self._settled().states:
            yield from shards_of(state)

    @property
    def _is_being_read(self) -> bool:
        """Whether a checkpoint is being written in the background, or waits to be committed."""
        return self._alive().snapshot_lock.is_open

    @property
    def _checkpoint_rooms(self) -> Sequence[torch.Tensor]:
        """Host memory for what a checkpoint in the background copies, uint8."""
        return self._alive().snapshot_lock.rooms

    @serialized
    def _lock_snapshot(self, buckets: Iterable[int]) -> SnapshotLock:
        """Keep updates off buckets that a thread is about to read, and return who lets them go."""
        return self._alive().external_edits.lock_snapshot(buckets)

    @serialized
    def _wait_for_snapshot(self) -> None:
        """Return when no thread reads the state any more: it is about to be written."""
        self._alive().external_edits.wait_for_snapshot()

    def memory_ledger(self) -> list[LedgerEntry]:
        """Return who holds which bytes of this rank now, on the host and on devices."""
        return self._alive().ledger()

    def _share(self) -> tuple[int, int]:
        """Return this rank's place among those that the state is divided over."""
        return self._alive().share

    def _settled(self) -> ShardedAdam:
        """Return the core, when nothing of it is under way."""
        core = self._alive()
        core.synchronize()
        self._take_written_state(core)
        return core

    def _alive(self) -> ShardedAdam:
        """Return the core of an optimizer that has not been closed."""
        if self._core is None or not self._release.alive:
            raise RuntimeError("this optimizer has been closed: make a new one to go on training")
        return self._core

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
        for pre_hook in load_state_dict_pre_hooks(self):
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
            core.external_edits.wait_for_snapshot()
            for target, source in copies:  # a source may be the target itself
                target.copy_(source)
            core.external_edits.compare_all()
        load_further()
        for group, merged in zip(self.param_groups, groups, strict=True):
            dict.update(group, merged)  # a saved value may be one that users cannot set
        for post_hook in load_state_dict_post_hooks(self):
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
    def _plain_state(self, name_of: Callable[[torch.Tensor], str]) -> dict[str, Any]:
        """Return what is no tensor: groups, step counts by name, and the subclass's own state."""
        groups = [
            {
                "parameters": [name_of(parameter) for parameter in group["params"]],
                "options": {k: value for k, value in group.items() if k not in _NOT_PLAIN},
            }
            for group in self.param_groups
        ]
        steps = {name_of(shard.parameter): float(shard.step) for shard in self._shards()}
        return {"groups": groups, "steps": steps, "further": self._further_state()}

    def _check_plain_state(
        self, saved: Mapping[str, Any], name_of: Callable[[torch.Tensor], str]
    ) -> None:
        """Check that `_load_plain_state` can load a saved state.

        Raises:
            CheckpointError: other groups or parameters, or hyperparameters that this optimizer
                cannot have.
        """
        try:
            self._plan_plain_state(saved, name_of)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved optimizer does not fit this one: {error}") from error

    @serialized
    def _load_plain_state(
        self, saved: Mapping[str, Any], name_of: Callable[[torch.Tensor], str]
    ) -> None:
        """Load what `_plain_state` returned."""
        groups, load_further = self._plan_plain_state(saved, name_of)
        for shard in self._shards():
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
        steps = {name_of(shard.parameter) for shard in self._shards()}
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
            for shard in self._shards()
        }
        return groups, self._plan_further_state(saved["further"], entries)

    def _check_entries(self) -> None:
        """Check that `optimizer.state` still has an entry for every parameter."""
        if self.state is not self._state_made or len(self.state) < len(self._indices):
            raise ValueError(
                "optimizer.state was replaced or has lost entries: they show the state, which lies "
                "elsewhere. Use load_state_dict(), or make a new optimizer to begin anew"
            )

    def _take_written_state(self, core: ShardedAdam) -> None:
        """Load tensors that users put into `optimizer.state`, and show the optimizer's own again.

        Raises:
            TypeError, ValueError: a value that cannot be state, or an entry that is gone.
        """
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
            core.external_edits.wait_for_snapshot()
            for target, source in copies:
                target.copy_(source)
        self._written.restore(self.state)


def _refuse_other_names(where: str, saved: Iterable[str], here: Collection[str]) -> None:
    """Refuse names that differ, whatever their order."""
    for name in sorted({*saved} ^ {*here}):
        which = "this optimizer alone has" if name in here else "this optimizer does not have"
        raise ValueError(f"{where}: {which} {name!r}")
