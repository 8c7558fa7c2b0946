"""What every optimizer of this package is beneath its arguments: shards, hooks, the step."""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, overload

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks

from offload_adam.coordinator.admission import Fact, require_same, together
from offload_adam.coordinator.agreement import Notice
from offload_adam.coordinator.membership import Membership, is_distributed, open_membership
from offload_adam.coordinator.watch import DEAD_AFTER_S, STUCK_AFTER_S, Patience
from offload_adam.errors import CheckpointError
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.memory.pinning import CudaRuntime, Pin, cuda_runtime
from offload_adam.observe.place import HERE
from offload_adam.parameters.hooks import BackwardHooks
from offload_adam.parameters.options import (
    check_accumulate,
    check_max_norm,
    check_options,
    check_overlap,
    resolve_reduction,
)
from offload_adam.parameters.selection import (
    Selection,
    check_parameters,
    describe,
    select_parameters,
)
from offload_adam.step.backend import Backend
from offload_adam.step.construction import Placing
from offload_adam.step.full_state import gather_bucket
from offload_adam.step.ledger import LedgerEntry
from offload_adam.step.local_state import local_state, plan_load
from offload_adam.step.parameter_shard import ParameterShard, shards_of
from offload_adam.step.read_gate import ReadGate
from offload_adam.step.reduction import GradientReduction
from offload_adam.step.report import StepReport
from offload_adam.step.saved_state import STATE_KEY, merge_groups, pack_full, read_saved
from offload_adam.step.sharded_adam import ShardedAdam, StepInputs
from offload_adam.version import __version__

logger = logging.getLogger(__name__)

_NOT_PLAIN = ("params", "param_names")
DEFAULT_BUCKET_NBYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How an optimizer holds its state and takes its steps, whatever its formula.

    Each field is the argument of the same name of `OffloadAdam`, but for two:

    beside: state lies beside its parameter, whole on every rank; `module` then gives names only.
    takes_rows: gradients may be sparse.
    """

    module: torch.nn.Module | None = None
    process_group: dist.ProcessGroup | None = None
    gradient_reduction: str | None = None
    reduce_dtype: torch.dtype | None = None
    bucket_nbytes: int = DEFAULT_BUCKET_NBYTES
    state_dtype: torch.dtype = torch.float32
    num_threads: int | None = None
    accumulate: str | None = None
    pin: Pin = "all"
    offload_fraction: float = 1.0
    dead_after: float = DEAD_AFTER_S
    stuck_after: float = STUCK_AFTER_S
    allow_overcommit: bool = False
    max_grad_norm: float | None = None
    overlap: bool | None = None
    units: Sequence[torch.nn.Module] | None = None
    beside: bool = False
    takes_rows: bool = False

    @property
    def streamed_module(self) -> torch.nn.Module | None:
        """The module whose gradients leave during backward, if any does."""
        return None if self.beside else self.module

    def check(self) -> str:
        """Refuse what cannot be right, and return who averages gradients.

        Raises:
            TypeError, ValueError: naming the argument.
            RuntimeError: WORLD_SIZE > 1 and no process group is initialised.
        """
        check_options(
            self.reduce_dtype,
            self.state_dtype,
            self.bucket_nbytes,
            self.num_threads,
            self.accumulate,
            self.pin,
            self.offload_fraction,
        )
        check_max_norm("max_grad_norm", self.max_grad_norm)
        Patience(self.dead_after, self.stuck_after)
        kind = resolve_reduction(self.gradient_reduction, self.module, self.process_group)
        check_accumulate(self.accumulate, self.streamed_module, kind)
        check_overlap(self.overlap, self.units, self.streamed_module)
        return kind

    def overlaps(self, kind: str, parameters: Iterable[torch.Tensor], *, offloads: bool) -> bool:
        """Tell whether updates run beside the next forward.

        Gradients that others have averaged stay in `.grad`, where the next backward may write: out
        of host memory they would be read too late.

        Args:
            kind: who averages gradients.
            offloads: parameters in host memory are treated as if they were on a device.
        """
        if self.streamed_module is None or self.overlap is False:
            return False
        on_device = all(parameter.is_cuda for parameter in parameters)
        if self.overlap is None:
            return on_device
        if kind == "external" and not (on_device or offloads):
            warnings.warn(
                "overlap=True has no effect where gradients in host memory are averaged by others: "
                "let this optimizer do it (gradient_reduction='optimizer')",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        return True

    def patience(self) -> Patience:
        """Return the patience with peers; the default's in place of one that `check` refuses."""
        try:
            return Patience(self.dead_after, self.stuck_after)
        except (TypeError, ValueError):
            return Patience()

    def facts(self, kind: str) -> list[Fact]:
        """Return what must be the same on every rank."""
        return [
            ("gradient_reduction", kind),
            ("reduce_dtype", str(self.reduce_dtype)),
            ("bucket_nbytes", str(self.bucket_nbytes)),
            ("accumulate", str(self.accumulate)),
            ("max_grad_norm", str(self.max_grad_norm)),
            ("streaming", str(self.streamed_module is not None and kind == "optimizer")),
            ("state beside the parameters", str(self.beside)),
            ("offload_fraction", str(self.offload_fraction)),
        ]


class ShardedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over a `ShardedAdam`: the base of the public faces.

    A face checks its arguments and groups, says each group's hyperparameters at each step, and may
    add to what is saved. All else is here: taking parameters in, hooks, the step with its errors
    and reports, state dicts.

    Owns: process groups of its own, hooks on the parameters, host memory. `close` ends all three.
    Lifecycle: a face's constructor calls `_construct` once.
    """

    # GradScaler hands grad_scale and found_inf over instead of deciding on this rank alone.
    _step_supports_amp_scaling = True

    # Set by a loss scaler before step() and deleted after it; absent means 1 and 0.
    grad_scale: torch.Tensor | float | None
    found_inf: torch.Tensor | float | None

    # Tests set them, to run the paths of parameters on a device with parameters in host memory:
    # state on the host, state beside the parameters, and memory that a stand-in for CUDA pins.
    _offloads = False
    _updates_on_device = False
    _backend = Backend()
    _runtime: CudaRuntime | None = None

    def _construct(self, execution: Execution, admit: Callable[[], Sequence[Fact]]) -> None:
        """Check everything, then allocate and build, or leave nothing behind. Collective.

        Args:
            admit: the face's own checks; it lets torch take the groups in, and returns what ranks
                must have in common besides parameters, groups and execution.
        """
        module = execution.module
        self._distributed = is_distributed(execution.process_group)
        self.last_step: StepReport | None = None
        self.skipped_steps = 0
        self.notice = Notice()
        self._warned_idle = False
        self._max_norm_once: float | None = None
        self._module = module
        self._units = execution.units
        self._core: ShardedAdam | None = None
        self._hooks: BackwardHooks | None = None
        self._indices: dict[torch.nn.Parameter, int] = {}
        self._membership = open_membership(execution.process_group, execution.patience())
        resources = ExitStack()
        resources.callback(self._membership.release)
        # At exit too: a process group that outlives the interpreter's modules ends it with an
        # abort.
        self._release = weakref.finalize(self, resources.close)

        def check() -> str:
            self._facts = list(admit())
            return execution.check()

        try:
            kind = together(self._membership, "construction", check)
            self._facts = [*_versions(), *execution.facts(kind), *self._facts]
            self.max_grad_norm = execution.max_grad_norm
            self._warn_without_effect(execution)
            streams = execution.streamed_module is not None and kind == "optimizer"
            reduction = GradientReduction(
                self._membership,
                reduces=kind == "optimizer",
                streams=streams,
                accumulates=execution.accumulate is not None,
                reduce_dtype=execution.reduce_dtype,
                takes_rows=execution.takes_rows,
            )
            if streams:
                self._hooks = BackwardHooks(reduction)
                resources.callback(self._hooks.remove)
            placing = Placing(
                execution.bucket_nbytes,
                reduction.landed_dtype,
                pin=execution.pin,
                runtime=None if execution.beside else self._pinning_runtime(),
                offload_fraction=execution.offload_fraction,
                beside=execution.beside,
                takes_rows=execution.takes_rows,
                allow_overcommit=execution.allow_overcommit,
                force_offload=self._offloads,
                force_device=self._updates_on_device,
            )
            self._core = ShardedAdam(
                self._membership,
                reduction,
                placing,
                num_threads=execution.num_threads,
                module=module,
                external=kind == "external",
                overlaps=execution.overlaps(
                    kind,
                    [parameter for group in self.param_groups for parameter in group["params"]],
                    offloads=self._offloads,
                ),
                backend=self._backend,
            )
            resources.callback(self._core.resources.close)
            resources.callback(self._core.gate.abandon)
            self._take_in(self._core, 0)
        except BaseException:
            self._release()
            raise

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse a completed group's hyperparameters, naming the argument."""

    @abstractmethod
    def _hyperparameters(self) -> list[Hyperparameters]:
        """Return the hyperparameters that the parameters' groups count over, as they are now."""

    def _admit(self, params: ParamsT, defaults: dict[str, Any]) -> list[Fact]:
        """Let torch take the groups in, each checked, with nothing allocated yet.

        Returns:
            Nothing that ranks must have in common besides: what an `admit` without more returns.
        """
        if defaults["amsgrad"]:
            self._refuse_distributed_amsgrad()
        torch.optim.Optimizer.__init__(self, params, defaults)
        check_parameters(self._select(0).new, [])
        return []

    def _step_inputs(self) -> StepInputs:
        """Return what the face tells every step, to which a loss scaler and clipping are added."""
        return StepInputs(hyperparameters=self._hyperparameters())

    def _stepped(self, report: StepReport) -> None:
        """Hear that a step is over, skipped or not."""

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

    def _select(self, first_group: int) -> Selection:
        """Return the parameters of the groups from this one on."""
        return select_parameters(
            self.param_groups[first_group:],
            self._module,
            first_index=len(self._indices),
            first_group=first_group,
        )

    def _warn_without_effect(self, execution: Execution) -> None:
        """Warn where offload_fraction is given and no parameter's state could stay on a GPU."""
        if execution.offload_fraction == 1.0:
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        on_device = self._offloads or any(parameter.is_cuda for parameter in parameters)
        if execution.beside or not on_device:
            why = "all of it stays there" if on_device else "no parameter is on one"
            warnings.warn(
                f"offload_fraction={execution.offload_fraction} has no effect: it says how much "
                f"state leaves the GPU, and {why}",
                UserWarning,
                stacklevel=4,
            )

    def _pinning_runtime(self) -> CudaRuntime | None:
        """Return what pins host memory, None where no parameter is on a GPU to copy to."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(parameter.is_cuda for parameter in parameters):
            return cuda_runtime()
        return self._runtime

    def _take_in(self, core: ShardedAdam, first_group: int) -> None:
        """Build the state of the groups from this one on. Collective."""
        selection = self._select(first_group)
        new = selection.new
        facts = [*self._facts, *describe(selection, self.param_groups[first_group:])]
        require_same(self._membership, "optimizer", facts)
        self._membership.open_data_groups(item.parameter.device.type for item in new)
        num_buckets = len(core.states)
        with torch.no_grad():
            core.extend(new, selection.frozen)
        for item in new:
            self._indices[item.parameter] = item.index
            self.state[item.parameter] = local_state(*core.place_of(item.index))
        if self._hooks is not None:
            for state in core.states[num_buckets:]:
                self._hooks.attach(state.parameters)
        if core.overlaps and self._module is not None:
            core.hook_forward(self._module, self._units)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a further group in, at any time between steps; collective then.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is as before then.
        """
        if self._core is None and self._release.alive:
            self._admit_group(param_group)
            return
        core = self._settled()
        num_groups = len(self.param_groups)
        try:
            together(self._membership, "add_param_group", lambda: self._admit_later(param_group))
            self._take_in(core, num_groups)
        except BaseException:
            del self.param_groups[num_groups:]
            raise

    def _admit_later(self, param_group: dict[str, Any]) -> None:
        num_groups = len(self.param_groups)
        self._admit_group(param_group)
        check_parameters(self._select(num_groups).new, self._alive().named_parameters())

    def _admit_group(self, param_group: dict[str, Any]) -> None:
        """Let torch complete and append one group, then check it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        if group["amsgrad"]:
            self._refuse_distributed_amsgrad()

    def _refuse_distributed_amsgrad(self) -> None:
        if self._distributed:
            raise ValueError(
                "amsgrad=True is not supported in distributed training (world size > 1): "
                "pass amsgrad=False, or train on one rank"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Average what is still to be averaged, clip, update; or skip, on every rank. Collective.

        `last_step` says what happened. A gradient that is not finite on any rank, or a `found_inf`
        that is not 0, skips the step: no bit of state, parameters or step counters changes.

        Args:
            closure: evaluates the loss and calls backward; its result is returned.

        Raises:
            ValueError: a gradient that cannot be used, by the parameter's name.
            ParameterReplacedError: a parameter's storage was replaced, by name.
            RankDisagreementError, PeerError: ranks do not agree on this step.
        """
        core = self._alive()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            report = core.step(self._inputs())
        self._max_norm_once = None
        self.last_step = report
        self._stepped(report)
        if self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            core.synchronize()  # they run when this returns, and may read parameters
        if report.skipped:
            self.skipped_steps += 1
            logger.warning("step skipped (%d so far): %s", self.skipped_steps, _reason(report))
        elif report.num_updated == 0 and not self._warned_idle:
            self._warned_idle = True
            logger.warning(
                "step() found no gradient on any parameter: was backward() called, on the module "
                "whose parameters this optimizer has?"
            )
        return loss

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the next step's gradients to this global 2-norm, and return the norm. Collective.

        The norm is that of the mean gradient over all ranks, unscaled; gradients are clipped inside
        the update, so `.grad` keeps its values.
        """
        core = self._alive()
        limit = check_max_norm("max_norm", max_norm)
        with torch.no_grad():
            total_norm = core.total_norm(self._inputs())
        self._max_norm_once = limit
        return torch.tensor(total_norm, dtype=torch.float64)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also those that have left `.grad` since the last step."""
        if self._core is not None:
            self._core.reduction.reset()
        if self._hooks is not None:
            self._hooks.forget()
        self._max_norm_once = None
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def no_sync(self) -> AbstractContextManager[None]:
        """Keep gradients in `.grad` during backwards inside, to be added to those of the next."""
        return nullcontext() if self._hooks is None else self._hooks.paused()

    def synchronize(self) -> None:
        """Return when all parameters and all state hold the result of the last step.

        For whatever reads parameters in another way than through the model's forward or a state
        dict: on a device the current stream waits, so that what it is given from now on sees them.
        Collective where `step()` leaves updates running.

        Raises:
            Exception: what an update has raised beside this thread.
        """
        self._settled()

    def busy(self, what: str) -> AbstractContextManager[None]:
        """Do work inside that may keep the other ranks waiting for longer than `stuck_after`.

        An evaluation on one rank alone, or a slow disk. `what` is named if this rank dies in it.
        """
        return HERE.at(what, patient=True)

    def refresh_master(self) -> None:
        """Let master weights follow parameters written through `.data` or NumPy.

        No version counter sees such writes. Call it on every rank, after the same write on every
        rank.
        """
        with torch.no_grad():
            self._settled().refresh_master()

    def close(self) -> None:
        """Take the hooks off, end the process groups, free host memory. Idempotent.

        Parameters stay usable; a tensor of the state that the caller still holds keeps its bytes.

        A checkpoint that is being written in the background is abandoned.

        Raises:
            Exception: what an update has raised beside this thread.
        """
        try:
            if self._core is not None and self._release.alive:
                self._core.gate.abandon()
                self._core.synchronize()
        finally:
            self._release()
            self._core = None
            self._hooks = None
            self.state.clear()

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
        return dict(self._alive().host_nbytes)

    @property
    def pinned_nbytes(self) -> int:
        """Host bytes that are page-locked, exactly; 0 where no parameter is on a GPU."""
        return self._alive().pinned_nbytes

    @property
    def membership(self) -> Membership:
        """The ranks that share this optimizer."""
        return self._membership

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the state, or all of it."""
        return self._alive().is_sharded

    def shards(self) -> Iterator[ParameterShard]:
        """Yield this rank's range of every trained parameter and its state."""
        for state in self._settled().states:
            yield from shards_of(state)

    def plain_state(self, name_of: Callable[[torch.Tensor], str]) -> dict[str, Any]:
        """Return what is no tensor: groups, step counts by name, and the face's own state."""
        groups = [
            {
                "parameters": [name_of(parameter) for parameter in group["params"]],
                "options": {
                    key: float(value) if isinstance(value, torch.Tensor) else value
                    for key, value in group.items()
                    if key not in _NOT_PLAIN
                },
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
        groups = []
        for number, (group, entry) in enumerate(
            zip(self.param_groups, saved["groups"], strict=True)
        ):
            names = {name_of(parameter) for parameter in group["params"]}
            _refuse_other_names(f"its group {number}", entry["parameters"], names)
            kept = {**entry["options"], "betas": tuple(entry["options"]["betas"])}
            if kept["amsgrad"] != group["amsgrad"]:
                raise ValueError(f"it has amsgrad={kept['amsgrad']}")
            self._check_group({**group, **kept})
            groups.append(kept)
        entries = {
            self._indices[shard.parameter]: {"step": saved["steps"][name_of(shard.parameter)]}
            for shard in self.shards()
        }
        return groups, self._plan_further_state(saved["further"], entries)

    @property
    def is_being_read(self) -> bool:
        """Whether a checkpoint is being written in the background, or waits to be committed."""
        return self._alive().gate.is_open

    def begin_reading(self, buckets: Iterable[int]) -> ReadGate:
        """Keep updates off buckets that a thread is about to read, and return who lets them go."""
        return self._alive().begin_reading(buckets)

    def finish_reading(self) -> None:
        """Return when no thread reads the state any more: it is about to be written."""
        self._alive().finish_reading()

    def memory_ledger(self) -> list[LedgerEntry]:
        """Return who holds which bytes of this rank now, on the host and on devices."""
        return self._alive().ledger()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: whole tensors with one rank, else this rank's ranges.

        Tensors share memory with the optimizer, as torch's do. It loads into the same rank of the
        same world; `full_state_dict` gives what loads anywhere.
        """
        self._settled()
        rank, world_size = self._share()
        saved = super().state_dict()
        saved[STATE_KEY] = {"world_size": world_size, "rank": rank, **self._further_state()}
        return saved

    def _share(self) -> tuple[int, int]:
        """Return this rank's place among those that the state is divided over."""
        return self._alive().share

    def full_state_dict(self) -> dict[str, Any]:
        """Return a plain `torch.optim.AdamW` state dict on rank 0, else {}. Collective.

        Moments are fp32 copies in each parameter's shape. The master weights of 16-bit parameters
        stand under the key "offload_adam", which torch ignores. It loads into an `OffloadAdam` of
        any world size, when every rank is given it.
        """
        core = self._settled()
        whole: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for state in core.states:
                whole.update(gather_bucket(state, self._membership) or {})
        if self._membership.rank != 0:
            return {}
        groups = super().state_dict()["param_groups"]
        return pack_full(groups, self._trainable_ids(), whole, self._further_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state in place: this rank's own, a full one, or one of torch's Adam and AdamW.

        Everything is checked before anything is changed.

        Raises:
            ValueError: another world or rank, other groups, other shapes, by name.
        """
        core = self._settled()
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        rank, world_size = self._share()
        saved = read_saved(state_dict, world_size, rank)
        groups = merge_groups(self.param_groups, saved.groups, self._check_group)
        entries = {
            self._indices[parameter]: saved.state.get(saved_id, {})
            for group, saved_group in zip(self.param_groups, saved.groups, strict=True)
            for parameter, saved_id in zip(group["params"], saved_group["params"], strict=True)
            if parameter in self._indices
        }
        with torch.no_grad():
            loads = [plan_load(*core.place_of(index), entry) for index, entry in entries.items()]
            load_further = self._plan_further_state(saved.further, entries)
            core.finish_reading()
            for load in loads:
                load.apply()
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

    def _inputs(self) -> StepInputs:
        """Read what this step is told; what cannot be read is raised once all ranks know of it."""
        try:
            return self._read_inputs()
        except Exception as error:
            return StepInputs(hyperparameters=[], failure=error)

    def _read_inputs(self) -> StepInputs:
        """Read the groups as they are now, and the loss scaler's word."""
        grad_scale = _scalar(getattr(self, "grad_scale", None), absent=1.0)
        if not (math.isfinite(grad_scale) and grad_scale > 0.0):
            raise ValueError(f"grad_scale must be finite and above 0, not {grad_scale}")
        inputs = self._step_inputs()
        return replace(
            inputs,
            grad_scale=inputs.grad_scale * grad_scale,
            found_inf=_scalar(getattr(self, "found_inf", None), absent=0.0),
            max_norm=self.max_grad_norm if self._max_norm_once is None else self._max_norm_once,
            notice=replace(self.notice, saved=self._alive().gate.num_finished),
        )

    def _settled(self) -> ShardedAdam:
        """Return the core, when nothing of it is under way."""
        core = self._alive()
        core.synchronize()
        return core

    def _alive(self) -> ShardedAdam:
        """Return the core of an optimizer that has not been closed."""
        if self._core is None or not self._release.alive:
            raise RuntimeError("this optimizer has been closed: make a new one to go on training")
        return self._core


def _versions() -> list[Fact]:
    """Return the versions that give the same bits."""
    return [
        ("the version of offload_adam", __version__),
        ("the version of torch", str(torch.__version__)),
        ("the version of numba", metadata.version("numba")),
    ]


def _refuse_other_names(where: str, saved: Iterable[str], here: Collection[str]) -> None:
    """Refuse names that differ, whatever their order."""
    for name in sorted({*saved} ^ {*here}):
        which = "this optimizer alone has" if name in here else "this optimizer does not have"
        raise ValueError(f"{where}: {which} {name!r}")


def _scalar(value: torch.Tensor | float | None, *, absent: float) -> float:
    return absent if value is None else float(value)


def _reason(report: StepReport) -> str:
    """Say why a step was skipped, with at most five names."""
    if not report.non_finite:
        return "found_inf was set"
    more = len(report.non_finite) - 5
    named = ", ".join(report.non_finite[:5]) + (f" and {more} more" if more > 0 else "")
    return f"the gradient of {named} is not finite"
