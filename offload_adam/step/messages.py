"""What a step is told, what it decides from the agreement, what it reports, and its errors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.admission import Field, require_same
from offload_adam.coordinator.agreement import Agreement, Notice
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import PeerError, RankDisagreementError
from offload_adam.gradients.stand_in import gradient_of
from offload_adam.gradients.whole import Preparation
from offload_adam.kernels.scalars import NUM_SCALARS, Hyperparameters, scalar_row
from offload_adam.params.bucket import BucketState
from offload_adam.params.selection import Named


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one step is told by its caller, besides the gradients.

    hyperparameters: indexed by `NewParameter.group`.
    num_per_group: how many of these there are for each parameter group.
    grad_scale: what the loss was multiplied by; gradients are divided by it.
    found_inf: not 0 where the caller has seen a gradient that is not finite.
    max_norm: global 2-norm to clip to, None for no clipping.
    step: step count of all parameters, this step included; None where each counts its own updates.
    lazy: sparse gradients update the rows they touch and no others.
    failure: why they could not be read on this rank; the other ranks must hear of it.
    notice: what rides along for the training loop.
    factor: that clipping, or the caller, has applied to the stand-ins in `.grad`.
    multiplied: the indices of the parameters for which it has.
    call: what the caller is doing, which must be the same on all ranks.
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

    def checksum(self) -> int:
        """Return a checksum of what must be the same on all ranks."""
        return zlib.crc32(
            repr((self.hyperparameters, self.max_norm, self.step, self.factor, self.call)).encode()
        )

    def fields(self) -> list[Field]:
        """Return what `checksum` is taken over, field by field."""
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
    """What all ranks do with this step; the same on every one, computed from the agreement alone.

    gradient_scale: what the kernel multiplies gradients with, unscaling times clip factor.
    """

    skip: bool
    total_norm: float
    clip_factor: float
    gradient_scale: float


def decide(agreement: Agreement, max_norm: float | None, factor: float = 1.0) -> Decision:
    """Turn the agreement into a scale or a skip, in float64.

    Args:
        factor: further factor of all gradients.

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
    """What one step adds to the fixed schedule.

    active: (num parameters,) bool, those with a gradient on any rank.
    hyperparameters: indexed by `BucketState.groups`.
    gradient_scale: unscaling times clip factor.
    step: the step count of every parameter, this update included; None where each has its own.
    lazy: sparse gradients update the rows they touch and no others.
    """

    active: npt.NDArray[np.bool_]
    hyperparameters: Sequence[Hyperparameters]
    gradient_scale: float
    step: int | None = None
    lazy: bool = False

    def count_step(
        self, state: BucketState, active: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Count the step for the bucket's active parameters and return its step counts."""
        counts = state.step_counts.numpy()
        if self.step is None:
            counts[active] += 1.0
        else:
            counts[:] = self.step
        return counts.astype(np.int64)

    def scalar_rows(
        self,
        state: BucketState,
        counts: npt.NDArray[np.int64],
        active: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return each parameter's row number, and the rows: one for each (group, step) in use.

        Args:
            counts: (n,) completed steps, this one included, of each parameter.
            active: (n,) parameters that are updated; the others' row numbers mean nothing.
        """
        rows = np.zeros(counts.size, dtype=np.int64)
        pairs = np.stack([state.groups[active], counts[active]], axis=1)
        if len(pairs) == 0:
            return rows, np.zeros((0, NUM_SCALARS), dtype=np.float32)
        if (pairs == pairs[0]).all():
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
        """Return how a gradient is prepared, and the hyperparameters for its update after that."""
        hyper = self.hyperparameters[state.groups[position]]
        centralized = bool(state.centralized[position])
        how = Preparation(self.gradient_scale, hyper.weight_decay, centralized)
        return replace(hyper, weight_decay=0.0), how


_SAME_SETTINGS = (
    "Set the same on every rank: run the same schedule, and make the same edits of param_groups "
    "and calls of clip_grad_norm_. Where ranks use different parameters, clip with max_grad_norm "
    "or optimizer.clip_grad_norm_(); take norms of streamed gradients on all ranks"
)


def reject_disagreement(
    agreement: Agreement,
    ranks: RankGroup,
    inputs: StepInputs,
    changed_names: Sequence[str],
) -> None:
    """Raise where a rank failed, or where ranks would not take the same step.

    Collective where hyperparameters differ, which all ranks see: they tell each other which.

    Args:
        inputs: what this rank would step with.
        changed_names: the parameters modified outside the optimizer on this rank.

    Raises:
        PeerError: another rank failed.
        RankDisagreementError: ranks differ in step, grad_scale, hyperparameters or external edits.
    """
    if agreement.failed_ranks:
        raise PeerError(
            f"{inputs.call} aborted: rank(s) {ranks.at(agreement.failed_ranks)} raised an error "
            "(see their traceback)."
        )
    if len(set(agreement.steps)) > 1:
        raise RankDisagreementError(
            f"ranks are at different steps: {list(agreement.steps)}, by rank. Load the same "
            "checkpoint on every rank, and call step() equally often"
        )
    if len(set(agreement.grad_scales)) > 1:
        raise RankDisagreementError(
            f"grad_scale differs between ranks: {list(agreement.grad_scales)}. Start "
            "the loss scalers of all ranks from one scale, and lower it on all of them when "
            "last_step.skipped (a torch.amp.GradScaler does)"
        )
    if len(set(agreement.settings)) > 1:
        require_same(ranks, "setting", inputs.fields(), remedy=_SAME_SETTINGS)
        raise AssertionError("settings differ, but none of what they are made of")
    if len(set(agreement.changes)) > 1:
        here = ", ".join(map(repr, changed_names[:5])) or "nothing"
        # 0 stands for no change.
        others = "but not on the others" if 0 in agreement.changes else "unlike on the others"
        raise RankDisagreementError(
            "Parameters were modified outside the optimizer on rank(s) "
            f"{ranks.at(_changed(agreement.changes))} {others} (modified here: {here}). Apply the "
            "same change on every rank, or broadcast it."
        )


def reject_partial_presence(agreement: Agreement, world_size: int, names: Sequence[str]) -> None:
    """Raise where gradients that are said to be averaged are not on all ranks.

    Raises:
        RankDisagreementError: naming the first such parameter.
    """
    counts = agreement.present_counts
    partial = torch.nonzero((counts > 0) & (counts < world_size)).flatten().tolist()
    if partial:
        raise RankDisagreementError(
            f"parameter {names[partial[0]]!r} has a gradient on {int(counts[partial[0]])} of "
            f"{world_size} ranks, but with gradient_reduction='external' gradients must be "
            "averaged, and so present, on all of them"
        )


def reject_partly_multiplied(
    inputs: StepInputs, present: npt.NDArray[np.bool_], names: Sequence[str]
) -> None:
    """Raise where the caller has multiplied some gradients that have left `.grad`, but not all.

    Raises:
        ValueError: naming a parameter whose gradient it has not.
    """
    for index in np.flatnonzero(present).tolist():
        if index not in inputs.multiplied:
            raise ValueError(
                f"gradients were multiplied by {inputs.factor} (clipped) after they had left "
                f".grad, but that of parameter {names[index]!r} was not. Multiply those of all "
                "parameters, or construct the optimizer without module="
            )


def reject_unfrozen(frozen: Sequence[Named]) -> None:
    """Raise where a parameter without state has a gradient.

    Raises:
        ValueError: naming the parameter.
    """
    for name, parameter in frozen:
        if gradient_of(parameter) is not None:
            raise ValueError(
                f"parameter {name!r} has a gradient, but did not require one when the optimizer "
                "was made, and has no state: make the optimizer before freezing it, or leave it "
                "out and add_param_group it when it is unfrozen"
            )


def _changed(checksums: Sequence[int]) -> list[int]:
    """Return the ranks that changed something where others did not; else those that differ."""
    if 0 in checksums:
        return [rank for rank, checksum in enumerate(checksums) if checksum != 0]
    return _minority(checksums)


def _minority(values: Sequence[int]) -> list[int]:
    """Return the ranks whose value is not the most common one (of ties, the first)."""
    common = max(values, key=lambda value: (values.count(value), -values.index(value)))
    return [rank for rank, value in enumerate(values) if value != common]


@dataclass(frozen=True, slots=True)
class StepReport:
    """The outcome of one `step()`.

    total_norm: 2-norm of the mean gradient of all parameters, unscaled and before clipping; NaN
        where it is not finite.
    clip_factor: what every gradient was multiplied by, 1.0 where nothing was clipped.
    skipped: a gradient was not finite or `found_inf` was set: nothing was changed.
    num_updated: parameters that were updated: those with a gradient on any rank.
    non_finite: names of the parameters whose gradient was not finite, on any rank.
    timings: seconds by phase: reduce, norm, agree, update, H2D copy, gather; `device update`, to
        launch those of state on a device; `checkpoint wait`, what updates have waited for one that
        is being written; and `update wait`, what the model's forward has waited for updates. Where
        updates run beside the next forward, those of a step are in the report of the next one, also
        where that one is skipped.
    notice: what all ranks have agreed on beside the step, from their `notice`.
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
        """Why a step was skipped, with at most five names."""
        if not self.non_finite:
            return "found_inf was set"
        more = len(self.non_finite) - 5
        named = ", ".join(self.non_finite[:5]) + (f" and {more} more" if more > 0 else "")
        return f"the gradient of {named} is not finite"
