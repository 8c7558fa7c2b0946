"""`ShardedOptimizer`, the base of the public optimizers: construction, groups, hooks, the step."""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.optimizer import ParamsT

from offload_adam import torch_private
from offload_adam.compiling import never_compiled
from offload_adam.coordinator.agreement import Notice, largest_on_any_rank
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import Field, raise_on_all_ranks, require_same
from offload_adam.coordinator.ranks import (
    check_process_group,
    is_distributed,
    open_rank_group,
)
from offload_adam.errors import StreamedGradientError
from offload_adam.fsdp_private import is_dtensor, local_of
from offload_adam.gradients.stand_in import StreamedGradients
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.options import ExecutionOptions, check_max_norm
from offload_adam.params.groups import GroupWatch, as_float, names_of
from offload_adam.params.local_shard import ShardedModel
from offload_adam.params.selection import (
    Selection,
    check_parameters,
    describe,
    reject_unrelated,
    select_parameters,
)
from offload_adam.printable import show
from offload_adam.sharded_optimizer.ddp import check_averaged
from offload_adam.sharded_optimizer.execution import (
    Execution,
    check_keeps,
    check_module,
    checked_options,
    decide_execution,
    reject_not_keepable,
    shared_fields,
    usable_failures,
)
from offload_adam.sharded_optimizer.follows_model import FollowsModel, shards_later
from offload_adam.sharded_optimizer.kept_values import KeptValues, ResumedStep, kind_of
from offload_adam.sharded_optimizer.loss_scale import read_loss_scale, report_skip
from offload_adam.sharded_optimizer.owners import add_owner, find_older, reject_owned, take_over
from offload_adam.sharded_optimizer.state_access import serialized
from offload_adam.state.state_edits import StateEdits, StateEntry
from offload_adam.state.state_shard import local_state
from offload_adam.step.backward_hooks import BackwardHooks
from offload_adam.step.build import Backend, Storage
from offload_adam.step.messages import StepInputs, StepReport
from offload_adam.step.step import ShardedAdam
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)


class ShardedOptimizer(FollowsModel):
    """A `torch.optim.Optimizer` over a `ShardedAdam`: the base of the public optimizers.

    It adds construction, groups, hooks and the step to `FollowsModel`. A subclass checks its own
    arguments and groups, and returns each group's hyperparameters. A subclass may save more state.

    Owns: process groups, hooks on the parameters, and host memory. `close` releases all three.
    Lifecycle: a subclass's constructor calls `_construct` once.
    """

    # GradScaler then sets grad_scale and found_inf and calls step() on every rank. Otherwise it
    # would skip the step on this rank only, and the other ranks would wait for it.
    _step_supports_amp_scaling = True

    # Set by a loss scaler before step() and deleted after it; absent means 1 and 0.
    grad_scale: torch.Tensor | float | None
    found_inf: torch.Tensor | float | None

    # Runtime and devices; tests and simulations replace it.
    _backend = Backend()

    def _construct(
        self,
        options: ExecutionOptions,
        add_groups: Callable[[], None],
        *,
        replicated: bool = False,
        accepts_sparse: bool = False,
    ) -> None:
        """Check all arguments and allocate the state, or release everything and raise. Collective.

        Args:
            add_groups: checks the subclass's own arguments and calls `_add_groups`.
            replicated: store the state with its parameter, whole on every rank.
            accepts_sparse: accept sparse gradients.
        """
        torch_private.check()
        self._lock = threading.RLock()
        module = options.module
        check_process_group(options.process_group)
        self._distributed = is_distributed(options.process_group)
        self.last_step: StepReport | None = None
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self.notice = Notice()
        self.kept_extra: dict[str, Any] = {}
        self.resumed_step: ResumedStep | None = None
        self._kept_values: KeptValues | None = None
        self._warned_idle = False
        self._max_norm_once: float | None = None
        # A weak reference: stand-ins in `.grad` must not keep a dropped optimizer and its state
        # alive.
        self._streamed = StreamedGradients(partial(_norms_of, weakref.ref(self)))
        self._options = options
        self._replicated = replicated
        self._accepts_sparse = accepts_sparse
        self._module = module
        self._group_watch = GroupWatch(module)
        self._state_edits = StateEdits()
        self._sharded: ShardedModel | None = None
        self._first_names: dict[int, str] = {}
        self._core: ShardedAdam | None = None
        self._hooks: BackwardHooks | None = None
        self._index_of: dict[torch.nn.Parameter, int] = {}
        # Before the arguments are checked: only connected ranks can raise an error together.
        self._ranks = open_rank_group(options.process_group, usable_failures(options.failures))
        resources = ExitStack()
        resources.callback(self._ranks.release)
        # What belongs to the layout: `_rebuild` closes it, and fills it again.
        self._core_resources = ExitStack()
        resources.callback(self._core_resources.close)
        # Callbacks run in reverse order. After a peer has failed, collectives must be aborted
        # before the core's resources close the update thread, which may be waiting for one.
        resources.callback(self._ranks.abort_devices)
        # `finalize` also runs at exit, before the interpreter clears its modules. A process group
        # that is destroyed after that aborts the process.
        self._release = weakref.finalize(self, _close_in, os.getpid(), resources)

        try:
            with raise_on_all_ranks(self._ranks, "construction"):
                check_module(module)
                add_groups()
                self._options = options = checked_options(options)
                self._is_deferred = options.defer or self._waits_for_accelerate()
                if options.offload.keep != "none":
                    check_keeps(options.offload, self._is_deferred)
                names = names_of(self.param_groups, module)
                self._first_names = {
                    id(parameter): name
                    for group, group_names in zip(self.param_groups, names, strict=True)
                    for parameter, name in zip(group["params"], group_names, strict=True)
                }
            self.max_grad_norm = options.max_grad_norm
            self._own_state = self.state  # to detect that a user replaces the whole dict
            if not self._is_deferred:
                self._build_first()
        except BaseException:
            self._release()
            raise

    def _waits_for_accelerate(self) -> bool:
        """Return whether Accelerate will shard these parameters after this constructor."""
        return shards_later() and not any(map(is_dtensor, self._grouped_parameters()))

    def _build_first(self) -> None:
        with raise_on_all_ranks(self._ranks, "construction"):
            self._find_shards()
            selection = self._select(0)
            check_parameters(selection.new, [])
            execution = self._decide_execution()
            reject_unrelated(self._module, self.param_groups)
            older = find_older(selection)
            if execution.policy.keeps:
                reject_not_keepable(selection.new)
                self._kept_values = KeptValues(self._module)
        self._build(execution, partial(take_over, older, self._ranks))
        add_owner(self)
        if self._kept_values is not None:
            self.resumed_step = self._kept_values.resume(self, self._alive())
            self._opt_called = self.resumed_step is not None  # else `lr_scheduler.step()` warns

    def discard_kept(self) -> None:
        """Delete the kept state of this rank, for example at the end of training. Idempotent.

        Without this, it stays in memory when the process ends, and the next optimizer with the same
        `keep_path` resumes from it.
        """
        core = self._alive()
        if core.kept is not None:
            core.kept.remove()

    def _decide_execution(self) -> Execution:
        """Check the options, and decide from them and the parameters how to run."""
        parameters = self._grouped_parameters()
        return decide_execution(
            self._options,
            replicated=self._replicated,
            sharded=self._sharded,
            parameters=parameters,
            on_device=[self._backend.is_device(local_of(p).device) for p in parameters],
        )

    def _build(self, execution: Execution, close_older: Callable[[], None] = lambda: None) -> None:
        """Construct the core, attach hooks, and allocate the state of all groups. Collective.

        Args:
            close_older: called right before memory is allocated, so that the states of two
                optimizers never exist together, and an error before leaves the older one open.
        """
        options = self._options
        self._execution = execution
        self._fields = [*shared_fields(options, execution), *self._own_fields()]
        policy, streams, overlaps = execution
        devices = [local_of(parameter).device for parameter in self._grouped_parameters()]
        on_device = list(map(self._backend.is_device, devices))
        # Replicated state is updated on its device, without copies to or from the host.
        # Memory that the runtime of one device page-locks is page-locked for all devices.
        copied = [] if policy.replicated else list(compress(devices, on_device))
        runtime = self._backend.make_runtime(copied[0]) if copied else None
        this = weakref.ref(self)  # what the finalizer holds must not keep the optimizer alive
        core = ShardedAdam(
            self._ranks,
            Storage(
                policy,
                self._backend,
                runtime,
                options.offload,
                0 if self._kept_values is None else self._kept_values.max_nbytes,
                kind_of(self),
                "" if self._kept_values is None else self._kept_values.identity,
            ),
            num_threads=options.num_threads,
            on_device=any(on_device) or bool(self._sharded and self._sharded.computes_on_device),
            module=self._module,
            overlaps=overlaps,
            unfreeze=partial(_unfreeze, this),
            accepts_sparse=self._accepts_sparse,
            streamed=self._streamed if streams else None,
            sharded=self._sharded,
        )
        self._core = core
        self._core_resources.callback(core.resources.close)
        self._core_resources.callback(core.snapshot_lock.stop_reader)
        if streams:
            self._hooks = BackwardHooks(
                core.reduction, core.stream_waits.current_stream, partial(_is_outdated, this)
            )
            self._core_resources.callback(self._hooks.remove)
        selection = self._select(0)
        self._require_same_parameters(selection, 0)
        close_older()
        self._build_state(core, selection, 0)

    @abstractmethod
    def _hyperparameters(self) -> list[Hyperparameters]:
        """Return the current hyperparameters, indexed by `NewParameter.group`."""

    def _add_groups(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Check the groups and let torch add them. Allocates nothing."""
        if defaults["amsgrad"]:
            self._reject_distributed_amsgrad()
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _own_fields(self) -> list[Field]:
        """Return the subclass's arguments that must be the same on every rank."""
        return []

    def _step_inputs(self) -> StepInputs:
        """Return the subclass's inputs of a step; the caller adds loss scale and clipping."""
        return StepInputs(hyperparameters=self._hyperparameters())

    def _stepped(self, report: StepReport) -> None:
        """Hook for subclasses, called after each step and each skipped step."""

    def _select(self, first_group: int) -> Selection:
        """Return the parameters without state in the groups from `first_group` on."""
        return select_parameters(
            self.param_groups[first_group:],
            self._module,
            known=self._index_of,
            first_group=first_group,
            state_format=self._options.state_format,
            shard_of=None if self._sharded is None else self._sharded.shard_of,
        )

    def _grouped_parameters(self) -> list[torch.nn.Parameter]:
        # A group that has lost its key is reported by the group watch.
        return [p for group in self.param_groups for p in group.get("params", ())]

    def _require_same_parameters(self, selection: Selection, first_group: int) -> None:
        """Check that the ranks agree on the groups from `first_group` on. Collective."""
        groups = self.param_groups[first_group:]
        if self._ranks.world_size > 1:  # the fields of many parameters take long to describe
            fields = [*self._fields, *describe(selection, groups, first_group=first_group)]
            require_same(self._ranks, "optimizer", fields)

    def _build_state(self, core: ShardedAdam, selection: Selection, first_group: int) -> None:
        """Allocate the state of new parameters, and attach hooks. Collective.

        Args:
            first_group: index of the first new group.
        """
        new = selection.new
        self._ranks.open_data_groups(item.local.device.type for item in new)
        for item in new:
            if item.shard is not None:
                self._ranks.open_part(item.local.device.type, item.shard.replicas)
        num_buckets = len(core.states)
        with torch.no_grad():
            core.extend(new, selection.frozen)
        before_writing = weakref.WeakMethod(core.external_edits.before_writing)
        for item in new:
            self._index_of[item.parameter] = item.index
            entry = local_state(*core.bucket_and_position(item.index))
            self.state[item.parameter] = StateEntry(entry, before_writing)
            self._state_edits.add(item.parameter, entry)
        if self._hooks is not None:
            for state in core.states[num_buckets:]:
                # FSDP2 copies gradients to the host without waiting, unless there are hooks.
                record = None if state.local_shard is None else state.local_shard.record
                if record is None or not record.is_offloaded:
                    self._hooks.attach(state.parameters)
        if core.overlaps and self._module is not None:
            core.hook_forward(self._module, self._options.offload.units)
            core.hook_unshard()
        self._group_watch.extend(self.param_groups[first_group:])

    def _unfreeze(self) -> None:
        """Allocate state for parameters that require gradients by now. Collective."""
        core = self._alive()
        with raise_on_all_ranks(self._ranks, "taking in unfrozen parameters"):
            selection = Selection(self._select(0).new, [])
            check_parameters(selection.new, core.named_parameters())
            reject_owned(selection.new)
        members = [(item.name, item.parameter) for item in selection.new]
        if self._execution.is_external:
            require_same(self._ranks, "optimizer", describe(selection, [], first_group=0))
            check_averaged(self._ranks, members)
        before = core.host_nbytes
        self._require_same_parameters(selection, len(self.param_groups))
        self._build_state(core, selection, len(self.param_groups))
        nbytes = sum(core.host_nbytes.values()) - sum(before.values())
        if self._ranks.rank == 0:
            logger.info(
                "Allocated %s of host memory for %d parameter(s) that require gradients since "
                "construction, such as %r",
                format_nbytes(nbytes),
                len(members),
                members[0][0],
            )

    def _take_unfrozen(self) -> None:
        """Allocate state for parameters that require gradients by now, if any. Collective."""
        if largest_on_any_rank(self._ranks, len(self._select(0).new)) > 0:
            self._unfreeze()

    @serialized
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, at any time between steps. Collective after construction.

        Args:
            param_group: a dict with the key "params", and options that differ from the defaults.

        Raises:
            TypeError, ValueError: as in the constructor. The optimizer is then unchanged.
        """
        if self._core is None and self._release.alive:
            self._append_group(param_group)
            return
        core = self._adapt()
        # Not inside the `with` below: a body must not issue collectives, and `synchronize` may
        # issue all-gathers.
        core.synchronize()
        num_groups = len(self.param_groups)
        try:
            with raise_on_all_ranks(self._ranks, "add_param_group"):
                selection = self._append_later_group(param_group)
            self._require_same_parameters(selection, num_groups)
            self._build_state(core, selection, num_groups)
        except BaseException:
            del self.param_groups[num_groups:]  # torch has already appended the rejected group
            raise

    def _append_later_group(self, param_group: dict[str, Any]) -> Selection:
        self._check_groups_and_load_edits()
        num_groups = len(self.param_groups)
        self._append_group(param_group)
        self._find_shards()
        selection = self._select(num_groups)
        check_parameters(selection.new, self._alive().named_parameters())
        reject_owned(selection.new)
        return selection

    def _append_group(self, param_group: dict[str, Any]) -> None:
        """Let torch fill in defaults and append one group, then check the group."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        if group["amsgrad"]:
            self._reject_distributed_amsgrad()

    def _reject_distributed_amsgrad(self) -> None:
        if self._distributed:
            raise ValueError(
                "amsgrad=True is not supported in distributed training (world size > 1). "
                "Pass amsgrad=False, or train on one rank."
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @serialized
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Reduce and clip the gradients and update the parameters. Collective.

        All ranks skip the step if any rank has a non-finite gradient or a `found_inf` other than 0.
        Parameters, state and the parameters' step counts then keep their exact values. `last_step`
        holds the outcome as a `StepReport`.

        Args:
            closure: evaluates the loss and calls backward; its result is returned.

        Raises:
            ValueError: a gradient cannot be used; the message names the parameter.
            ParameterReplacedError: a parameter's storage was replaced; the message names it.
            RankDisagreementError: the ranks differ in groups or gradients of this step.
            PeerError: another rank raised an error, died or hung.
        """
        core = self._adapt(reduces=True)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not core.has_updated and self._execution.is_external:
            check_averaged(self._ranks, core.named_parameters())
        with torch.no_grad():
            report = core.step(self._inputs(is_step=True))
        # The step has read the gradients of incomplete buckets itself, so gradients that arrived
        # for these buckets must not count towards the next backward.
        if self._hooks is not None:
            self._hooks.forget_arrivals()
        self._max_norm_once = None
        self._given_reference = None  # it stands for the state before this step
        self.last_step = report
        self._stepped(report)
        if torch_private.has_step_post_hooks(self):
            core.synchronize()  # post hooks run when this returns and may read parameters
        in_a_row = self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped else 0
        if report.skipped:
            self.skipped_steps += 1
            report_skip(self)
            # All ranks skip for the same reason. A run that skips every step must not fill its log:
            # after 10 in a row, log only the 16th, 32nd, 64th and so on.
            if core.ranks.rank == 0 and (in_a_row <= 10 or in_a_row.bit_count() == 1):
                count = f"{self.skipped_steps} so far, {in_a_row} in a row"
                logger.warning("Skipped step (%s): %s", count, report.reason)
        elif report.num_updated == 0 and not self._warned_idle:
            self._warned_idle = True
            if core.num_steps == 1:
                self._reject_lost_parameters()
            if core.ranks.rank == 0:  # `num_updated` is the same on all ranks
                logger.warning(
                    "step() found no gradient on any parameter. Call backward() first, and check "
                    "that this optimizer has the parameters of the model that computed the loss"
                )
        return loss

    @serialized
    def clip_grad_norm_(
        self,
        max_norm: float | torch.Tensor,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> torch.Tensor:
        """Clip the global 2-norm of the next step's gradients, and return the norm. Collective.

        Call it after the backward and before `step`. The update applies the clip factor, so `.grad`
        keeps its values. For the next step only, `max_norm` replaces `max_grad_norm`.

        Args:
            max_norm: clip to this norm, above 0; infinity only computes the norm. A number or a
                one-element tensor.
            norm_type: only 2.0.
            error_if_nonfinite: raise an error if the norm is not finite. If False, `step` skips
                such gradients.

        Returns:
            0-d float64 tensor on the CPU: the norm before clipping of the gradients averaged over
            all ranks, with the loss scale divided out.

        Raises:
            TypeError, ValueError: an argument is wrong. The other ranks raise PeerError.
            RuntimeError: on all ranks, the norm is not finite, and `error_if_nonfinite` is True.
        """
        core = self._adapt(reduces=True)
        limit = None
        # Ranks that raise an error for a non-finite norm would leave the others in the next step.
        call = (
            "clip_grad_norm_(error_if_nonfinite=True)"
            if error_if_nonfinite
            else "clip_grad_norm_()"
        )
        inputs = replace(self._inputs(), call=call)
        try:
            limit = _check_clipping(max_norm, norm_type, error_if_nonfinite)
        except (TypeError, ValueError) as error:
            inputs = replace(inputs, failure=error)  # the other ranks wait for this one
        with torch.no_grad():
            total_norm = core.total_norm(inputs)
        if error_if_nonfinite and not math.isfinite(total_norm):
            raise RuntimeError(
                f"The norm of the gradients is {total_norm}, so they cannot be clipped. Find the "
                "cause of the non-finite gradients, or leave error_if_nonfinite out: step() then "
                "skips them."
            )
        self._max_norm_once = limit
        return torch.tensor(total_norm, dtype=torch.float64, device="cpu")

    @serialized
    def _gradient_norms(self) -> npt.NDArray[np.float64]:
        """Return the norm of each parameter's gradient. Collective."""
        # As `step`, in which other ranks may be by mistake: all ranks then compare their calls.
        core = self._adapt(reduces=True)
        if self._hooks is not None and self._hooks.has_undelivered:
            # Torch's function has already read these gradients, as if they were the whole sum.
            error = StreamedGradientError(
                "The last backward reached only few parameters of a large bucket, whose gradients "
                "are not yet added to those of earlier backwards. Clip with max_grad_norm= or "
                "optimizer.clip_grad_norm_() instead of torch's function."
            )
            inputs = StepInputs(hyperparameters=[], failure=error)
        else:
            inputs = self._inputs()
        inputs = replace(inputs, call="the norm of a gradient in .grad")
        with torch.no_grad():
            return core.norms(inputs)

    @serialized
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, including those moved out of `.grad` since the last step.

        Args:
            set_to_none: as in torch; a stand-in always becomes None.
        """
        if self._core is not None:
            self._core.reduction.zero_grad(set_to_none=set_to_none)
        if self._hooks is not None:
            self._hooks.forget()
        self._max_norm_once = None
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @never_compiled
    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate in `.grad` during backwards inside the context, as DDP's `no_sync`.

        The next backward outside adds to these gradients and reduces the sum. Without streaming,
        backwards accumulate in `.grad` anyway, and the context has no effect.

        Raises:
            ValueError: `.grad` was set to None after its gradient had left it in this step.
        """
        if self._hooks is None:
            return nullcontext()
        reduction = self._alive().reduction
        if reduction.has_gradients:
            # Backwards in the context refill `.grad`, and the next one outside would not see this.
            reduction.backward_began()
        else:
            # Stand-ins of the last step are still in `.grad` if the caller did not zero it. Remove
            # them, so that autograd stores gradients there.
            reduction.hide_stand_ins()
        return self._hooks.paused()

    def long_running(self, what: str) -> AbstractContextManager[None]:
        """Keep this rank from being declared hung inside the context, as in an evaluation on it.

        `FailurePolicy.stuck_after` does not apply inside; `dead_after` does.

        Args:
            what: name of the work, for error messages.
        """
        return PROGRESS.at(what, long_running=True)

    @serialized
    def close(self) -> None:
        """Remove the hooks, destroy the process groups and free host memory. Idempotent.

        Parameters stay usable. State tensors that the caller still references keep their memory. A
        checkpoint that is being written in the background is abandoned.

        Raises:
            Exception: raised by a running update in the update thread.
        """
        try:
            if self._core is not None and self._release.alive:
                # First, because updates may wait for the checkpoint to read their buckets.
                self._core.snapshot_lock.stop_reader()
                self._core.reduction.hide_stand_ins()
                self._core.synchronize()
        finally:
            self._release()
            self._core = None
            self._hooks = None
            self._state_edits = StateEdits()
            self.state.clear()

    def _unfinished(self) -> tuple[tuple[str, Sequence[int]], bool]:
        """Return the all-gathers that `close` would issue, and `ShardedAdam.is_half_applied`."""
        core = self._alive()
        return (self._ranks.name, core.executor.to_gather), core.is_half_applied

    def _has_streamed(self) -> bool:
        """Return whether gradients have left `.grad` since the last step."""
        reduction = self._alive().reduction
        return reduction.streams and reduction.has_gradients

    @serialized
    def _hand_over(self, *, joined: bool) -> None:
        """Close this optimizer, because a newer one takes over its parameters.

        Args:
            joined: all ranks call this and issue the same all-gathers.
        """
        core = self._alive()
        # The gradients that have left `.grad` are lost. So drop those of the same backward that
        # have not, or the newer optimizer would add its gradients to these alone.
        drops_gradients = self._has_streamed()
        self._taken_over = True
        try:
            if core.executor.to_gather and not joined:
                core.reduction.hide_stand_ins()
                self._release()  # now `close` does not wait for ranks that do not come
            self.close()
        finally:
            if drops_gradients:
                for parameter in self._grouped_parameters():
                    parameter.grad = None

    @property
    def overlaps(self) -> bool:
        """Whether updates run during the next forward, after `step()` has returned.

        Raises:
            RuntimeError: no state is allocated yet (`defer=True`).
        """
        return self._alive().overlaps

    @property
    def max_grad_norm(self) -> float | None:
        """The global 2-norm that every step clips to. None for no clipping. Set it on all ranks.

        Raises:
            TypeError, ValueError: the new value is not a number above 0 or None.
        """
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._max_grad_norm = check_max_norm("max_grad_norm", value)

    def _inputs(self, *, is_step: bool = False) -> StepInputs:
        """Read this step's inputs. They carry an error, so that the step raises it on all ranks.

        Args:
            is_step: the caller takes the step, so its values are kept; a norm keeps none.
        """
        try:
            inputs = self._read_inputs()
            if is_step and self._kept_values is not None:
                inputs = replace(inputs, payload=self._kept_values.pack(self))
            return inputs
        except Exception as error:
            return StepInputs(hyperparameters=[], failure=error)

    def _read_inputs(self) -> StepInputs:
        """Read the groups, `grad_scale` and `found_inf`."""
        if self._hooks is not None:
            self._hooks.deliver_rest()
        self._check_state_is_read()
        self._check_groups_and_load_edits()
        scale = read_loss_scale(self, gradients_leave=self._hooks is not None)
        inputs = self._step_inputs()
        return replace(
            inputs,
            grad_scale=inputs.grad_scale * scale.grad_scale,
            found_inf=scale.found_inf,
            max_norm=self.max_grad_norm if self._max_norm_once is None else self._max_norm_once,
            factor=self._streamed.factor(),
            multiplied=self._streamed.multiplied,
            notice=replace(self.notice, saved=self._alive().snapshot_lock.num_finished),
        )

    def _check_groups_and_load_edits(self) -> None:
        """Check the groups and `optimizer.state`, and load tensors that users assigned there."""
        self._group_watch.check(self.param_groups, self._check_group)
        core = self._alive()
        self._check_entries()
        if not self._state_edits.is_untouched(self.state):
            core.synchronize()
            self._load_state_edits(core)


def _close_in(pid: int, resources: ExitStack) -> None:
    """Close the resources of an optimizer, but only in the process `pid` that constructed it."""
    # A forked child has a copy of the optimizer, without its threads. Closing it there would wait
    # for a thread that does not exist, or abort the parent's communicators.
    if os.getpid() == pid:
        resources.close()


def _check_clipping(max_norm: object, norm_type: object, error_if_nonfinite: object) -> float:
    """Check the arguments of `clip_grad_norm_`, and return `max_norm` as a float.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if as_float("norm_type", norm_type) != 2.0:
        raise ValueError(
            f"norm_type must be 2.0, not {norm_type}. To clip to another norm, construct the "
            "optimizer without module= and use torch.nn.utils.clip_grad_norm_."
        )
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite must be a bool, not {show(error_if_nonfinite)}")
    limit = check_max_norm("max_norm", as_float("max_norm", max_norm))
    assert limit is not None
    return limit


def _unfreeze(optimizer: weakref.ref[ShardedOptimizer]) -> None:
    """Call `_unfreeze` of an optimizer that is taking a step. Collective."""
    alive = optimizer()
    assert alive is not None
    alive._unfreeze()


def _is_outdated(optimizer: weakref.ref[ShardedOptimizer]) -> bool:
    """Return whether the optimizer exists and will be rebuilt at its first step."""
    alive = optimizer()
    return alive is not None and alive._is_outdated()


def _norms_of(optimizer: weakref.ref[ShardedOptimizer]) -> npt.NDArray[np.float64]:
    """Return the norm of each parameter's gradient, if the optimizer still exists. Collective."""
    alive = optimizer()
    if alive is None:
        raise StreamedGradientError(
            "The optimizer that streamed this gradient no longer exists. Set .grad to None, or "
            "keep a reference to the optimizer."
        )
    return alive._gradient_norms()
