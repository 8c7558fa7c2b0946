"""`StateAccess`: read and load optimizer state, by `optimizer.state` and by state dicts."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Never, SupportsIndex, TypeVar, cast

import torch

from offload_adam.compiling import never_compiled
from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import CheckpointError
from offload_adam.memory.planes import SCALED_KEY
from offload_adam.options import StateFormat
from offload_adam.params.groups import known_names, names_of
from offload_adam.printable import show
from offload_adam.state.load_plan import copy_all, plan_load
from offload_adam.state.state_dict import (
    FORMATS_KEY,
    STATE_KEY,
    SavedState,
    StateReference,
    check_group_sizes,
    gather_bucket,
    gather_shards,
    join_replicas,
    merge_groups,
    pack_full,
    read_saved,
    reject_other_format,
)
from offload_adam.state.state_edits import StateEdits
from offload_adam.state.state_shard import coded_state, shard_of, state_shard
from offload_adam.step.ledger import LedgerEntry
from offload_adam.step.step import ShardedAdam
from offload_adam.torch_private import (
    load_state_dict_post_hooks,
    load_state_dict_pre_hooks,
    state_dict_post_hooks,
    state_dict_pre_hooks,
)

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def serialized(method: Method) -> Method:
    """Run a method uncompiled and while holding the optimizer's lock: other threads wait.

    The lock is reentrant: a closure, a hook or a signal handler may call the optimizer again.

    Threads: only threads that call the optimizer take the lock. Forward and gradient hooks, the
    update thread and the thread that writes a checkpoint must not take it: its holder waits for
    them. The executor lets forward hooks and methods wait for updates at the same time.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(Method, never_compiled(run))


class StateAccess(torch.optim.Optimizer):
    """The part of an optimizer that reads and loads its state; base of `ShardedOptimizer`.

    The state itself is in `_core`. State dicts have torch's form and hold this rank's part or the
    whole state. The functions of `checkpoint/` hold `_lock` and read the core that `_settled`
    returns.

    Lifecycle: `_core` is None during construction and after `close`.
    Threads: public methods hold `_lock`, so concurrent calls run one after another.
    """

    _core: ShardedAdam | None
    _module: torch.nn.Module | None
    _index_of: dict[torch.nn.Parameter, int]  # index among all trainable parameters
    _ranks: RankGroup
    _release: weakref.finalize[Any, Any]
    _state_edits: StateEdits
    _own_state: Mapping[torch.Tensor, Any]  # `state` as constructed, to detect a replacement
    _lock: threading.RLock
    _taken_over = False  # closed by a newer optimizer of the same parameters
    _is_deferred = False  # no state is allocated before the first step

    # For tools that save rank 0's state_dict() in a file of their own; see `integrations`.
    _given_reference: StateReference | None = None  # for the next state_dict() before a step
    _loaded_reference: StateReference | None = None  # loaded, but its folder is not read yet
    _read_reference: Callable[[], object] | None = None  # reads that folder, once

    # What `consolidate_state_dict` has gathered, after how many steps.
    _gathered: tuple[int, dict[str, Any]] | None = None

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Check a completed group's hyperparameters; an error names the argument."""

    @abstractmethod
    def _adapt(self) -> ShardedAdam:
        """Return the core, after it has followed changes of the model. Collective."""

    @abstractmethod
    def _take_unfrozen(self) -> None:
        """Allocate state for parameters that were unfrozen. Collective."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        """Reject `copy.copy`, `copy.deepcopy` and pickling.

        Raises:
            TypeError: always; the message names the methods that copy or save the state.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, because it owns hooks, process "
            "groups and pinned memory for the parameters of its model. Save full_state_dict() "
            "(whole, on rank 0), local_state_dict() (this rank's part) or a checkpoint "
            "(offload_adam.save_checkpoint), and load it into a new optimizer. To copy the model, "
            "copy it without the optimizer."
        )

    def _further_state(self) -> dict[str, Any]:
        """Return plain values that a subclass saves in addition to torch's entries."""
        return {}

    def _plan_further_state(
        self, further: Mapping[str, Any], entries: Mapping[int, Mapping[str, Any]]
    ) -> Callable[[], None]:
        """Check values saved by `_further_state`; return a function that loads them without errors.

        Args:
            further: empty if an optimizer of another class saved the state.
            entries: the saved state of each parameter, by index.
        """
        return lambda: None

    @serialized
    def synchronize(self) -> None:
        """Wait until all parameters and all state hold the result of the last step.

        Call this before reading parameters other than through the model's forward or a state dict,
        and before modifying a tensor of `optimizer.state` in place. Collective if `overlaps`.

        The calling thread waits for updates in host memory, copies to a GPU and all-gathers.
        Updates of state on a GPU are kernels on the current stream, as in torch: later work on this
        stream sees their result, and other streams must wait for it.

        Raises:
            Exception: raised by an update in the update thread.
        """
        if not self._is_deferred:
            self._settled()

    @serialized
    def refresh_master(self) -> None:
        """Copy parameters that were modified through `.data` or NumPy to their master weights.

        Without this, the next update may overwrite such a modification: version counters do not
        count it, and after the first steps `step()` compares only a sample of the values. Modify
        parameters the same way on every rank, then call this on every rank.
        """
        with torch.no_grad():
            self._settled().external_edits.sync_all()

    @property
    def num_steps(self) -> int:
        """Number of `step()` calls, including skipped steps. Set it to resume a saved run."""
        return self._alive().num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        self._alive().num_steps = num_steps

    @property
    def host_nbytes(self) -> Mapping[str, int]:
        """Host bytes that this rank's optimizer has allocated, by category."""
        return self._alive().host_nbytes

    @property
    def pinned_nbytes(self) -> int:
        """Page-locked host bytes; 0 if no parameter is on a GPU."""
        return self._alive().pinned_nbytes

    @property
    def ranks(self) -> RankGroup:
        """The ranks that share this optimizer."""
        return self._ranks

    def _holds(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether this optimizer is not closed and has state for this parameter."""
        return self._release.alive and parameter in self._index_of

    def memory_ledger(self) -> list[LedgerEntry]:
        """Return this rank's current allocations, on the host and on devices."""
        return self._alive().ledger()

    def _settled(self) -> ShardedAdam:
        """Wait for running updates, load edits of `optimizer.state`, and return the core."""
        core = self._alive()
        core.synchronize()
        self._load_state_edits(core)
        return core

    def _settled_on_all_ranks(self, phase: str) -> ShardedAdam:
        """Do as `_settled`, but raise on all ranks if one rank has a bad edit. Collective.

        Args:
            phase: the calling method, for the error message.
        """
        core = self._adapt()
        # Not inside the `with`: its body must not issue collectives, and `synchronize` may issue
        # all-gathers.
        core.synchronize()
        with raise_on_all_ranks(self._ranks, phase):
            self._load_state_edits(core)
        return core

    def _check_state_is_read(self) -> None:
        """Check that no loaded reference waits for the state that it stands for.

        Raises:
            CheckpointError: the message names the integrations that read the state.
        """
        reference = self._loaded_reference
        if reference is not None:
            raise CheckpointError(
                "The file that was loaded into this optimizer only refers to its state, which was "
                f"saved in a folder in {reference.parent}, and nothing has read that folder. With "
                "Trainer, pass OffloadAdamCallback() in callbacks=; with Accelerate, call "
                "keep_state_sharded(accelerator, optimizer) before load_state(); with Lightning, "
                "pass strategy=OffloadAdamStrategy(). All are in offload_adam.integrations."
            )

    def _alive(self) -> ShardedAdam:
        """Return the core; raise RuntimeError if the optimizer was closed."""
        if self._core is None or not self._release.alive:
            if self._taken_over:
                raise RuntimeError(
                    "This optimizer has been closed, because a newer optimizer has taken over its "
                    "parameters. Use the newer one."
                )
            if self._is_deferred and self._release.alive:
                raise RuntimeError(
                    "This optimizer has no state yet: it allocates its state in the first step(), "
                    "after the model is sharded. Call step() or load_state_dict() first."
                )
            raise RuntimeError(
                "This optimizer has been closed. Construct a new one to continue training."
            )
        return self._core

    @serialized
    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain tensors with one rank, `StateShard` tensors with more.

        Tensors share memory with the optimizer, as torch's do, but for moments in 8-bit codes,
        which are copied as bfloat16 values. A `StateShard` has the parameter's
        shape and this rank's elements. `torch.distributed.checkpoint` saves it, and loads it with
        any world size. `torch.save` raises an error. `load_state_dict` accepts the dict on the same
        rank of the same world size.

        The state of a DTensor is a DTensor. With HSDP, ranks with the same parts divide their state
        and gather it here: the tensors are copies, and the call is collective.

        On rank 0, the first call after `consolidate_state_dict` returns the whole state.
        """
        reference, self._given_reference = self._given_reference, None
        if reference is not None:
            return reference.as_state_dict()
        gathered, self._gathered = self._gathered, None
        if gathered is not None and gathered[0] == self.num_steps:
            return gathered[1]  # `full_state_dict` has run the hooks
        if self._is_deferred:
            self._run_pre_hooks()
            groups = self._packed_groups(self._packed_ids())
            return self._after_hooks({"state": self._added_values(), "param_groups": groups})
        saved = self._local_state()
        core = self._alive()
        if core.has_local_shards:
            self._join_replicas(core, saved)
        elif core.partition[1] > 1:
            for index, packed in self._trainable_ids().items():
                bucket, position = core.bucket_and_position(index)
                entry = saved["state"][packed]
                for key in bucket.planes.named(own_master=bucket.own_master):
                    entry[key] = state_shard(bucket, position, entry[key])
        return self._after_hooks(saved)

    def _join_replicas(self, core: ShardedAdam, saved: dict[str, Any]) -> None:
        """Put DTensors in place of the ranges that ranks with the same parts divide. Collective."""
        # The DTensors say which rank has what: the dict may go to other ranks.
        del saved[STATE_KEY]["world_size"], saved[STATE_KEY]["rank"]
        ids = self._trainable_ids()
        with torch.no_grad():
            for state in core.states:
                for index, entry in join_replicas(state, self._ranks).items():
                    saved["state"][ids[index]].update(entry)

    @serialized
    def local_state_dict(self) -> dict[str, Any]:
        """Return this rank's state as plain tensors: whole with one rank, 1-d ranges with more.

        Use it to write one file per rank with `torch.save`. `load_state_dict` accepts it on the
        same rank of the same world size.
        """
        return self._after_hooks(self._local_state())

    def _local_state(self) -> dict[str, Any]:
        """Return the result of `local_state_dict` before its post hooks."""
        self._check_state_is_read()
        self._alive().synchronize()
        self._run_pre_hooks()
        rank, world_size = self._settled().partition  # after the hooks, which may edit the state
        ids = self._packed_ids()
        # Copy the entries: an edit of the saved dict must not change optimizer.state.
        entries = {ids[parameter]: self._saved_entry(parameter) for parameter in self._index_of}
        return {
            "state": {**entries, **self._added_values()},
            "param_groups": self._packed_groups(ids),
            STATE_KEY: {
                "world_size": world_size,
                "rank": rank,
                **self._formats(),
                **self._package_entries(),
            },
        }

    def _saved_entry(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """Return a parameter's entry of `optimizer.state`, with the values of moments in codes."""
        bucket, position = self._alive().bucket_and_position(self._index_of[parameter])
        return {**self.state[parameter], **coded_state(bucket, position)}

    def _formats(self) -> dict[str, dict[int, StateFormat]]:
        """Return the state dict entry for parameters without fp32 state; {} if there are none."""
        ids = self._trainable_ids()
        formats: dict[int, StateFormat] = {
            ids[index]: state.state_format
            for state in self._alive().states
            if state.state_format != "fp32"
            for index in state.indices.tolist()
        }
        return {FORMATS_KEY: formats} if formats else {}

    @serialized
    def full_state_dict(self) -> dict[str, Any]:
        """Return a plain `torch.optim.AdamW` state dict on rank 0, else {}. Collective.

        Moments are fp32 copies in each parameter's shape. The master weights of 16-bit parameters
        are under the key "offload_adam", which torch ignores. To load it into an `OffloadAdam` of
        any world size, pass it to `load_state_dict` on every rank.

        Raises:
            CheckpointError: a parameter group has replicas="distinct".
        """
        self._check_state_is_read()  # the same on every rank, as all have loaded the file
        self._alive().synchronize()
        self._run_pre_hooks()
        core = self._settled_on_all_ranks("full_state_dict")
        core.reject_distinct()
        whole: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            if core.has_local_shards:
                # In the order of indices: the ranks' buckets may differ, as their parts do.
                places = map(core.bucket_and_position, range(len(core.named_parameters())))
                shards = [shard_of(*place) for place in places]
                whole.update(enumerate(gather_shards(shards, self._ranks)))
            else:
                for state in core.states:
                    whole.update(gather_bucket(state, self._ranks) or {})
        if self._ranks.rank != 0:
            return {}
        groups = self._packed_groups(self._packed_ids())
        full = pack_full(groups, self._trainable_ids(), whole, self._package_entries())
        full["state"].update(self._added_values())
        return self._after_hooks(full)

    def _added_values(self) -> dict[Any, Any]:
        """Return what users and hooks have put into `optimizer.state` beside the parameters."""
        state: Mapping[Any, Any] = self.state
        return {key: value for key, value in state.items() if key not in self._index_of}

    def _run_pre_hooks(self) -> None:
        """Run the hooks of `register_state_dict_pre_hook`."""
        for pre_hook in state_dict_pre_hooks(self):
            pre_hook(self)

    def _after_hooks(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict as the hooks of `register_state_dict_post_hook` leave it."""
        for post_hook in state_dict_post_hooks(self):
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    @serialized
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the state, so that rank 0's next `state_dict()` returns all of it. Collective.

        Tools such as Lightning call this before they save, as for `ZeroRedundancyOptimizer`. The
        dict is that of `full_state_dict`. After a step, `state_dict()` no longer returns it.

        Args:
            to: the rank that gathers the state; only 0 is supported.

        Raises:
            ValueError: `to` is not 0.

        Cost: the whole state in the host memory of rank 0, until its `state_dict()` is dropped.
        """
        if to != 0:
            raise ValueError(
                f"to must be 0, because the state is gathered on rank 0, not {show(to)}"
            )
        core = self._alive()
        # Else `state_dict` has all of it, without copies.
        if core.partition[1] > 1 or core.has_local_shards:
            full = self.full_state_dict()
            self._gathered = (self.num_steps, full) if self._ranks.rank == 0 else None

    def _package_entries(self) -> dict[str, Any]:
        """Return the entries under `STATE_KEY`: the parameters' names and the subclass's state."""
        names = known_names(self.param_groups, self._module)
        return {**({} if names is None else {"param_names": names}), **self._further_state()}

    @serialized
    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load a state in place, after checking all of it. Collective with more than one rank.

        Parameters are matched by name if both sides have names, else by position. fp32 moments
        are rounded to nearest if this optimizer has state in low precision.

        Args:
            state_dict: from `state_dict`, `local_state_dict` or `full_state_dict`, or from torch's
                Adam or AdamW.
            convert: also load state in low precision that was saved in another format. Load the
                model first: its parameters are parts of the master weights.

        Raises:
            TypeError, ValueError: the state is of another rank or world size, or its groups, names
                or shapes differ, or it needs `convert`. The message names the
                difference. No rank modified anything.
            PeerError: another rank raised an error of another type, for example in a hook.
        """
        if self._is_deferred and not state_dict.get("state") and STATE_KEY not in state_dict:
            self._load_groups(state_dict)
            return
        self._adapt()
        self._take_unfrozen()
        core = self._settled_on_all_ranks("load_state_dict")
        with raise_on_all_ranks(self._ranks, "load_state_dict"):
            load = self._plan_load(core, state_dict, convert=convert)
        load()
        for post_hook in load_state_dict_post_hooks(self):
            post_hook(self)

    def _load_groups(self, state_dict: Mapping[str, Any]) -> None:
        """Load the options of all groups, before there is state."""
        saved = state_dict.get("param_groups", [])
        merged = merge_groups(self.param_groups, saved, self._check_group)
        for group, options in zip(self.param_groups, merged, strict=True):
            dict.update(group, options)

    def _plan_load(
        self, core: ShardedAdam, state_dict: dict[str, Any], *, convert: bool
    ) -> Callable[[], None]:
        """Check a state dict, and return a function that loads it. Only that may be collective."""
        state_dict = dict(state_dict)
        for pre_hook in load_state_dict_pre_hooks(self):
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        reference = StateReference.of(state_dict)
        if reference is not None:
            if reference.group_sizes:
                check_group_sizes(self.param_groups, reference.group_sizes)
            return partial(self._load_reference, reference)
        rank, world_size = core.partition
        saved = read_saved(state_dict, world_size, rank)
        groups = merge_groups(self.param_groups, saved.groups, self._check_group)
        names = known_names(self.param_groups, self._module)
        saved_ids = saved.ids_for(names)
        entries = {
            self._index_of[parameter]: saved.state.get(saved_id, {})
            for group, group_ids in zip(self.param_groups, saved_ids, strict=True)
            for parameter, saved_id in zip(group["params"], group_ids, strict=True)
            if parameter in self._index_of
        }
        if not convert:
            self._reject_other_formats(core, saved, saved_ids)
        had_codes = any(SCALED_KEY in entry for entry in entries.values())
        self._warn_of_frozen(saved.state, saved_ids)
        with torch.no_grad():
            copies = [
                copy
                for index, entry in entries.items()
                for copy in plan_load(*core.bucket_and_position(index), entry)
            ]
            load_further = self._plan_further_state(saved.further, entries)

        def load() -> None:
            # A background checkpoint may still read the tensors that are overwritten here.
            core.external_edits.before_writing()
            with torch.no_grad():
                # If the dict is from this optimizer's own `state_dict`, source and target share
                # memory, and the copy changes nothing.
                copy_all(copies, had_codes=had_codes and not convert)
            # The next step must compare all values: the model may have been loaded as well, so a
            # parameter may differ from its loaded master weight.
            core.external_edits.compare_all()
            load_further()
            state: dict[Any, Any] = self.state
            state.update(saved.added)
            for group, merged in zip(self.param_groups, groups, strict=True):
                # Not `group.update`: a subclass of dict, such as AdamGroup, rejects keys there that
                # users must not set themselves.
                dict.update(group, merged)
            if names is None and saved.names is not None:
                # As torch does. Without names here, the saved parameters were matched in order.
                for group, saved_group in zip(self.param_groups, saved.groups, strict=True):
                    if "param_names" in saved_group:
                        group.setdefault("param_names", list(saved_group["param_names"]))
            self._loaded_reference = None

        return load

    def _reject_other_formats(
        self,
        core: ShardedAdam,
        saved: SavedState,
        saved_ids: Sequence[Sequence[Any]],
    ) -> None:
        """Reject state in low precision for parameters whose state has another format here.

        Args:
            saved_ids: saved ids of each group's parameters.

        Raises:
            ValueError: the message names the parameter.
        """
        for group, group_ids in zip(self.param_groups, saved_ids, strict=True):
            for parameter, saved_id in zip(group["params"], group_ids, strict=True):
                if parameter in self._index_of:
                    bucket, position = core.bucket_and_position(self._index_of[parameter])
                    found = saved.format_of(saved_id, bucket.state_format)
                    reject_other_format(bucket.names[position], found, bucket.state_format)

    def _load_reference(self, reference: StateReference) -> None:
        """Read the state of a reference, now or when an integration knows its folder."""
        self._loaded_reference = reference
        read, self._read_reference = self._read_reference, None
        if read is not None:
            read()

    def _warn_of_frozen(
        self, saved: Mapping[Any, Mapping[str, Any]], saved_ids: Sequence[Sequence[Any]]
    ) -> None:
        """Warn that the saved state of frozen parameters is not loaded, if there is any."""
        names = names_of(self.param_groups, self._module)
        lost = [
            name
            for group, group_ids, group_names in zip(
                self.param_groups, saved_ids, names, strict=True
            )
            for parameter, saved_id, name in zip(
                group["params"], group_ids, group_names, strict=True
            )
            if parameter not in self._index_of and saved.get(saved_id)
        ]
        if lost and self._ranks.rank == 0:
            logger.warning(
                "The saved state of %d frozen parameter(s), such as %r, is not loaded. To keep it, "
                "call requires_grad_() on them before you load.",
                len(lost),
                lost[0],
            )

    def _packed_ids(self) -> dict[Any, int]:
        """Map a parameter to its id in torch's state dicts: its first position in all groups."""
        ids: dict[Any, int] = {}
        every = (parameter for group in self.param_groups for parameter in group["params"])
        for packed, parameter in enumerate(every):
            ids.setdefault(parameter, packed)
        return ids

    def _packed_groups(self, ids: Mapping[Any, int]) -> list[dict[str, Any]]:
        """Return the groups with ids in place of parameters."""
        return [
            {**group, "params": [ids[parameter] for parameter in group["params"]]}
            for group in self.param_groups
        ]

    def _trainable_ids(self) -> dict[int, int]:
        """Map the index of a trainable parameter to its id in torch's state dicts."""
        ids = self._packed_ids()
        return {index: ids[parameter] for parameter, index in self._index_of.items()}

    def _check_entries(self) -> None:
        """Check that `optimizer.state` still has an entry for every parameter."""
        if self.state is not self._own_state or len(self.state) < len(self._index_of):
            raise ValueError(
                "optimizer.state was replaced or has lost entries, but its entries are only views "
                "of the state. Use load_state_dict() to change state, or construct a new optimizer "
                "to reset it."
            )

    def _load_state_edits(self, core: ShardedAdam) -> None:
        """Copy tensors that users assigned in `optimizer.state`, and put our own tensors back.

        Raises:
            TypeError, ValueError: a value cannot be state, or an entry is missing.
        """
        self._check_entries()
        if self._state_edits.is_untouched(self.state):
            return
        with torch.no_grad():
            try:
                copies = [
                    copy
                    for parameter, entry in self._state_edits.find(self.state)
                    for copy in plan_load(
                        *core.bucket_and_position(self._index_of[parameter]), entry
                    )
                ]
            except KeyError as error:
                raise ValueError(
                    f"An entry of optimizer.state has lost its key {error}. Use load_state_dict() "
                    "to change state, or construct a new optimizer to reset it."
                ) from error
            # A background checkpoint may still read the tensors that are overwritten here.
            core.external_edits.before_writing()
            copy_all(copies, had_codes=False)
        self._state_edits.restore(self.state)
