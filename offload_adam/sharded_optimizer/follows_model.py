"""`FollowsModel`: what an optimizer does if the model changes before the first update.

Training tools move, cast, wrap or shard the model after the optimizer was constructed. Until the
first update the optimizer follows: its first step lays the parameters out as they are then.
"""

from __future__ import annotations

import gc
import sys
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack

import torch

from offload_adam.coordinator.agreement import largest_on_any_rank
from offload_adam.coordinator.rank_checks import raise_on_all_ranks
from offload_adam.fsdp_private import fsdp_groups, is_dtensor
from offload_adam.gradients.stand_in import StreamedGradients
from offload_adam.layout.state_plan import plan_state
from offload_adam.memory.planes import SCALED_KEY
from offload_adam.options import ExecutionOptions
from offload_adam.params.groups import GroupWatch
from offload_adam.params.local_shard import ShardedModel, reject_gathered, replacements
from offload_adam.params.selection import Selection, check_parameters
from offload_adam.sharded_optimizer.ddp import is_in_ddp
from offload_adam.sharded_optimizer.execution import Execution
from offload_adam.sharded_optimizer.state_access import StateAccess
from offload_adam.state.load_plan import copy_all, plan_load
from offload_adam.state.state_edits import StateEdits
from offload_adam.state.state_shard import local_state
from offload_adam.step.backward_hooks import BackwardHooks
from offload_adam.step.build import Backend, Storage
from offload_adam.step.step import ShardedAdam

# Planes of state that have values before anything was loaded: there is no code for 0. The scale of
# a second moment in codes is 0 until then.
_NEVER_ZERO = ("master_weight", SCALED_KEY)


def shards_later() -> bool:
    """Return whether an `Accelerator` of this process will shard models with FSDP2 in `prepare`."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return False
    return bool(getattr(state.AcceleratorState(), "is_fsdp2", False))


class FollowsModel(StateAccess):
    """The part of an optimizer that follows its model until the first update.

    It is between `StateAccess` and `ShardedOptimizer`, which builds the core.
    """

    _backend: Backend
    _core_resources: ExitStack
    _execution: Execution
    _group_watch: GroupWatch
    _hooks: BackwardHooks | None
    _options: ExecutionOptions
    _sharded: ShardedModel | None
    _streamed: StreamedGradients
    _first_names: dict[int, str]  # of the parameters at construction, by their ids

    @abstractmethod
    def _build_first(self) -> None:
        """Check the parameters and build the core for the first time. Collective."""

    @abstractmethod
    def _build(self, execution: Execution, close_older: Callable[[], None] = ...) -> None:
        """Construct the core, attach hooks, and allocate the state of all groups. Collective."""

    @abstractmethod
    def _decide_execution(self) -> Execution:
        """Check the options, and decide from them and the parameters how to run."""

    @abstractmethod
    def _select(self, first_group: int) -> Selection:
        """Return the parameters without state in the groups from `first_group` on."""

    @abstractmethod
    def _grouped_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of all groups."""

    def _find_shards(self) -> None:
        """Look for parameters that FSDP2 or tensor parallelism has sharded."""
        parameters = self._grouped_parameters()
        reject_gathered(parameters)
        if any(map(is_dtensor, parameters)):
            self._sharded = self._sharded or ShardedModel(self._ranks)
            self._sharded.find(parameters)

    def _adapt(self, *, reduces: bool = False) -> ShardedAdam:
        """Return the core, rebuilt if the model was moved, wrapped or sharded since. Collective.

        Many training tools call `model.to()`, wrap the model in DDP or shard it after the optimizer
        was constructed. Until the first update, the optimizer follows.

        Args:
            reduces: the caller is about to finish the reduction of the gradients.
        """
        if self._is_deferred:
            with raise_on_all_ranks(self._ranks, "preparing the first step"):
                self._follow_sharding()
            self._build_first()
            self._is_deferred = False
            core = self._alive()
            if core.forward_hooks is not None:
                core.forward_hooks.accept_earlier_forward()
            return core
        core = self._alive()
        if core.has_updated:
            return core
        outdated = self._is_outdated()
        if reduces and core.reduction.streams and not outdated:
            # Do not wait for the other ranks here: the backward of one may wait for the buckets
            # that this rank has yet to send. If only other ranks have moved their models, they
            # time out.
            return core
        if largest_on_any_rank(self._ranks, int(outdated)):
            self._rebuild(core)
        return self._alive()

    def _is_outdated(self) -> bool:
        """Return whether the layout or who averages gradients no longer fits the model."""
        core = self._core
        if core is None or core.has_updated:
            return False
        if core.external_edits.has_moved() or self._is_sharded_since():
            return True
        undecided = self._options.gradient_reduction is None and self._execution.conflicts_with_ddp
        return undecided and is_in_ddp(list(self._index_of))

    def _is_sharded_since(self) -> bool:
        """Return whether DTensors have taken the place of parameters since construction."""
        if self._sharded is not None:
            return False
        # Accelerate, for example, replaces the parameters in the groups.
        parameters = self._grouped_parameters()
        return any(map(is_dtensor, parameters)) or bool(
            replacements(parameters, self._first_names, self._module)
        )

    def _reject_lost_parameters(self) -> None:
        """Raise an error if FSDP2 has sharded a model, and no parameter has a gradient.

        Raises:
            ValueError: the model was most likely sharded after the optimizer was constructed, and
                this torch does not tell which parameter became which.
        """
        if self._sharded is None and fsdp_groups():
            raise ValueError(
                "step() found no gradient, and fully_shard() has sharded a model of this process: "
                "its new parameters are not those of this optimizer. Construct the optimizer after "
                "fully_shard(), or pass module=model."
            )

    def _follow_sharding(self) -> None:
        """Put the DTensors into the groups that have taken the place of their parameters."""
        found = replacements(self._grouped_parameters(), self._first_names, self._module)
        for group in self.param_groups if found else ():
            group["params"] = [found.get(id(p), p) for p in group["params"]]

    def _rebuild(self, core: ShardedAdam) -> None:
        """Lay the parameters out as they are now, and keep state that was loaded. Collective.

        Raises:
            TypeError, ValueError: a parameter can no longer be optimized, or loaded state cannot be
                kept. The optimizer is unchanged.
        """
        if core.kept is not None:
            raise ValueError(
                "The model was moved, wrapped or sharded after the optimizer was constructed, but "
                "kept state cannot follow. Construct the optimizer afterwards."
            )
        core.synchronize()
        core.snapshot_lock.wait_until_all_free()
        index_of = self._index_of
        members = [group["params"] for group in self.param_groups]
        try:
            with raise_on_all_ranks(self._ranks, "preparing the first step"):
                if core.reduction.streams and core.reduction.has_gradients:
                    raise ValueError(
                        "The model was moved between backward() and the first step(). Move it "
                        "before the first forward, or call zero_grad() first."
                    )
                self._load_state_edits(core)
                loaded = self._loaded_entries(core)
                if loaded and self._is_sharded_since():
                    raise ValueError(
                        "The model was sharded after optimizer state was loaded. Shard the model "
                        "first, then load the state."
                    )
                self._index_of = {}
                self._follow_sharding()
                self._find_shards()
                selection = self._select(0)
                check_parameters(selection.new, [])
                execution = self._decide_execution()
                if loaded:
                    self._check_same_ranges(core, execution, selection)
        except BaseException:
            self._index_of = index_of
            for group, before in zip(self.param_groups, members, strict=True):
                group["params"] = before
            raise
        num_steps = core.num_steps
        self._core_resources.close()
        for parameter in index_of:  # hooks may have put further values into `state`
            del self.state[parameter]
        self._state_edits = StateEdits()
        self._group_watch = GroupWatch(self._module)
        self._streamed.forget()
        self._core = self._hooks = None
        del core
        gc.collect()  # the memory of the old state is free before the new state is allocated
        try:
            self._build(execution)
            core = self._alive()
            if core.forward_hooks is not None:
                core.forward_hooks.accept_earlier_forward()
            with torch.no_grad():
                for parameter, entry in loaded.items():
                    place = core.bucket_and_position(self._index_of[parameter])
                    copy_all(plan_load(*place, entry), had_codes=False)
            core.num_steps = num_steps
        except BaseException:
            self._release()
            raise

    def _loaded_entries(
        self, core: ShardedAdam
    ) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
        """Return the state that was loaded since construction, by parameter."""
        entries = {
            parameter: local_state(*core.bucket_and_position(index))
            for parameter, index in self._index_of.items()
        }
        return {
            parameter: entry
            for parameter, entry in entries.items()
            if any(bool(value.any()) for key, value in entry.items() if key not in _NEVER_ZERO)
        }

    def _check_same_ranges(
        self, core: ShardedAdam, execution: Execution, selection: Selection
    ) -> None:
        """Check that this rank's ranges of parameters would be the same after a rebuild."""
        storage = Storage(execution.policy, self._backend)
        plans = plan_state(list(map(storage.spec_of, selection.new)), execution.policy)
        before = [(state.layout.numel, state.layout.placements) for state in core.states]
        after = [(plan.bucket.numel, plan.bucket.placements) for plan in plans]
        if before != after:
            raise ValueError(
                "The model was moved or cast after optimizer state was loaded, which changes the "
                "ranks' shards of the state. Move the model first, then load the state."
            )
