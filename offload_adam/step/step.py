"""`ShardedAdam`: one rank's shard of the state, and the step. Start here to follow a step."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.agreement import Agreement, Findings, agree, flags_on_any_rank
from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.gradients.gradient_transfer import GradientTransfer
from offload_adam.gradients.segments import BucketGradients
from offload_adam.gradients.stand_in import StreamedGradients
from offload_adam.kernels.threads import spans_nodes
from offload_adam.layout.budget import Category
from offload_adam.layout.schedule import Operation, plan_schedule
from offload_adam.memory.arena import HostArena, close_all, leave_all
from offload_adam.params.bucket import BucketState
from offload_adam.params.local_shard import ShardedModel, reject_distinct
from offload_adam.params.selection import Named, NewParameter
from offload_adam.spans import Stopwatch, span
from offload_adam.step.absence import AbsenceWatch
from offload_adam.step.accumulators import Accumulators
from offload_adam.step.build import Storage, build_states
from offload_adam.step.device_update import DeviceUpdate
from offload_adam.step.executor import EXITING, Executor
from offload_adam.step.external_edits import ExternalEdits
from offload_adam.step.forward_waits import ForwardHooks
from offload_adam.step.host_update import HostUpdate
from offload_adam.step.kept_steps import KeptSteps
from offload_adam.step.ledger import LedgerEntry, bucket_entries
from offload_adam.step.messages import (
    Decision,
    StepInputs,
    StepReport,
    UpdateInputs,
    decide,
    find_unfrozen,
    reject_disagreement,
    reject_partial_presence,
    reject_partly_multiplied,
)
from offload_adam.step.reducer import GradientReduction
from offload_adam.step.snapshot_lock import SnapshotLock
from offload_adam.step.unshard_waits import UnshardWaits
from offload_adam.step.update_tasks import BucketUpdate, UpdateTasks
from offload_adam.transfer.slots import Rings
from offload_adam.transfer.stream_waits import StreamWaits
from offload_adam.units import format_nbytes

logger = logging.getLogger(__name__)


@dataclass
class _LocalFindings:
    """What this rank found before the agreement.

    present: (num parameters,) bool, the parameters with a gradient on this rank.
    failure: this rank's error. It is raised after the agreement has reported it to all ranks.
    late: the user set a `.grad` after the reduction of its bucket had started.
    unfrozen: a parameter without state requires and has a gradient.
    changed: indices of parameters that the user edited, found by their version counters.
    unseen: indices of parameters that the user edited without moving the version counter.
    sum_of_squares: of this rank's gradients, in float64; not finite if a gradient is not.
    """

    present: npt.NDArray[np.bool_]
    failure: Exception | None = None
    late: bool = False
    unfrozen: bool = False
    changed: list[int] = field(default_factory=list)
    unseen: list[int] = field(default_factory=list)
    sum_of_squares: float = 0.0


class ShardedAdam:
    """This rank's shard of the Adam state, and the step that all ranks take together.

    Owns: all bucket states, the detector of external edits, slots, buffers and the executor.
        Closing `resources` removes the model's hooks, ends the update thread and unpins memory.
        `resources` does not refer to this object, nor to the model unless it is compiled, so a
        `weakref.finalize` may hold it without keeping either alive.
    Attributes:
        is_half_applied: the last step was interrupted while it updated the parameters.

    Lifecycle: `extend` for every set of parameters, `step` any number of times.
    """

    def __init__(
        self,
        ranks: RankGroup,
        storage: Storage,
        *,
        num_threads: int | None,
        on_device: bool = False,
        module: torch.nn.Module | None,
        overlaps: bool,
        unfreeze: Callable[[], None],
        accepts_sparse: bool = False,
        streamed: StreamedGradients | None = None,
        sharded: ShardedModel | None = None,
    ) -> None:
        """Construct an optimizer without parameters.

        Args:
            storage: where and how the state is stored.
            num_threads, on_device: see `plan_threads`.
            module: the model, to find parameters that the user replaces by other objects.
            overlaps: run updates on the update thread; `step` returns before they have finished.
            unfreeze: calls `extend` for the frozen parameters that now require a gradient.
                Collective. It must not keep the optimizer alive.
            accepts_sparse, streamed: see `GradientReduction`.
            sharded: the groups of FSDP2, None if no parameter is sharded.
        """
        self.ranks = ranks
        self.num_steps = 0
        self.is_half_applied = False
        self.states: list[BucketState] = []
        self._state_nbytes = 0
        self._storage = storage
        self.kept: KeptSteps | None = None
        self._kept_files: list[KeptSteps] = []
        self.overlaps = overlaps
        self._num_threads = num_threads
        self._on_device = on_device
        self._places: list[tuple[int, int]] = []  # by parameter: its bucket, its position there
        self._frozen: list[Named] = []
        self._unfreeze = unfreeze
        self.has_updated = False  # a step has updated parameters
        self._names: list[str] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._absence = AbsenceWatch(self._names, self._parameters)
        self.arenas: list[HostArena] = []
        self.resources = ExitStack()
        # Updates wait for a background checkpoint that still reads their bucket.
        self.snapshot_lock = SnapshotLock()
        self.external_edits = ExternalEdits(
            ranks, module, self.states, self._places, self.snapshot_lock
        )
        self._host_update: HostUpdate | None = None
        self._device_update = DeviceUpdate()
        self._updates: list[BucketUpdate] = []

        backend = storage.backend
        # Not a bound method: the executor in `resources` refers to `make_buffer` through the
        # transfer, and `resources` must not refer to this object.
        make_buffer = partial(storage.make_buffer, self.arenas)
        self._rings = Rings(make_buffer)
        self.stream_waits = StreamWaits(ranks, backend.make_streams)
        collectives = backend.make_collectives(ranks)
        self.transfer = GradientTransfer(
            ranks, collectives, self.stream_waits, self._rings, make_buffer
        )
        self.tasks = UpdateTasks(
            ranks,
            self.states,
            self._updates,
            self.snapshot_lock,
            collectives,
            self.stream_waits,
            self._rings,
        )
        self._background = Stopwatch()
        self.executor = Executor(
            self.transfer,
            self.tasks,
            backend.make_workers() if overlaps else None,
            ranks,
            self._background,
            self.external_edits.after_update,
        )
        self.stream_waits.wait_for_update = self.executor.wait_for_update
        self.resources.callback(_release, self.executor, self.arenas, self._kept_files)
        policy = storage.policy
        self._accumulators = Accumulators(
            ranks,
            self.states,
            self._updates,
            self.arenas,
            allow_overcommit=storage.offload.allow_overcommit,
        )
        self.reduction = GradientReduction(
            ranks,
            policy,
            self.states,
            self.stream_waits,
            self.transfer,
            self.executor,
            accumulators=self._accumulators if policy.accumulates_later else None,
            accepts_sparse=accepts_sparse,
            streamed=streamed,
        )
        self.forward_hooks: ForwardHooks | None = None
        self._unshard_waits: UnshardWaits | None = None
        self._sharded = sharded

    def extend(
        self,
        new: Sequence[NewParameter],
        frozen: Sequence[Named] = (),
    ) -> None:
        """Add parameters: flatten them into buckets, allocate their state, compile their kernels.

        Collective.

        Args:
            frozen: parameters without state, until a step finds a gradient of one of them.

        Raises:
            HostMemoryError: memory is short; the optimizer is unchanged.
        """
        if self.kept is not None:
            raise ValueError(
                "With kept state, the constructor must get all parameters, and they must "
                "require a gradient there: those that come later are not kept. Construct the "
                "optimizer again with them, or pass keep='none'."
            )
        # Copies and updates in flight may use the slots and buffers that are allocated again below.
        self.executor.finish_copies(wait=True)
        self.executor.finish_updates()
        # On one NUMA node it does not matter which thread touches a page first.
        touch = self._touch_host if spans_nodes() else None
        states, arena, buffer, kept = build_states(
            new,
            self.ranks,
            self._storage,
            len(self.states),
            touch,
            kept_files=self._kept_files,
            buffer_nbytes=self._storage.offload.snapshot_buffer_nbytes
            - self.snapshot_lock.buffer_nbytes,
        )
        self.arenas += [arena, buffer]
        all_states = [*self.states, *states]
        schedule = plan_schedule(
            [state.plan for state in all_states],
            num_reduce_slots=self._storage.backend.num_reduce_slots,
            num_staging_slots=self._storage.backend.num_staging_slots,
        )
        # Allocate before the lists of buckets and parameters grow: running out of memory must leave
        # the optimizer unchanged.
        self.transfer.allocate(all_states, schedule)
        self.tasks.reserve(all_states, schedule)
        self._rings.allocate()
        if kept is not None:
            self.kept = self.external_edits.kept = self.reduction.kept = kept
            assert kept.file is not None
            self._use_host_update().keep(kept.file)
        with PROGRESS.at("compilation", long_running=True):
            on_host = [state for state in states if state.plan.location.is_host]
            if on_host:
                self._use_host_update().add_buckets(on_host)
        self.snapshot_lock.buffers.append(buffer.allocate(buffer.nbytes, torch.uint8))
        self._updates += [
            self._use_host_update() if state.plan.location.is_host else self._device_update
            for state in states
        ]
        self.states += states
        unfrozen = {id(item.parameter) for item in new}
        self._frozen = [item for item in self._frozen if id(item[1]) not in unfrozen]
        self._frozen += frozen
        self._state_nbytes += arena.nbytes
        self._names += [item.name for item in new]
        self._parameters += [item.parameter for item in new]
        self._places += [(0, 0)] * len(new)
        for state in states:
            for position, index in enumerate(state.indices.tolist()):
                self._places[index] = (state.layout.index, position)
        devices = {state.layout.index: state.device for state in self.states}
        self.stream_waits.use_schedule(schedule, devices)
        self.reduction.extend(states)
        self.external_edits.extend(new)

    def _use_host_update(self) -> HostUpdate:
        """Return the host update, constructed on the first call because it imports Numba."""
        if self._host_update is None:
            self._host_update = HostUpdate(self._num_threads, on_device=self._on_device)
            self.transfer.fold = self._host_update.fold
        return self._host_update

    def _touch_host(self, memory: torch.Tensor) -> None:
        """Write to each page of a plane from the kernel thread that will update it; see `Touch`."""
        host = self._use_host_update()
        self.executor.run_on_worker("first touch of memory", lambda: host.touch(memory))

    @property
    def host_nbytes(self) -> dict[str, int]:
        """Host bytes that this rank has allocated, by category."""
        update = {Category.BLOCK_SUMS: 0, Category.PREPARED: 0}
        if self._host_update is not None:
            update |= self._host_update.nbytes
        return {
            Category.STATE: self._state_nbytes,
            Category.ACCUMULATORS: self._accumulators.host_nbytes,
            Category.STAGING: self._rings.staging_nbytes + self.transfer.host_nbytes,
            Category.SNAPSHOT_BUFFER: self.snapshot_lock.buffer_nbytes,
            Category.KEPT_RECORDS: 0 if self.kept is None else self.kept.overhead_nbytes,
            **update,
        }

    def ledger(self) -> list[LedgerEntry]:
        """Return every allocation of this rank, on the host and on devices."""
        entries = [entry for state in self.states for entry in bucket_entries(state)]
        entries += [
            LedgerEntry(Category.ACCUMULATORS, bucket, str(tensor.device), tensor.nbytes)
            for bucket, tensor in self._accumulators.tensors.items()
        ]
        of_buckets = (Category.STATE, Category.ACCUMULATORS)
        shared = {k: n for k, n in self.host_nbytes.items() if k not in of_buckets}
        entries += [LedgerEntry(name, None, "cpu", nbytes) for name, nbytes in shared.items()]
        slots = self.transfer.slot_nbytes.items()
        entries += [
            LedgerEntry(Category.SLOTS, None, str(device), nbytes) for device, nbytes in slots
        ]
        return entries

    def hook_forward(
        self, module: torch.nn.Module, units: Sequence[torch.nn.Module] | None
    ) -> None:
        """Put forward hooks on a model: each unit's forward waits for the unit's own buckets.

        Args:
            units: the modules that wait separately; None for the children of every ModuleList.
        """
        if self.forward_hooks is None:
            self.forward_hooks = ForwardHooks(self.ranks, module, self.executor, units)
            self.resources.callback(self.forward_hooks.removals.close)
        places = zip(self._parameters, self._places, strict=True)
        self.forward_hooks.attach(
            {
                parameter: bucket
                for parameter, (bucket, _) in places
                if not self._is_gathered(self.states[bucket])
            }
        )

    def hook_unshard(self) -> None:
        """Let FSDP2 wait for a group's updates before it gathers the group's parameters."""
        if self._sharded is None:
            return
        if self._unshard_waits is None:
            self._unshard_waits = UnshardWaits(self.executor)
            self.resources.callback(self._unshard_waits.removals.close)
        self._unshard_waits.attach(
            {
                group: [
                    state.layout.index
                    for state in self.states
                    if state.local_shard is not None and state.local_shard.unit == number
                ]
                for number, group in enumerate(self._sharded.units)
            }
        )

    def _is_gathered(self, state: BucketState) -> bool:
        """Return whether FSDP2 gathers the parameters of a bucket."""
        return state.local_shard is not None and state.local_shard.record is not None

    def synchronize(self) -> None:
        """Block until all parameters and all state hold the result of the last step.

        The host may then write to the state.
        """
        if self.forward_hooks is not None:
            self.forward_hooks.wait_for_all()
        self.executor.finish_updates()
        # So far only the compute stream waits for H2D copies and all-gathers. The host must wait
        # too, for two reasons. The copies read state that the host may write from now on. And a
        # CUDA graph cannot capture a wait for work that was issued before its capture.
        self.stream_waits.block_until_over(Operation.COPY_H2D)
        self.stream_waits.block_until_over(Operation.GATHER)
        self.executor.forget_streams()
        self.external_edits.take_replaced()

    @property
    def partition(self) -> tuple[int, int]:
        """This rank's index among the ranks that the state is sharded over, and their number."""
        if self._sharded is not None:
            return self.ranks.rank, self.ranks.world_size
        return self._storage.partition_of(self.ranks)

    @property
    def has_local_shards(self) -> bool:
        """Whether FSDP2 or tensor parallelism has sharded some of the parameters."""
        return self._sharded is not None

    def reshard(self) -> None:
        """Drop what FSDP2 has gathered, so that the model shows the sharded parameters."""
        if self._sharded is not None:
            self._sharded.reshard()

    def reject_distinct(self, name_of: Callable[[torch.Tensor], str] | None = None) -> None:
        """Raise an error if ranks have different parameters under one name.

        Args:
            name_of: returns a parameter's name; None to use the optimizer's names.

        Raises:
            CheckpointError: naming a parameter.
        """
        for state in self.states:
            if state.local_shard is not None and state.local_shard.is_distinct:
                reject_distinct(name_of(state.parameters[0]) if name_of else state.names[0])

    @property
    def pinned_nbytes(self) -> int:
        """Host bytes that are page-locked now."""
        return sum(arena.pinned_nbytes for arena in self.arenas)

    def named_parameters(self) -> list[Named]:
        """Return every parameter that has state, with its name."""
        return list(zip(self._names, self._parameters, strict=True))

    def bucket_and_position(self, index: int) -> tuple[BucketState, int]:
        """Return the bucket of a parameter, and its position there."""
        bucket, position = self._places[index]
        return self.states[bucket], position

    def step(self, inputs: StepInputs) -> StepReport:
        """Reduce the gradients, agree with the other ranks, then skip or update. Collective.

        Updates may still run when this returns; the next forward waits for them.

        Raises:
            PeerError: another rank raised an error in this step.
            RankDisagreementError: ranks differ in external edits, `grad_scale` or hyperparameters.
        """
        stopwatch = Stopwatch()
        PROGRESS.begin_step(self.num_steps + 1)
        if self.forward_hooks is not None:
            self.forward_hooks.step_begins()
        # 0. Wait for the updates of the previous step: they read the gradient shards that this step
        # writes.
        with span("wait previous"):
            self.executor.finish_updates()
        # These are the times of the previous step's updates, complete only after the wait above.
        background = self._background.take()
        # 1. Finish the reduction of every bucket's gradients. An error is passed to the agreement,
        # not raised: other ranks may already wait in the next collective.
        failure = self._reduce(inputs, stopwatch)
        # 2. Agree: one all-reduce of what each rank found in its gradients and parameters.
        agreement, changed = self._agree(inputs, failure, stopwatch)
        # 3. Decide from the agreement alone, so that all ranks decide the same.
        decision = decide(agreement, inputs.max_norm, inputs.factor)
        non_finite = self._names_of_non_finite(agreement) if decision.skip else ()
        present = agreement.present_counts.numpy() > 0
        report = StepReport(
            decision.total_norm,
            decision.clip_factor,
            decision.skip,
            0 if decision.skip else int(present.sum()),
            non_finite,
            notice=agreement.notice,
        )
        sequence = 0
        if self.kept is not None:
            sequence = self.kept.decide(
                decision, present, report, edited=self.external_edits.writes_masters(changed)
            )
        if not decision.skip:
            # 4. Update bucket by bucket, in the order in which the next forward needs them.
            self._apply(inputs, present, changed, decision, sequence, stopwatch)
        self._finish_step(agreement)
        return replace(report, timings=_added(background, stopwatch.elapsed_s))

    def _apply(
        self,
        inputs: StepInputs,
        present: npt.NDArray[np.bool_],
        changed: Sequence[int],
        decision: Decision,
        sequence: int,
        stopwatch: Stopwatch,
    ) -> None:
        """Start the updates, on the update thread if there is one.

        Args:
            present: (num parameters,) bool, those with a gradient on any rank.
            changed: indices of the parameters that the user modified.
            sequence: see `UpdateInputs`.
        """
        active = present.copy()
        for state, gradients in zip(self.states, self.reduction.gradients, strict=True):
            if state.local_shard is not None and state.local_shard.is_distinct:
                active[state.indices] = gradients.present  # other ranks have other parameters
        self.has_updated = True
        with span("edits"):
            self.external_edits.sync(changed)
        # Before the updates write to the parameters; `bump_versions` explains why.
        self.external_edits.bump_versions(active)
        update_inputs = UpdateInputs(
            active,
            inputs.hyperparameters,
            decision.gradient_scale,
            inputs.step,
            inputs.lazy,
            decision.largest_gradient,
            sequence,
        )
        self.is_half_applied = True  # stays True if an error or Ctrl-C ends `apply` early
        self.executor.apply(self.reduction.gradients, update_inputs, stopwatch)
        self.is_half_applied = False
        if self.kept is not None:
            self.kept.is_applied = True

    def _finish_step(self, agreement: Agreement) -> None:
        """Prepare for the next backward and forward."""
        self.reduction.reset()
        if self.forward_hooks is not None:
            self.forward_hooks.step_ended()
        if self.ranks.rank == 0:  # the counts are the same on all ranks: one warning is enough
            self._absence.record(agreement.present_counts)
        self.num_steps += 1

    def total_norm(self, inputs: StepInputs) -> float:
        """Reduce the gradients, if not yet done, and return their global norm. Collective.

        The norm is that of the mean gradients, divided by `inputs.grad_scale`.
        """
        self.executor.finish_updates()
        stopwatch = Stopwatch()  # nobody reads it
        failure = self._reduce(inputs, stopwatch)
        agreement, _ = self._agree(inputs, failure, stopwatch)
        return decide(agreement, None, inputs.factor).total_norm

    def norms(self, inputs: StepInputs) -> npt.NDArray[np.float64]:
        """Reduce the gradients, if not yet done, and return each parameter's norm. Collective.

        Returns:
            (num parameters,) float64, of the mean gradients, not divided by `inputs.grad_scale`.
        """
        self.executor.finish_updates()
        stopwatch = Stopwatch()  # nobody reads it
        self._agree(inputs, self._reduce(inputs, stopwatch), stopwatch)
        squares = np.zeros(len(self._parameters))

        def add_dense(*, on_host: bool) -> None:
            for state, gradients in zip(self.states, self.reduction.gradients, strict=True):
                if state.counted and state.plan.location.is_host is on_host:
                    update = self._updates[state.layout.index]
                    found = update.squares_by_position(state, gradients)
                    squares[state.indices] += found

        add_dense(on_host=False)
        self.executor.run_on_worker("norms", lambda: add_dense(on_host=True))
        if self.ranks.rank == 0:
            for state, gradients in zip(self.states, self.reduction.gradients, strict=True):
                for position, square in gradients.rows_squares().items():
                    squares[state.indices[position]] += square
        self.ranks.all_reduce(torch.from_numpy(squares))
        return np.sqrt(squares)

    def _reduce(self, inputs: StepInputs, stopwatch: Stopwatch) -> Exception | None:
        """Finish the reduction of all gradients, and return this rank's first error.

        The caller raises the error after the agreement has reported it to the other ranks.
        """
        if not self.reduction.streams:
            # `.grad` still holds every gradient. The user may have modified it since
            # `clip_grad_norm_` read it, so it is read again.
            self.reduction.reset()
        with stopwatch.span("reduce"):
            return self.reduction.finish() or inputs.failure

    def _agree(
        self, inputs: StepInputs, failure: Exception | None, stopwatch: Stopwatch
    ) -> tuple[Agreement, list[int]]:
        """Exchange what each rank found, and raise an error unless all ranks take the same step.

        Args:
            failure: this rank's error in the reduction, None if there was none.

        Returns:
            The agreement, and the indices of externally edited parameters.
        """
        found = self._find(inputs, failure, stopwatch)
        agreement = self._exchange(inputs, found, stopwatch)
        if agreement.ahead:
            # Some rank has run several backwards for the first time. Also after an error on some
            # rank, all ranks send the same rounds, since their peers wait for every bucket.
            with stopwatch.span("reduce"):
                rest = self.reduction.catch_up()
            failure = failure or rest
            found = self._find(inputs, failure, stopwatch)
            agreement = self._exchange(inputs, found, stopwatch)
        if agreement.unfrozen and not agreement.failed_ranks:
            # On some rank a parameter that was frozen so far has a gradient. Allocate its state,
            # reduce its gradient, and repeat the agreement.
            self._unfreeze()
            failure = self._reduce(inputs, stopwatch)
            found = self._find(inputs, failure, stopwatch)
            agreement = self._exchange(inputs, found, stopwatch)
        if agreement.late and not agreement.failed_ranks:
            # On some rank the user set a `.grad` after its bucket was reduced. Reduce all buckets
            # again, with these gradients added, and repeat the agreement.
            with stopwatch.span("reduce"):
                failure = self.reduction.take_late_gradients()
            found = self._find(inputs, failure, stopwatch)
            agreement = self._exchange(inputs, found, stopwatch)
        if found.failure is not None:
            # Only now, because the agreement has reported it: the other ranks raise a PeerError.
            raise found.failure
        changed = found.changed
        if agreement.unseen and not agreement.failed_ranks:
            agreement, changed = self._share_unseen(agreement, changed, found.unseen)
        changed_names = [self._names[index] for index in changed]
        reject_disagreement(agreement, self.ranks, inputs, changed_names)
        if not self._storage.policy.reduces:
            distinct = [
                index
                for state in self.states
                if state.local_shard is not None and state.local_shard.is_distinct
                for index in state.indices.tolist()
            ]
            reject_partial_presence(agreement, self.ranks.world_size, self._names, distinct)
        return agreement, changed

    def _find(
        self, inputs: StepInputs, failure: Exception | None, stopwatch: Stopwatch
    ) -> _LocalFindings:
        """Examine this rank's gradients and parameters. An error is stored, not raised.

        Args:
            failure: this rank's error so far. If there is one, nothing is examined.
        """
        found = _LocalFindings(np.zeros(len(self._parameters), dtype=np.bool_), failure)
        if failure is not None or self.reduction.is_ahead:  # gradients are not in the shards yet
            return found
        try:
            self.reshard()  # a module that is gathered now would not gather its updated parameters
            found.unfrozen = find_unfrozen(self._frozen)
            found.late = self.reduction.has_late_gradients()
            with span("edits"):
                found.changed = self.external_edits.find()
                found.unseen = self.external_edits.find_unseen(found.changed)
            self._reject_unready()
            for state, gradients in zip(self.states, self.reduction.gradients, strict=True):
                found.present[state.indices] = gradients.present
                update = self._updates[state.layout.index]
                update.allocate_for(state, gradients, lazy=inputs.lazy)
            if self.kept is not None and inputs.payload:
                self.kept.prepare(inputs, self.states, self.num_steps)
            if inputs.factor != 1.0:
                reject_partly_multiplied(inputs, found.present, self._names)
            with stopwatch.span("norm"):
                found.sum_of_squares = self._sum_of_squares()
        except Exception as error:
            found.failure = error
        return found

    def _exchange(
        self, inputs: StepInputs, found: _LocalFindings, stopwatch: Stopwatch
    ) -> Agreement:
        """All-reduce the findings of all ranks: the one small collective of a step."""
        changes = self.external_edits.checksum(found.changed) if self.ranks.world_size > 1 else 0
        findings = Findings(
            sum_of_squares=found.sum_of_squares,
            non_finite=not math.isfinite(found.sum_of_squares),
            found_inf=inputs.found_inf,
            grad_scale=inputs.grad_scale,
            changes=changes,
            unseen=bool(found.unseen),
            failed=found.failure is not None,
            late=found.late,
            ahead=self.reduction.is_ahead,
            unfrozen=found.unfrozen,
            settings=inputs.checksum(),
            step=self.num_steps + 1,
            notice=inputs.notice,
            present=torch.from_numpy(found.present),
        )
        with stopwatch.span("agree"):
            return agree(self.ranks, findings)

    def _share_unseen(
        self, agreement: Agreement, changed: list[int], unseen: list[int]
    ) -> tuple[Agreement, list[int]]:
        """Share the edits that a rank found without a version counter. Collective.

        Args:
            changed, unseen: this rank's; see `_LocalFindings`.

        Returns:
            The agreement with checksums of all edits, and the indices of the edited parameters.
        """
        flags = torch.zeros(len(self._parameters), dtype=torch.bool, device="cpu")
        # Some rank found such an edit. If this rank found none in its sample, it now compares all
        # elements.
        flags[unseen or self.external_edits.all_unseen(changed)] = True
        flags = flags_on_any_rank(self.ranks, flags)
        unseen = torch.nonzero(flags).flatten().tolist()
        self.external_edits.report_unseen([self._names[index] for index in unseen])
        changed = sorted({*changed, *unseen})
        if self.ranks.world_size > 1:
            # Each rank compares only its own shard with the masters, so ranks may find different
            # parameters. But each rank holds whole parameters, so all of them can compute the
            # checksum of every parameter that any rank found.
            checksum = self.external_edits.checksum(changed)
            own = torch.tensor([checksum], dtype=torch.int64, device="cpu")
            gathered = self.ranks.all_gather(own)
            agreement = replace(agreement, changes=tuple(int(one) for one in gathered))
        return agreement, changed

    def _reject_unready(self) -> None:
        """Raise an error for gradients of a forward that did not wait for its parameters."""
        if self.forward_hooks is not None:
            given = zip(self.states, self.reduction.gradients, strict=True)
            with_gradient = [s.layout.index for s, gradients in given if gradients.present.any()]
            self.forward_hooks.check(with_gradient, lambda number: self.states[number].names[0])

    def _sum_of_squares(self) -> float:
        """Return this rank's part of the global sum; not finite if one of its gradients is not.

        One rank alone counts gradients that several ranks hold; see `BucketState.counted`. Rank 0
        counts sparse gradients.
        """
        gradients = self.reduction.gradients
        dense = self.executor.sums_of_squares(gradients)
        rows = sum(map(BucketGradients.rows_sum_of_squares, gradients))
        if not math.isfinite(sum(dense) + rows):
            return math.nan
        # One fixed order of addition, whatever the order in which the sums were computed, makes the
        # result deterministic.
        counted = sum(
            (found for found, state in zip(dense, self.states, strict=True) if state.counted), 0.0
        )
        return counted + rows if self.ranks.rank == 0 else counted

    def _names_of_non_finite(self, agreement: Agreement) -> tuple[str, ...]:
        """Return the parameters with a non-finite gradient on any rank.

        Collective if the agreement reports non-finite gradients, which is the same on all ranks.
        """
        if not agreement.non_finite:
            return ()
        flags = torch.zeros(len(self._parameters), dtype=torch.bool, device="cpu")
        found = self.executor.non_finite_indices(self.reduction.gradients)
        flags[torch.from_numpy(found)] = True
        flags = flags_on_any_rank(self.ranks, flags)
        return tuple(self._names[index] for index in torch.nonzero(flags).flatten().tolist())


def _release(
    executor: Executor, arenas: Sequence[HostArena], kept_files: Sequence[KeptSteps]
) -> None:
    """End the executor, then unpin and drop the arenas and files that its updates used."""
    if executor.runs_here():
        # The garbage collector has finalized the optimizer on one of its own threads, which cannot
        # wait for itself: its jobs are not over.
        arguments = executor, arenas, kept_files
        threading.Thread(target=_release, args=arguments, daemon=True).start()
        return
    has_ended = False  # stays False if `close` is interrupted
    try:
        has_ended = executor.close()
    finally:
        if has_ended:
            close_all(arenas)
            for kept in kept_files:
                kept.close(copies=not EXITING.is_set())  # at exit no code will read them
        else:
            # Do not free the arenas: the running update would write to addresses that other code
            # may have mapped by then, and the device would copy from memory that is not pinned.
            leave_all(arenas)
            logger.error(
                "An update was still running when its optimizer was dropped. %s of its host memory "
                "stay allocated, %s of them pinned, until the process ends. Look for an earlier "
                "error on this or another rank, and call close() on an optimizer that you no "
                "longer need.",
                format_nbytes(sum(arena.nbytes for arena in arenas)),
                format_nbytes(sum(arena.pinned_nbytes for arena in arenas)),
            )


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of both by name."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
