"""`KeptSteps`: records of the steps of an optimizer whose state outlives its process.

    step t    reduce | prepare | agree | decide | update bucket 3, 2, 1, 0 ...
                       |                 |        |
    file               record of t:      record:  undo log: how far the
                       inputs of the     the      update has come
                       update            decision

A step is decided once any rank has recorded the decision. Before that, all ranks have recorded
what they need to complete the step without a backward: hyperparameters, step counts, and the
gradients, whose shards are in the file too. So after a kill either all ranks complete step t, or it
never happened.

The gradient shards of step t stay until all of its updates are complete on the rank: the next
backward and the next `step()` wait for them.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from offload_adam.coordinator.progress import PROGRESS
from offload_adam.coordinator.rank_checks import gather_texts, raise_on_all_ranks
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import KeptInUseError
from offload_adam.kept.file import (
    KeptFile,
    Sizes,
    is_kept_file,
    peek,
)
from offload_adam.kept.folder import FolderHolder
from offload_adam.kept.holder import Holder, NotKeptError
from offload_adam.kept.keeper_client import KeeperHolder
from offload_adam.kept.record import pack, step_of, unpack
from offload_adam.kernels.scalars import Hyperparameters
from offload_adam.options import OffloadPolicy
from offload_adam.params.bucket import BucketState
from offload_adam.step.messages import Decision, StepInputs, StepReport, UpdateInputs

logger = logging.getLogger(__name__)

_MOST_NAMES, _LONGEST_NAME = 100, 200
"""Maximum number and length of names of parameters with non-finite gradients in a record."""
_MOST_EDITED = 10
"""Steps in a row after edits, after which a warning says that none can be resumed from."""


@dataclass(frozen=True, slots=True)
class DecidedStep:
    """The step that was decided last, as its records describe it.

    updates: None if the step was skipped.
    step_counts: (num parameters,) before the step.
    scales: (num parameters,) before the step, see `BucketState.scales`.
    payload: what the optimizer has added, see `StepInputs.payload`.
    """

    report: StepReport
    num_steps: int
    updates: UpdateInputs | None
    step_counts: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float64]
    payload: bytes


class _Offer(NamedTuple):
    """Whether one rank can resume from its file, and from which steps.

    reason: why it cannot be used; "" if it can.
    sequences: numbers of the steps that the rank can complete.
    decided, valid_from: see `Found`.
    run: see `KeptSteps.prepare`.
    """

    exists: bool
    reason: str
    sequences: Sequence[int] = ()
    decided: int = 0
    valid_from: int = 0
    run: str = ""


class KeptSteps:
    """This rank's file of kept state, and the records in it.

    Attributes:
        file: the mapped file; set by `open`.
        adopted: the file holds the state of an earlier process, which `last_step` describes.
        parameters: (address, bytes) of the parameters that are in the file.

    Owns: the mapped file, and the right to use it. `close` releases both; the file remains.
    Lifecycle: `find`, then `open`, once. Then for each step `prepare` before its agreement, and
        `decide` after it.

    Args:
        identity: describes the layout of the state. Only the same layout can adopt it.
    """

    def __init__(
        self, ranks: RankGroup, policy: OffloadPolicy, identity: Mapping[str, Any], sizes: Sizes
    ) -> None:
        self._ranks = ranks
        self._policy = policy
        self._identity = json.dumps(identity)
        self._sizes = sizes
        self._holder = _holder_of(policy, ranks)
        self.file: KeptFile | None = None
        self.adopted = False
        self.parameters: list[tuple[int, int]] = []
        self.sequence = 0  # of the step that was decided last
        self._run = ""
        self._num_edited = 0  # steps in a row that followed an edit of the parameters
        self._is_new = False  # this process has created the file
        self.is_applied = True  # all updates of the step that was decided last have been started

    def find(self) -> None:
        """Acquire this rank's file, and adopt its state if all ranks can. Collective.

        A file that is not adopted is deleted, so that its memory is free.

        Raises:
            KeptInUseError: another process still uses a file.
            KeptStateError: a file or the folder cannot be used.
        """
        phase = "attaching to kept state"  # may wait for longer than `stuck_after`
        with PROGRESS.at(phase, long_running=True), raise_on_all_ranks(self._ranks, phase):
            self._holder.acquire(self._policy.attach_timeout)
            own = self._offer()
        texts = gather_texts(self._ranks, json.dumps([*own, secrets.token_hex(8)]))
        *_, self._run = json.loads(texts[0])  # of a new run, unless an earlier one is adopted
        offers = [_Offer(*json.loads(text)[:-1]) for text in texts]
        reason = _reason_against(offers)
        if not reason:
            self.adopted = True
            self.sequence, self._run = max(offer.decided for offer in offers), offers[0].run
            return
        if self._ranks.rank == 0 and any(offer.exists for offer in offers):
            level = logging.WARNING if self._policy.resume_kept else logging.INFO
            text = "Not resuming from kept state in %s, which is deleted: %s"
            logger.log(level, text, self._policy.keep_path, reason)
        if self.file is not None:
            self.file.close()
            self.file = None
        with raise_on_all_ranks(self._ranks, "deleting kept state"):
            self._holder.remove()
            self._delete_leftovers()

    def _delete_leftovers(self) -> None:
        """Delete the files of ranks that no longer exist, from a run with more of them."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        for name in self._holder.names():
            holder = self._holder.of(name)
            if int(name.rpartition("-")[2]) >= world_size and is_kept_file(holder):
                with suppress(KeptInUseError):
                    holder.acquire(0)
                    holder.remove()
                holder.release()

    def _offer(self) -> _Offer:
        """Map the file of an earlier process, and return which steps it can complete."""
        exists = self._holder.has_file()
        try:
            self.file = file = KeptFile.attach(self._holder, self._identity, self._sizes)
        except NotKeptError as error:
            return _Offer(exists, str(error))
        if not self._policy.resume_kept:
            return _Offer(True, "this start does not resume from it")
        found = file.found()
        newest = found.prepared
        records = {n: file.read_prepared(n) for n in (newest - 1, newest)}
        sequences = [n for n, record in records.items() if record is not None]
        run = unpack(records[newest] or pack({}, {}))[0].get("run", "")
        return _Offer(True, "", sequences, found.decided, found.valid_from, run)

    def open(self, *, reserves: bool) -> KeptFile:
        """Create the file, unless it was adopted.

        Args:
            reserves: allocate its pages now; otherwise the caller touches them.

        Raises:
            HostMemoryError: the file system lacks space.
        """
        if self.file is None:
            self.file = KeptFile.create(self._holder, self._identity, self._sizes, reserve=reserves)
            self.file.valid_from = 1
            self._is_new = True
        return self.file

    def prepare(self, inputs: StepInputs, states: Sequence[BucketState], num_steps: int) -> None:
        """Record this rank's part of a step, whose gradients are in their shards.

        All ranks' records have the same random text, which tells this run from others.

        Args:
            num_steps: number of steps before this one.

        Raises:
            ValueError: the record is larger than was planned for.
        """
        assert self.file is not None
        self._holder.check()
        counts, scales = _counters(states)
        values: dict[str, Any] = {
            "run": self._run,
            "num_steps": num_steps,
            "step": inputs.step,
            "lazy": inputs.lazy,
            "hyperparameters": [asdict(hyper) for hyper in inputs.hyperparameters],
        }
        arrays: dict[str, npt.NDArray[Any]] = {
            "step_counts": counts,
            "scales": scales,
            "payload": np.frombuffer(inputs.payload, dtype=np.uint8),
        }
        self.file.write_prepared(self.sequence + 1, pack(values, arrays))

    def decide(
        self,
        decision: Decision,
        active: npt.NDArray[np.bool_],
        report: StepReport,
        *,
        edited: bool,
    ) -> int:
        """Record the decision: from now on, the step is completed whatever happens.

        Args:
            active: (num parameters,) bool, those that are updated.
            edited: the update first copies parameters to their master weights.

        Returns:
            The sequence number of the step, from 1 on.
        """
        assert self.file is not None
        sequence = self.sequence + 1
        if edited:
            # The copy cannot be undone: after a kill in this step, nobody can resume from the file.
            self._require(sequence + 1)
            self._num_edited += 1
            if self._num_edited == _MOST_EDITED and self._ranks.rank == 0:
                logger.warning(
                    "Parameters were modified before each of the last %d steps. After a kill in "
                    "such a step, nobody can resume from kept state",
                    _MOST_EDITED,
                )
        else:
            self._num_edited = 0
        values: dict[str, Any] = {
            "decision": asdict(decision),
            "num_updated": report.num_updated,
            "non_finite": [name[:_LONGEST_NAME] for name in report.non_finite[:_MOST_NAMES]],
        }
        self.is_applied = decision.skip  # before the record: Ctrl-C may come right after it
        self.file.write_decision(sequence, pack(values, {"active": active}))
        self.sequence = sequence
        return sequence

    def before_gradients(self) -> None:
        """Note that gradient shards are about to be written: see the module's docstring.

        If an error or Ctrl-C ended the last step before all of its updates were started, it could
        no longer be completed with its own gradients.
        """
        if not self.is_applied:
            # One more than `before_writing`, as Ctrl-C may have come before `sequence` was set.
            self._require(self.sequence + 2)

    def before_writing(self) -> None:
        """Note that state is about to be written outside of a step, such as by a load."""
        self._require(self.sequence + 1)

    def _require(self, sequence: int) -> None:
        """Let only a step of at least this number be one to resume from."""
        if self.file is not None:
            self.file.valid_from = max(self.file.valid_from, sequence)

    def last_step(self) -> DecidedStep:
        """Return the step that was decided last, after `find` has adopted its state. Collective."""
        assert self.file is not None
        own = self.file.read_decision(self.sequence)
        # A rank that was killed before it recorded the decision takes it from another.
        texts = gather_texts(self._ranks, "" if own is None else own.hex())
        decision, flags = unpack(bytes.fromhex(next(filter(None, texts))))
        if own is None:
            self.file.write_decision(self.sequence, bytes.fromhex(next(filter(None, texts))))
        prepared = self.file.read_prepared(self.sequence)
        assert prepared is not None, "`find` has checked it"
        values, arrays = unpack(prepared)
        made = Decision(**decision["decision"])
        report = StepReport(
            made.total_norm,
            made.clip_factor,
            made.skip,
            decision["num_updated"],
            tuple(decision["non_finite"]),
        )
        updates = UpdateInputs(
            flags["active"],
            [Hyperparameters(**hyper) for hyper in values["hyperparameters"]],
            made.gradient_scale,
            values["step"],
            values["lazy"],
            made.largest_gradient,
            self.sequence,
        )
        return DecidedStep(
            report,
            values["num_steps"] + 1,
            None if made.skip else updates,
            arrays["step_counts"],
            arrays["scales"],
            arrays["payload"].tobytes(),
        )

    @property
    def overhead_nbytes(self) -> int:
        """Bytes of the file besides the arena."""
        return self._sizes.overhead_nbytes

    def remove(self) -> None:
        """Delete the file. Idempotent."""
        if self.file is not None:
            self._holder.remove()

    def close(self, *, copies: bool = True) -> None:
        """Drop the references to the file, and let others use it.

        The parameters become private: later writes to them do not reach the file.

        Args:
            copies: copy the parameters now, so that a process that uses the file later does not
                change them.
        """
        if self.file is not None:
            if self._is_new and self.file.found().prepared == 0:
                self._holder.remove()  # there is no step to resume from
            try:
                self.file.make_private(
                    self.parameters if copies and self._holder.has_file() else ()
                )
            except OSError as error:
                logger.warning(
                    "The parameters still share memory with the kept state %s, because they could "
                    "not be copied (%s). No optimizer can use this state until this process ends.",
                    self._holder.place,
                    error.strerror,
                )
                return
            self.file.close()
        self._holder.release()


class KeptStep(NamedTuple):
    """A step that this rank has decided, in a file to which it is not attached.

    step: its number, skipped steps included; 0 if none can be read.
    payload: see `StepInputs.payload`.
    """

    step: int
    payload: bytes = b""


def find_kept_step(policy: OffloadPolicy, ranks: RankGroup) -> KeptStep | None:
    """Return the step that this rank decided last; None if there is no file.

    Whether all ranks can complete the step is not checked.
    """
    holder = _holder_of(policy, ranks)
    prepared = peek(holder)
    if prepared is None:
        return KeptStep(0) if holder.has_file() else None
    _, arrays = unpack(prepared)
    return KeptStep(step_of(prepared), arrays["payload"].tobytes())


def _holder_of(policy: OffloadPolicy, ranks: RankGroup) -> Holder:
    """Return what holds this rank's file."""
    assert policy.keep_path is not None
    folder, name = Path(policy.keep_path), f"rank-{ranks.global_ranks[ranks.rank]:05d}"
    if policy.keep == "keeper":
        return KeeperHolder(folder, name, policy.keep_for)
    return FolderHolder(folder / name)


def _counters(
    states: Sequence[BucketState],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Return the step counts and scales of all parameters, (num parameters,) each."""
    num_parameters = sum(state.indices.size for state in states)
    counts = np.zeros(num_parameters, dtype=np.float32)
    scales = np.zeros(num_parameters, dtype=np.float64)
    for state in states:
        counts[state.indices] = state.step_counts.numpy()
        if state.scales is not None:
            scales[state.indices] = state.scales.numpy()
    return counts, scales


def _reason_against(offers: Sequence[_Offer]) -> str:
    """Return why the ranks cannot complete a step, "" if they can."""
    for offer in offers:
        if offer.reason:
            return offer.reason
    decided = max(offer.decided for offer in offers)
    if decided == 0:
        return "no step was decided"
    if len({offer.run for offer in offers}) > 1:
        return "the files of the ranks are from different runs"
    lacking = [rank for rank, offer in enumerate(offers) if decided not in offer.sequences]
    if lacking:
        return f"rank(s) {lacking} have no record of the step that was decided last"
    if max(offer.valid_from for offer in offers) > decided:
        return (
            "the process ended while state was loaded, or in a step that followed an edit of the "
            "parameters"
        )
    return ""
