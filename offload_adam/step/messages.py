"""Data of a step: inputs, the decision after the agreement, the report; and its errors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.agreement import Agreement, Notice
from offload_adam.coordinator.rank_checks import Field, require_same
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import PeerError, RankDisagreementError
from offload_adam.gradients.stand_in import gradient_of
from offload_adam.gradients.whole import Preparation
from offload_adam.kernels.scalars import NUM_SCALARS, Hyperparameters, scalar_row
from offload_adam.params.bucket import BucketState
from offload_adam.params.selection import Named


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one step besides the gradients.

    hyperparameters: indexed by `NewParameter.group`.
    num_per_group: how many entries of `hyperparameters` each parameter group has.
    grad_scale: the loss scale; gradients are divided by it.
    found_inf: not 0 if the caller found a non-finite gradient.
    max_norm: global 2-norm to clip to, None for no clipping.
    step: step count of all parameters, including this step; None if each parameter counts its own
        updates.
    lazy: a sparse gradient updates only the rows that it has entries for.
    failure: this rank's error in reading the inputs. The agreement reports it to other ranks.
    notice: flags of the training loop that the agreement exchanges too.
    factor: the factor that the user or clipping applied to the stand-ins in `.grad`.
    multiplied: indices of the parameters whose stand-ins were multiplied by `factor`.
    call: name of the running call, which must be the same on all ranks.
    payload: what is kept with the step besides state and inputs, see `KeptSteps`; empty in a call
        that takes no step.
    """

    hyperparameters: Sequence[Hyperparameters]
    grad_scale: float = 1.0
    found_inf: float = 0.0
    max_norm: float | None = None
    step: int | None = None
    lazy: bool = False
    failure: Exception | None = None
    notice: Notice = field(default_factory=Notice)
    num_per_group: int = 1
    factor: float = 1.0
    multiplied: Collection[int] = ()
    call: str = "step()"
    payload: bytes = b""

    def checksum(self) -> int:
        """Return a checksum of the fields that must be the same on all ranks."""
        return zlib.crc32(
            repr((self.hyperparameters, self.max_norm, self.step, self.factor, self.call)).encode()
        )

    def fields(self) -> list[Field]:
        """Return the fields behind `checksum`, by name, for an error message."""
        fields = [
            (f"{name} of group {number // self.num_per_group}", repr(value))
            for number, hyper in enumerate(self.hyperparameters)
            for name, value in asdict(hyper).items()
        ]
        return [
            *fields,
            ("the norm to clip to", str(self.max_norm)),
            ("the step", str(self.step)),
            ("the factor of the gradients in .grad", str(self.factor)),
            ("the call", self.call),
        ]


_NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds this to the norm it divides by


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to skip the step, and how to scale gradients. The same on every rank.

    total_norm, clip_factor: see `StepReport`.
    gradient_scale: factor of every gradient in the kernel: clip factor * factor / loss scale.
    """

    skip: bool
    total_norm: float
    clip_factor: float
    gradient_scale: float

    @property
    def largest_gradient(self) -> float:
        """A bound of all gradient elements times `gradient_scale`: the norm of all of them."""
        return abs(self.total_norm) * self.clip_factor


def decide(agreement: Agreement, max_norm: float | None, factor: float = 1.0) -> Decision:
    """Decide from the agreement alone whether to skip, and compute the scale in float64.

    Args:
        max_norm: global 2-norm to clip to, None for no clipping.
        factor: see `StepInputs`.

    Source: torch.nn.utils.clip_grad_norm_, for the factor max_norm / (norm + 1e-6), at most 1.
    """
    grad_scale = agreement.grad_scales[0]
    total_norm = math.sqrt(agreement.sum_of_squares) * abs(factor) / grad_scale
    if agreement.non_finite or agreement.found_inf or not math.isfinite(factor):
        return Decision(True, total_norm, 1.0, 0.0)
    clip_factor = 1.0 if max_norm is None else min(1.0, max_norm / (total_norm + _NORM_EPS))
    return Decision(False, total_norm, clip_factor, clip_factor * factor / grad_scale)


@dataclass(frozen=True, slots=True)
class UpdateInputs:
    """The inputs of the updates of one step, the same for all buckets.

    active: (num parameters,) bool, those with a gradient on any rank.
    hyperparameters: indexed by `BucketState.groups`.
    gradient_scale: factor of every gradient: clip factor * factor / loss scale.
    step: step count of all parameters, including this step; None if each parameter counts its own
        updates.
    lazy: a sparse gradient updates only the rows that it has entries for.
    largest_gradient: no gradient element times `gradient_scale` is larger.
    sequence: number of the step in the records of `KeptSteps`, from 1 on; 0 without records.
    """

    active: npt.NDArray[np.bool_]
    hyperparameters: Sequence[Hyperparameters]
    gradient_scale: float
    step: int | None = None
    lazy: bool = False
    largest_gradient: float = math.inf
    sequence: int = 0

    def counts_after(
        self, state: BucketState, active: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Return the (n,) step counts of the bucket's parameters, including this step."""
        if self.step is not None:
            return np.full(active.shape, self.step, dtype=np.int64)
        counts: npt.NDArray[np.int64] = state.step_counts.numpy().astype(np.int64) + active
        return counts

    def count_step(self, state: BucketState, active: npt.NDArray[np.bool_]) -> None:
        """Count the step for the bucket's active parameters."""
        count_step(state, self.counts_after(state, active))

    def scalar_rows(
        self,
        state: BucketState,
        counts: npt.NDArray[np.int64],
        active: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the scalars of the update: one row for each (group, step count) in use.

        Args:
            counts: (n,) step count of each parameter, including this step.
            active: (n,) bool, the parameters that are updated.

        Returns:
            (n,) the row of each parameter, undefined for inactive ones; and the rows, (num rows,
            NUM_SCALARS) float32.
        """
        rows = np.zeros(counts.size, dtype=np.int64)
        pairs = np.stack([state.groups[active], counts[active]], axis=1)
        if len(pairs) == 0:
            return rows, np.zeros((0, NUM_SCALARS), dtype=np.float32)
        if (pairs == pairs[0]).all():  # the usual case, without the sort of `np.unique`
            unique = pairs[:1]
        else:
            unique, rows[active] = np.unique(pairs, axis=0, return_inverse=True)
        scalars = [
            scalar_row(self.hyperparameters[group], step, self.gradient_scale)
            for group, step in unique.tolist()
        ]
        return rows, np.stack(scalars)

    def preparation_of(
        self, state: BucketState, position: int
    ) -> tuple[Hyperparameters, Preparation]:
        """Return how to prepare a whole gradient, and the hyperparameters for its update.

        The preparation applies the weight decay, so these hyperparameters have none.
        """
        hyper = self.hyperparameters[state.groups[position]]
        centralized = bool(state.centralized[position])
        how = Preparation(self.gradient_scale, hyper.weight_decay, centralized)
        return replace(hyper, weight_decay=0.0), how


class UpdatePart(NamedTuple):
    """A part of a bucket's update: `run` updates the shard's elements [start, end)."""

    start: int
    end: int
    run: Callable[[], None]


class Launches(NamedTuple):
    """The update of one bucket: run its parts, in this order, then count the step."""

    parts: Sequence[UpdatePart]
    count_step: Callable[[], None]


def count_step(
    state: BucketState,
    counts: npt.NDArray[np.int64],
    scales: npt.NDArray[np.float64] | None = None,
) -> None:
    """Store a bucket's step counts, and its scales unless None."""
    state.step_counts.numpy()[:] = counts
    if scales is not None:
        assert state.scales is not None
        state.scales.numpy()[:] = scales


_SAME_SETTINGS = (
    "Set the same values on every rank: run the same schedule, and make the same edits of "
    "param_groups and calls of clip_grad_norm_. If ranks use different parameters, clip with "
    "max_grad_norm or optimizer.clip_grad_norm_(). Compute norms of streamed gradients on all "
    "ranks."
)


def reject_disagreement(
    agreement: Agreement,
    ranks: RankGroup,
    inputs: StepInputs,
    changed_names: Sequence[str],
) -> None:
    """Raise an error if a rank failed, or if the ranks would not take the same step.

    If hyperparameters differ, which all ranks see in the agreement, a further collective finds
    which ones.

    Args:
        inputs: this rank's inputs.
        changed_names: the parameters modified outside the optimizer on this rank.

    Raises:
        PeerError: another rank failed.
        RankDisagreementError: ranks differ in step, grad_scale, hyperparameters or external edits.
    """
    if agreement.failed_ranks:
        raise PeerError(
            f"{inputs.call} aborted: rank(s) {ranks.to_global(agreement.failed_ranks)} raised an "
            "error (see their traceback)."
        )
    if len(set(agreement.steps)) > 1:
        raise RankDisagreementError(
            f"Ranks are at different steps: {list(agreement.steps)}, by rank. Load the same "
            "checkpoint on every rank, and call step() the same number of times."
        )
    if len(set(agreement.grad_scales)) > 1:
        raise RankDisagreementError(
            f"grad_scale differs between ranks: {list(agreement.grad_scales)}. Start "
            "the loss scalers of all ranks with the same scale, and lower it on all of them if "
            "last_step.skipped (a torch.amp.GradScaler does so)."
        )
    if len(set(agreement.settings)) > 1:
        require_same(ranks, "setting", inputs.fields(), remedy=_SAME_SETTINGS)
        raise AssertionError("Checksums of the settings differ, but no setting does.")
    if len(set(agreement.changes)) > 1:
        here = ", ".join(map(repr, changed_names[:5])) or "nothing"
        # A checksum of 0 means that the rank modified nothing.
        unlike = "but not" if 0 in agreement.changes else "differently than"
        raise RankDisagreementError(
            "Parameters were modified outside the optimizer on rank(s) "
            f"{ranks.to_global(_changed(agreement.changes))} {unlike} on the others (modified "
            f"here: {here}). Apply the same change on every rank, or broadcast it."
        )


def reject_partial_presence(
    agreement: Agreement, world_size: int, names: Sequence[str], distinct: Sequence[int] = ()
) -> None:
    """Raise an error if a gradient is on some ranks only, although the user has averaged it.

    Args:
        distinct: indices of parameters that are others on other ranks.

    Raises:
        RankDisagreementError: naming the first such parameter.
    """
    counts = agreement.present_counts.clone()
    counts[list(distinct)] = 0
    partial = torch.nonzero((counts > 0) & (counts < world_size)).flatten().tolist()
    if partial:
        raise RankDisagreementError(
            f"Parameter {names[partial[0]]!r} has a gradient on {int(counts[partial[0]])} of "
            f"{world_size} ranks. With gradient_reduction='external' every gradient must be "
            "averaged before step(), and so be present on all ranks or on none."
        )


def reject_partly_multiplied(
    inputs: StepInputs, present: npt.NDArray[np.bool_], names: Sequence[str]
) -> None:
    """Raise an error if only some of the gradients that have left `.grad` were multiplied.

    Raises:
        ValueError: naming a parameter whose gradient was not multiplied.
    """
    for index in np.flatnonzero(present).tolist():
        if index not in inputs.multiplied:
            raise ValueError(
                f"Gradients were multiplied by {inputs.factor} (clipped) after they had left "
                f".grad, but the gradient of parameter {names[index]!r} was not. Multiply the "
                "gradients of all parameters, or construct the optimizer without module=."
            )


def find_unfrozen(frozen: Sequence[Named]) -> bool:
    """Return whether a parameter without state requires a gradient and has one.

    Raises:
        ValueError: naming a parameter that has a gradient but does not require one.
    """
    found = False
    for name, parameter in frozen:
        if gradient_of(parameter) is not None:
            if not parameter.requires_grad:
                raise ValueError(
                    f"Parameter {name!r} has a gradient but no state, because it is frozen. Call "
                    "requires_grad_() on it to train it, or set its .grad to None."
                )
            found = True
    return found


def _changed(checksums: Sequence[int]) -> list[int]:
    """Return the ranks with changes if others have none, else those that differ from most."""
    if 0 in checksums:
        return [rank for rank, checksum in enumerate(checksums) if checksum != 0]
    return _minority(checksums)


def _minority(values: Sequence[int]) -> list[int]:
    """Return the ranks whose value is not the most common one; the first wins a tie."""
    common = max(values, key=lambda value: (values.count(value), -values.index(value)))
    return [rank for rank, value in enumerate(values) if value != common]


@dataclass(frozen=True, slots=True)
class StepReport:
    """The outcome of one `step()`.

    Attributes:
        total_norm: 2-norm of the mean gradient of all parameters, divided by the loss scale, before
            clipping; NaN if a gradient is not finite.
        clip_factor: every gradient was multiplied by it; 1.0 without clipping.
        skipped: a gradient was not finite, or `found_inf` was set, and nothing was changed.
        num_updated: how many parameters were updated: those with a gradient on any rank.
        non_finite: names of the parameters with a non-finite gradient on any rank.
        timings: seconds by phase: reduce, norm, agree, update, H2D copy, gather, and
            `device update`: launch the updates of state on a device;
            `checkpoint wait`: updates waited for a checkpoint to read their bucket;
            `update wait`: the model's forward waited for updates.
            If updates overlap the next forward, the report of the next step contains the times of
            this step's updates, also if the next step is skipped.
        notice: the flags of the training loop, combined over all ranks.
    """

    total_norm: float
    clip_factor: float
    skipped: bool
    num_updated: int
    non_finite: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    notice: Notice = field(default_factory=Notice)

    @property
    def reason(self) -> str:
        """Why the step was skipped, with at most five names of parameters."""
        if not self.non_finite:
            return "found_inf was set"
        more = len(self.non_finite) - 5
        named = ", ".join(self.non_finite[:5]) + (f" and {more} more" if more > 0 else "")
        return f"the gradient of {named} is not finite"
