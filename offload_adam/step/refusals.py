"""What makes a step impossible: errors that every rank raises, because all read one agreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.coordinator.admission import require_same
from offload_adam.coordinator.agreement import Agreement
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import PeerError, RankDisagreementError
from offload_adam.parameters.selection import Named
from offload_adam.parameters.stand_in import gradient_of
from offload_adam.step.inputs import StepInputs

_SAME_SETTINGS = (
    ". Set the same on every rank: run the same schedule, and make the same edits of param_groups "
    "and calls of clip_grad_norm_. Where ranks use different parameters, clip with max_grad_norm "
    "or optimizer.clip_grad_norm_(); take norms of streamed gradients on all ranks"
)


def refuse_disagreement(
    agreement: Agreement,
    ranks: RankGroup,
    inputs: StepInputs,
    changed_names: Sequence[str],
) -> None:
    """Raise where a rank failed, or where ranks would not take the same step.

    Collective where hyperparameters differ, which all ranks see: they tell each other which.

    Args:
        inputs: what this rank would step with.
        changed_names: the parameters changed from outside on this rank, for the message.

    Raises:
        PeerError: another rank failed.
        RankDisagreementError: ranks differ in step, grad_scale, hyperparameters or outside changes.
    """
    if agreement.failed_ranks:
        raise PeerError(
            f"rank(s) {list(agreement.failed_ranks)} refused this step; their error says why"
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
        raise RankDisagreementError(
            f"parameters were changed from outside on rank(s) {_changed(agreement.changes)} "
            f"otherwise than on the rest (changed here: {here}): make the same change on every "
            "rank, or broadcast it"
        )


def refuse_partial_presence(agreement: Agreement, world_size: int, names: Sequence[str]) -> None:
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


def refuse_partly_multiplied(
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


def refuse_unfrozen(frozen: Sequence[Named]) -> None:
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
